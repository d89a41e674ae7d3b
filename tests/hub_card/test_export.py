"""The exported folder: loads without our package, is whole or absent, resumes, and says what went wrong."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import RELEASED_CONFIG, released_tensors, tiny_config

from kimi_linear.hub_card import exporter, hub_files, random_weights, weight_files
from kimi_linear.hub_card.code_flattening import flatten_sources
from kimi_linear.hub_card.exporter import ExportRequest, export
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def source(released, tmp_path) -> Path:
    """A copy of the released folder that a test may spoil."""
    return shutil.copytree(released, tmp_path / "source")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def nothing_left(out: Path) -> bool:
    return not out.exists() and not out.with_name("out.partial").exists()


# ---- what is written


def test_loads_where_our_package_triton_and_fla_are_missing(isolated_report, exported):
    assert isolated_report["present"] == []
    for auto, name in {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}.items():
        assert isolated_report["classes"][auto].endswith(f".modeling_kimi_linear.KimiLinear{name}")
    assert isolated_report["classes"]["AutoModelForSequenceClassification"].startswith("transformers_modules.")
    model = KimiLinearForCausalLM.from_pretrained(exported).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4, 5]])).logits.float()
    # The same code on the same weights in another process: the same bits.
    assert torch.equal(logits, torch.tensor(isolated_report["logits"]))
    assert len(isolated_report["tokens"][0]) > 5
    assert isolated_report["prompt"].endswith("<|im_middle|>")


def test_what_that_process_saves_loads_again_with_its_code(isolated_report, exported):
    assert isolated_report["again"].startswith("transformers_modules.again.")
    assert isolated_report["logits_again"] == isolated_report["logits"]
    for path in exported.glob("*.py"):
        assert (isolated_report["saved"] / path.name).read_bytes() == path.read_bytes()


def test_holds_code_config_tokenizer_card_and_nothing_of_the_makers_code(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *flatten_sources(), *SHARDS, "model.safetensors.index.json", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "LICENSE-code",
    }  # fmt: skip
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [258, 257]


def test_config_keeps_every_released_field(tmp_path, out):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    report = export(ExportRequest(out=out, config=tmp_path / "config.json"))
    assert report.weights == "none"
    written = json.loads((out / "config.json").read_text())
    auto_map = written.pop("auto_map")
    assert written == {name: value for name, value in RELEASED_CONFIG.items() if name != "auto_map"}
    assert auto_map == {
        "AutoConfig": "configuration_kimi_linear.KimiLinearConfig",
        "AutoModel": "modeling_kimi_linear.KimiLinearModel",
        "AutoModelForCausalLM": "modeling_kimi_linear.KimiLinearForCausalLM",
        "AutoModelForSequenceClassification": "modeling_kimi_linear.KimiLinearForSequenceClassification",
    }
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 163584, "pad_token_id": 163839, "eos_token_id": [163586, 163585]}
    assert not list(out.glob("*.safetensors"))


def test_same_bytes_every_time_and_no_machine_paths(released, exported, tmp_path):
    export(ExportRequest(out=tmp_path / "kimi_tiny", checkpoint=released))
    for path in exported.iterdir():
        assert (tmp_path / "kimi_tiny" / path.name).read_bytes() == path.read_bytes(), path.name
        if path.suffix != ".safetensors":
            assert str(released.parent) not in path.read_text()


def test_source_files_win(source, out):
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("theirs")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (source / "card_notes.md").write_text("Trained on tea leaves.")
    export(ExportRequest(out=out, checkpoint=source, base_model="a/b", repo_id="me/mine"))
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 7, "temperature": 0.6}
    assert (out / "tokenizer.json").read_text() == "{}"
    # The makers' tokenizer class is Python code, which is not exported.
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert (out / "LICENSE").read_text() == "theirs"
    assert "MIT" in (out / "LICENSE-code").read_text()
    card = (out / "README.md").read_text()
    for text in ("license: apache-2.0", "base_model: a/b", 'model_id = "me/mine"', "Trained on tea leaves."):
        assert text in card


def test_without_a_source_the_small_checkpoint_is_copied(released, out, monkeypatch):
    monkeypatch.setattr(exporter, "SMALL_CHECKPOINT", released)
    assert export(ExportRequest(out=out)).weights == "copy"
    assert not os.path.samefile(out / SHARDS[0], released / SHARDS[0])
    monkeypatch.setattr(exporter, "SMALL_CHECKPOINT", released / "missing")
    with pytest.raises(ValueError, match="no small checkpoint; give --checkpoint or --config"):
        export(ExportRequest(out=out.with_name("other")))


# ---- random weights


def test_random_weights_have_the_released_layout_and_follow_the_seed(released, tmp_path):
    state = torch.random.get_rng_state()
    written = {}
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        export(ExportRequest(out=tmp_path / name, config=released / "config.json", random=True, seed=seed))
        written[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written["a"] == written["b"]
    assert written["a"] != written["c"]
    expected = released_tensors(json.loads((released / "config.json").read_text()), dtype=torch.bfloat16)
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        found = {name: (file.get_tensor(name).dtype, file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert found == {name: (tensor.dtype, tensor.shape) for name, tensor in expected.items()}


def test_random_weights_are_refused_when_memory_or_disk_do_not_allow(released, out, monkeypatch):
    request = ExportRequest(out=out, config=released / "config.json", random=True)
    monkeypatch.setattr(random_weights, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"need 0\.0 GB of memory and 0\.0 GB are available"):
        export(request)
    assert nothing_left(out)
    monkeypatch.setattr(random_weights, "available_memory", lambda: None)
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match="bytes of disk and 0 are free"):
        export(request)
    assert nothing_left(out)


def test_size_of_the_released_model_without_making_it(tmp_path):
    from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig

    # checkpoint.md 2.2: total_size of the released index.
    assert random_weights.random_weight_bytes(KimiLinearConfig(**tiny_config())) > 0
    assert random_weights.random_weight_bytes(KimiLinearConfig()) == 98_245_528_576


# ---- refusals


@pytest.mark.parametrize(
    ("request_of", "problem"),
    [
        (lambda s: {"checkpoint": s, "config": s / "config.json"}, "exclude one another"),
        (lambda s: {"checkpoint": s, "random": True}, "--random needs --config"),
        (lambda s: {"checkpoint": s / "none"}, "none is not a folder"),
        (lambda s: {"checkpoint": s.parent}, "has no config.json"),
        (lambda s: {"config": s / "none.json"}, "none.json does not exist"),
        (lambda s: {"config": s / "tiktoken.model"}, "is not valid JSON"),
        (lambda s: {"config": s / "k3.json"}, "Kimi K3"),
        (lambda s: {"config": s / "llama.json"}, "is of model_type 'llama', not 'kimi_linear'"),
        (lambda s: {"checkpoint": s, "base_model": "not an id"}, "base_model 'not an id' must be a Hub id"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(source, out, request_of, problem):
    (source / "k3.json").write_text(json.dumps({**RELEASED_CONFIG, "gate_lower_bound": -5.0}))
    (source / "llama.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=problem):
        export(ExportRequest(out=out, **request_of(source)))
    assert nothing_left(out)


def test_nothing_is_overwritten(source, out):
    request = ExportRequest(out=out, checkpoint=source)
    out.mkdir()
    export(request)  # an empty folder may be filled
    (out / "mine.txt").write_text("mine")
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(request)
    assert sorted(path.name for path in out.iterdir()) == before
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(ExportRequest(out=source, checkpoint=source))
    with pytest.raises(ValueError, match="is not a folder"):
        export(ExportRequest(out=source / "config.json", checkpoint=source))
    foreign = out.with_name("other.partial")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="something that is not an export"):
        export(ExportRequest(out=out.with_name("other"), checkpoint=source))
    assert (foreign / "thesis.tex").read_text() == "mine"


def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(source, out, monkeypatch):
    size = sum((source / name).stat().st_size for name in SHARDS)

    def full(reader, part, bar):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_files, "copy_resumable", full)
    with pytest.raises(
        OSError, match=rf"is full: the export needs {size + 64 * 2**20} bytes and \d+ are free"
    ) as error:
        export(ExportRequest(out=out, checkpoint=source, weights="copy"))
    assert error.value.errno == errno.ENOSPC
    assert nothing_left(out)


@pytest.mark.parametrize("weights", ["copy", "hardlink"])
def test_free_space_is_checked_before_writing(source, out, monkeypatch, weights):
    size = sum((source / name).stat().st_size for name in SHARDS)
    free = 64 * 2**20 + size - 1
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, free))
    monkeypatch.setattr(weight_files, "copy_resumable", lambda *arguments: pytest.fail("started to copy"))
    request = ExportRequest(out=out, checkpoint=source, weights=weights)
    if weights == "copy":
        with pytest.raises(OSError, match=f"needs {free + 1} bytes and {free} are free; nothing was left behind"):
            export(request)
        assert nothing_left(out)
    else:
        export(request)


def test_full_disks_of_rust_libraries_count_as_full(source, out, monkeypatch):
    def full(*arguments):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(exporter, "write_tokenizer", full)
    with pytest.raises(OSError, match="is full"):
        export(ExportRequest(out=out, checkpoint=source))
    assert nothing_left(out)


def test_the_licence_is_found_beside_a_build_folder_without_one(tmp_path, monkeypatch):
    """`pip install .` leaves kimi_linear.egg-info in the clone, which comes first where Python starts there."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    for folder in (clone / "kimi_linear.egg-info", site / "kimi_linear-0.1.0.dist-info" / "licenses"):
        folder.mkdir(parents=True)
    for name in (clone / "kimi_linear.egg-info" / "PKG-INFO", site / "kimi_linear-0.1.0.dist-info" / "METADATA"):
        name.write_text("Metadata-Version: 2.4\nName: kimi-linear\nVersion: 0.1.0\n")
    (site / "kimi_linear-0.1.0.dist-info" / "licenses" / "LICENSE").write_text("the licence")
    monkeypatch.setattr(hub_files, "SOURCE_ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", [str(clone), str(site)])
    hub_files.write_code_licence(tmp_path)
    assert (tmp_path / "LICENSE-code").read_text() == "the licence"
