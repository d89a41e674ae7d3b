"""verify: what is right is called right, each kind of damage is found, and what can't be checked is said."""

import json
import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packed_weights import quantised_tensors, write_quantised
from safetensors.torch import load_file, save_file
from tiny_checkpoints import RELEASED_CONFIG, TINY_CONFIGS, write_checkpoint

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.cli import main
from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.hub_card.released_tensors import released_shapes
from kimi_linear.hub_card.verify import command, one_pass, prompts, whole_model
from kimi_linear.hub_card.verify.layout import check_layout
from kimi_linear.hub_card.verify.one_pass import LayerFacts
from kimi_linear.hub_card.verify.report import Report
from kimi_linear.hub_card.verify.streaming import StreamedModel


def config_of(folder: Path) -> KimiLinearConfig:
    return KimiLinearConfig.from_pretrained(folder)


def test_the_small_checkpoint_is_right(native_class, capsys):
    assert main(["verify", str(SMALL_CHECKPOINT), "--generate", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for said in (
        "names: 151 tensors", "dtypes: of 151", "chat text: as in the reference", "not the released shape",
        "not checked captured steps", "4 layers agree", "8 of 8 experts get tokens", "tokens that generate() made",
        "not checked greedy reference text", " 0 wrong",
    ):  # fmt: skip
        assert said in text, said


def write_headers(folder: Path) -> dict[str, dict]:
    """The released checkpoint as headers before holes in files: no byte of its 98 GB is on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    names, weight_map = list(released_shapes(KimiLinearConfig()).items()), {}
    for shard in range(20):
        header, end = {}, 0
        for name, shape in names[shard::20]:
            fp32 = name.endswith(("A_log", "dt_bias"))
            size = math.prod(shape) * (4 if fp32 else 2)
            header[name] = {"dtype": "F32" if fp32 else "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        file = f"model-{shard + 1:05d}-of-00020.safetensors"
        weight_map |= dict.fromkeys(header, file)
        write_header(folder / file, header)
        with (folder / file).open("r+b") as sparse:
            sparse.truncate((folder / file).stat().st_size + end)
    index = {"metadata": {"total_size": 98_245_528_576}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_header(file: Path, header: dict) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def test_the_released_layout_is_known_from_headers_alone(tmp_path, capsys):
    write_headers(tmp_path / "kimi")
    assert main(["verify", str(tmp_path / "kimi"), "--headers-only"]) == 0
    text = capsys.readouterr().out
    assert "released counts: 20,493 tensors, 49,122,681,728 parameters, 98,245,528,576 bytes" in text
    assert "--headers-only leaves them unread" in text and "neither tokenizer.json" in text


@pytest.fixture
def tiny(tmp_path):
    """A folder of one file, and its tensors: `tiny(edit)` edits them, writes them and returns the report."""
    write_checkpoint(tmp_path / "tiny", TINY_CONFIGS["hybrid"], shards=1)
    file = tmp_path / "tiny" / "model.safetensors"
    (tmp_path / "tiny" / "model-00001-of-00001.safetensors").rename(file)
    (tmp_path / "tiny" / "model.safetensors.index.json").unlink()

    def edited(edit) -> Report:
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})
        report = Report()
        check_layout(tmp_path / "tiny", config_of(tmp_path / "tiny"), report)
        return report

    return edited


NORM, GATE = "model.layers.0.self_attn.o_norm.weight", "model.layers.2.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(NORM), f"names: 1 tensors are missing, the first is {NORM}"),
        (lambda t: t.update(extra=torch.zeros(1)), "names: 1 tensors are unknown, the first is extra"),
        (lambda t: t.update({NORM: torch.ones(17)}), f"first is {NORM}, which is [17], [16] is called for"),
        (lambda t: t.update({GATE: t[GATE].bfloat16()}), f"first is {GATE}, which is BF16, F32 is called for"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_a_tensor_that_is_not_as_released_is_named(tiny, edit, words):
    report = tiny(edit)
    assert any(words in text for text in report.texts("wrong"))
    assert report.close() == 1


def test_a_name_in_two_files_and_a_wrong_index_are_found(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["hybrid"], shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    tensors = load_file(first)
    save_file({**load_file(second), NORM: tensors.get(NORM, torch.ones(16))}, second, {"format": "pt"})
    save_file({**tensors, NORM: torch.ones(16)}, first, {"format": "pt"})
    report = Report()
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 4
    index.write_text(json.dumps(content))
    check_layout(tmp_path, config_of(tmp_path), report)
    wrong = report.texts("wrong")
    assert any("1 tensors are in several files" in text for text in wrong)
    assert any("index.json says" in text for text in wrong)


def test_bytes_that_contradict_the_shape_are_found(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["hybrid"], shards=1)
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header[NORM]["data_offsets"][1] -= 4
    write_header(file, header)
    file.write_bytes(file.read_bytes() + content[8 + length :])
    report = Report()
    check_layout(tmp_path, config_of(tmp_path), report)
    assert any(f"other sizes than shape and dtype say, the first is {NORM}" in text for text in report.texts("wrong"))


def test_a_cut_file_ends_the_check(tmp_path, capsys):
    write_checkpoint(tmp_path, TINY_CONFIGS["hybrid"], shards=1)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["verify", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "download it again" in text and "mend what is wrong above first" in text


@pytest.fixture
def copy(tmp_path, tiny_folder) -> Path:
    """A copy of the tiny hybrid folder, to damage."""
    return Path(shutil.copytree(tiny_folder("hybrid"), tmp_path / "copy"))


def run_pass(folder: Path, tokens: int = 40) -> tuple[torch.Tensor | None, Report, torch.Tensor]:
    report, ids = Report(), torch.randint(0, 120, (tokens,), generator=torch.Generator().manual_seed(0))
    stored = check_layout(folder, config_of(folder), report)
    return one_pass.run_pass(config_of(folder), stored, ids, "cpu", report), report, ids


def test_a_streamed_model_is_the_whole_one_and_keeps_no_layer(tiny_folder, load_tiny):
    folder, ids = tiny_folder("interleaved"), torch.arange(30)[None]
    streamed = StreamedModel(config_of(folder), check_layout(folder, config_of(folder), Report()), "cpu")
    seen = []
    logits = streamed.logits(ids, lambda index, layer, *_: seen.append((index, layer.input_layernorm.weight.is_meta)))
    with torch.no_grad():
        expected = load_tiny("interleaved")(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert seen == [(i, False) for i in range(5)]
    assert all(x.is_meta for layer in streamed.model.model.layers for x in layer.parameters())


def test_layers_agree_with_the_native_class(native_class, copy):
    logits, report, _ = run_pass(copy)
    assert logits.shape == (40, 128) and not report.texts("wrong")
    assert any("4 layers agree" in text for text in report.texts("right"))


def test_a_quantised_layer_is_compared_with_its_dequantised_weights(native_class, tmp_path):
    write_quantised(tmp_path / "w4", "w4a16 g32", quantised_tensors("w4a16 g32")[0])
    _, report, _ = run_pass(tmp_path / "w4")
    assert not report.texts("wrong")
    assert any("layers agree" in text for text in report.texts("right"))


def test_a_layer_that_is_read_otherwise_is_found(native_class, copy, monkeypatch):
    original = one_pass.dense_tensors

    def doubled(layer, tensors):
        name = "self_attn.o_proj.weight"
        return {**original(layer, tensors), name: 1.5 * tensors[name]} if layer.is_kda else original(layer, tensors)

    monkeypatch.setattr(one_pass, "dense_tensors", doubled)
    _, report, _ = run_pass(copy)
    assert any("layers [1, 2] differ" in text for text in report.texts("wrong"))


def test_what_is_not_finite_is_found(copy):
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name in ("model.layers.2.self_attn.o_proj.weight",):
            if name in tensors:
                tensors[name][0, 0] = math.inf
                save_file(tensors, file, {"format": "pt"})
    logits, report, ids = run_pass(copy)
    one_pass.judge_logits(logits, ids, len(ids), True, report)
    wrong = report.texts("wrong")
    assert any("not finite from 3 on" in text for text in wrong) and "logits: all finite" in wrong


def test_weights_that_learnt_nothing_are_implausible(capsys):
    ids = torch.arange(50)
    for scale, is_text, mark in ((0.0, True, "wrong"), (9.0, True, "right"), (0.0, False, "unchecked")):
        report = Report()
        logits = torch.zeros(50, 128)
        logits[torch.arange(49), ids[1:]] = scale
        one_pass.judge_logits(logits, ids, len(ids), is_text, report)
        assert len(report.texts(mark)) == (2 if mark == "right" else 1)


def test_a_router_that_always_chooses_the_same_is_found():
    config = SimpleNamespace(num_experts_per_token=2, num_experts=8)
    stuck, free = (torch.tensor([20, 20, 0, 0, 0, 0, 0, 0]), torch.tensor([5] * 8))
    for counts, mark in ((stuck, "wrong"), (free, "right")):
        report = Report()
        one_pass.judge_layers([LayerFacts(1, 1.0, True, counts)], config, 20, torch.float32, report)
        assert any("routers" in text or "layers [2] send" in text for text in report.texts(mark))


class Letters:
    """Stands for the released tokenizer: the reference prompt has its ids, everything else one id a letter."""

    chat_template = "there is one"

    def __init__(self, **special: int) -> None:
        self.special = prompts._SPECIAL | special

    def apply_chat_template(self, turns, **_):
        return prompts._CHAT_TEXT

    def convert_tokens_to_ids(self, name):
        return self.special[name]

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def __call__(self, text, **_):
        ids = list(prompts.QUESTION_IDS) if text == prompts._CHAT_TEXT else [ord(letter) for letter in text]
        return SimpleNamespace(input_ids=ids, offset_mapping=[(i, i + 1) for i in range(len(text))])


def test_reference_ids_of_the_tokenizer(tmp_path, monkeypatch):
    report = Report()
    prompts.check_tokenizer(tmp_path, Letters(), KimiLinearConfig(), report)
    assert not report.texts("wrong") and len(report.texts("right")) == 6
    report = Report()
    monkeypatch.setattr(Letters, "apply_chat_template", lambda self, turns, **_: "[BOS]" + prompts._CHAT_TEXT)
    prompts.check_tokenizer(tmp_path, Letters(**{"[EOS]": 5}), KimiLinearConfig(), report)
    assert [text.partition(":")[0] for text in report.texts("wrong")] == ["chat text", "special tokens"]


@pytest.mark.parametrize(
    ("folder", "differs_at", "mark"),
    [("Kimi-Linear-48B-A3B-Instruct", None, "right"), ("Kimi-Linear-48B-A3B-Instruct", 3, "wrong"),
     ("Kimi-Linear-48B-A3B-Base", 3, "note")],
)  # fmt: skip
def test_greedy_reference_text(folder, differs_at, mark):
    ids = torch.arange(40, 60)
    logits = torch.nn.functional.one_hot(torch.cat([ids[1:], ids[:1]]), 128).float()
    if differs_at is not None:
        logits[9 + differs_at] = logits[0]
    report, text = Report(), command._Text(ids, 10, "reference")
    command._judge_greedy(logits, text, Letters(), Path(folder), KimiLinearConfig(), report)
    (said,) = report.texts(mark)
    assert f"the first {10 if differs_at is None else differs_at} of 10 tokens" in said


@pytest.mark.parametrize(("behind", "mark"), [(0.005, "right"), (0.5, "wrong")])
def test_generated_text_may_differ_at_a_tie_and_nowhere_else(behind, mark):
    """On an H100 two ways chose differently where logits were as good as equal, and the rest was called wrong."""
    ids = torch.arange(40, 60)
    logits = torch.nn.functional.one_hot(torch.cat([ids[1:], ids[:1]]), 128).float()
    logits[13, 5] = 1 + behind
    report = Report()
    config = KimiLinearConfig(dtype="bfloat16")
    command._judge_greedy(logits, command._Text(ids, 10, "generated"), Letters(), Path("x"), config, report)
    said = {"right": "10 of the 10 tokens that generate() made (1 of them as good as tied", "wrong": "9 of the 10"}
    assert said[mark] in report.texts(mark)[0]


def test_the_models_own_words_do_not_make_it_plausible():
    ids, report = torch.arange(40), Report()
    logits = torch.zeros(40, 128)
    logits[torch.arange(20, 39), ids[21:]] = 20.0
    one_pass.judge_logits(logits, ids, 20, True, report)
    assert "learnt nothing" in report.texts("wrong")[0]


def test_captured_steps_are_compared_with_layers(load_tiny, monkeypatch):
    """Where there are none that is said; where they differ they are wrong."""
    model, ids, report = load_tiny(), torch.arange(30), Report()
    whole_model.compare_steps(model, ids, report)
    assert "the model decodes layer by layer" in report.texts("unchecked")[0]
    monkeypatch.setattr(type(model), "decode_path", "captured steps")
    whole_model.compare_steps(model, ids, report)
    assert "16 of 16 greedy tokens are the same" in report.texts("right")[0]
    original = whole_model._logits_of_last
    monkeypatch.setattr(
        whole_model, "_logits_of_last",
        lambda model, *rest: original(model, *rest) * (1 if model.model.norm._forward_pre_hooks else 1.5),
    )  # fmt: skip
    whole_model.compare_steps(model, ids, report)
    assert len(report.texts("wrong")) == 1


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(whole_model, "available_memory", lambda: 2**33)
    assert whole_model.find_room(2**32, "cpu").fits
    room = whole_model.find_room(2**33, "cpu")
    assert not room.fits and "10.8 GiB, and 8.0 are free in memory" in room.why


@pytest.mark.parametrize(
    ("arguments", "words"), [(["nowhere"], "nowhere is not a folder"), ([str(Path(__file__).parent)], "config.json")]
)
def test_mistakes_exit_with_2(arguments, words, capsys):
    assert main(["verify", *arguments]) == 2
    assert words in capsys.readouterr().err
