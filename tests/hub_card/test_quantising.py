"""`quantize`: whole folders that load and serve, interruptions, mistakes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from float64_model import Float64Model
from safetensors.torch import load_file, save_file
from tiny_checkpoints import released_tensors, tiny_config, write_checkpoint

from kimi_linear.hub_card import exporter
from kimi_linear.hub_card.cli import main
from kimi_linear.hub_card.code_flattening import flatten_sources
from kimi_linear.hub_card.exporter import ExportRequest, export
from kimi_linear.hub_card.quantising import folder as quantising
from kimi_linear.hub_card.quantising import measure, plan, recipes, shards
from kimi_linear.hub_card.quantising.folder import QuantiseRequest, quantise
from kimi_linear.hub_card.quantising.recipes import RECIPES
from kimi_linear.hub_card.serving_requirements import check_serving
from kimi_linear.kernels.weights.handle import WeightHandle
from kimi_linear.modeling.checkpoint.packed_modules import KimiPackedExperts, packed_formats
from kimi_linear.modeling.checkpoint.schemes import Schemes
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

compressed_tensors = pytest.importorskip("compressed_tensors", reason="quantize packs with it (in the dev extra)")

EXPERT = "model.layers.1.block_sparse_moe.experts.0.w1"


# ---- whole folders


CONFIG = tiny_config(kda_layers=(1,), full_attn_layers=(2,), num_experts=4, num_experts_per_token=2)


@pytest.fixture(scope="module")
def code():
    return flatten_sources()


@pytest.fixture(autouse=True)
def flattened_once(monkeypatch, code):
    """The code of every folder is the same: it is made once."""
    for module in (quantising, exporter):
        monkeypatch.setattr(module, "flatten_sources", lambda: code)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "Kimi-Linear-48B-A3B-Base"
    write_checkpoint(folder, CONFIG)
    return folder


@pytest.fixture
def small_files(monkeypatch):
    """Four files or so, and batches of a few weights."""
    monkeypatch.setattr(plan, "FILE_BYTES", 70_000)
    monkeypatch.setattr(shards, "BLOCK_NUMBERS", {"cuda": 10_000})


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def dense_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a quantised folder with weights dequantised in float64, by the config alone."""
    schemes = Schemes(json.loads((folder / "config.json").read_text())["quantization_config"])
    held, dense = tensors_in(folder), {}
    for name, original in released_tensors(CONFIG).items():
        format = schemes.format_of(name.removesuffix(".weight")) if original.ndim == 2 else None
        layer = name.removesuffix(".weight")
        if format is None or layer.endswith(("embed_tokens", ".gate")):
            dense[name] = held[name].double()
            continue
        parts = (held[f"{layer}.{format.disk_name(part)}"] for part in ("packed", "scale"))
        dense[name] = WeightHandle(format, tuple(original.shape), *parts).dequantize()
    return dense


@pytest.mark.parametrize("recipe", RECIPES)
def test_folder_loads_packed_is_right_and_can_be_served(source, small_files, tmp_path, random_ids, recipe):
    out = tmp_path / "out"
    report = quantise(QuantiseRequest(source, out, recipe))
    before, after = tensors_in(source), tensors_in(out)
    kept = {name for name in before if name in after and after[name].dtype == before[name].dtype}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    quantised = {name.rpartition(".")[0] for name in after if name.endswith(".weight_scale")}
    assert {name.removesuffix(".weight") for name in before.keys() - kept} == quantised
    for part in ("gate", "f_a_proj", "g_b_proj", "b_proj", "kv_b_proj", "lm_head", "embed_tokens", "q_conv1d"):
        assert not any(layer.endswith(f".{part}") or layer == part for layer in quantised)
    assert {f"{EXPERT}", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"} <= quantised
    model = KimiLinearForCausalLM.from_pretrained(out).eval()
    experts = model.model.layers[1].block_sparse_moe.experts
    assert isinstance(experts, KimiPackedExperts)
    formats = {"w4a16": ["int4"], "w4a16-fp8": ["float8", "int4"], "fp8": ["float8"]}[recipe]
    assert [name.split(",")[0].split()[-1] for name in packed_formats(model)] == formats
    assert (experts.formats["down_proj"].storage == "fp8") == (recipe == "fp8")
    ids, dense = random_ids(2, 9), dense_tensors(out)
    with torch.no_grad():
        expected = Float64Model(CONFIG, dense)(ids).float()
        # As in the other tests of fp32 logits: of order 1 to 10, each behind some 1e3 roundings of 6e-8.
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    squares = [(before[name].double() - dense[name]).square().sum() for name in before if ".experts." in name]
    energy = sum(before[name].double().square().sum() for name in before if ".experts." in name)
    assert report.errors["routed experts"][0] == pytest.approx((sum(squares) / energy).sqrt().item(), rel=1e-3)
    assert all(ours < nearest for ours, nearest in report.errors.values())
    serving = check_serving(out)
    assert serving.problems == check_serving(source).problems
    assert not any("should name them" in note for note in serving.notes)
    # What the planned sizes say is what is written, and the folder can be exported again as it is.
    assert report.written_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    export(ExportRequest(tmp_path / "again", checkpoint=out))
    assert (tmp_path / "again" / "config.json").read_text() == (out / "config.json").read_text()


def test_library_reads_the_config_and_unpacks_the_weights(source, tmp_path):
    """compressed-tensors' own compressor makes the same dense weights of a folder's tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    out = tmp_path / "out"
    quantise(QuantiseRequest(source, out, "w4a16-fp8"))
    fields = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(fields)
    held, dense = tensors_in(out), dense_tensors(out)
    for layer, group in ((EXPERT, "group_0"), ("model.layers.0.mlp.up_proj", "group_1")):
        scheme = config.config_groups[group]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        parts = {name.removeprefix(f"{layer}."): x for name, x in held.items() if name.startswith(f"{layer}.")}
        weight = compressor.decompress(parts, scheme)["weight"]
        torch.testing.assert_close(weight.double(), dense[f"{layer}.weight"], rtol=1e-6, atol=0)


# ---- interruptions


class Stop(KeyboardInterrupt):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interruption_anywhere_loses_no_whole_file_and_changes_no_byte(source, small_files, tmp_path, monkeypatch):
    quantise(QuantiseRequest(source, tmp_path / "kimi"))
    expected = contents(tmp_path / "kimi")
    files = [name for name in expected if name.endswith(".safetensors")]
    assert len(files) >= 3
    shutil.rmtree(tmp_path / "kimi")
    points = {"count": 0, "stop": 0}

    def interruptible(function, half=None):
        def called(*args, **kwargs):
            points["count"] += 1
            if points["count"] == points["stop"]:
                if half is not None:
                    half(*args)
                raise Stop
            return function(*args, **kwargs)

        return called

    def half_a_file(tensors, path, metadata):
        save_file(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(shards, "quantise_rows", interruptible(shards.quantise_rows))
    monkeypatch.setattr(shards, "save_file", interruptible(save_file, half_a_file))
    monkeypatch.setattr(shards.os, "fsync", interruptible(os.fsync))
    monkeypatch.setattr(Path, "rename", interruptible(Path.rename))
    monkeypatch.setattr(quantising, "write_all_but_weights", interruptible(quantising.write_all_but_weights))
    monkeypatch.setattr(quantising, "card_notes", interruptible(quantising.card_notes))
    # Each run goes on with what the one before left, and is stopped one call later; after each new file at its start.
    staged, stopped, finished = tmp_path / "kimi.partial" / "folder", 0, 0
    while not (tmp_path / "kimi").exists():
        points.update(count=0, stop=points["stop"] + 1)
        try:
            quantise(QuantiseRequest(source, tmp_path / "kimi"))
        except Stop:
            stopped += 1
            whole = {name: data for name, data in contents(staged).items() if name in files} if staged.exists() else {}
            assert all(data == expected[name] for name, data in whole.items())
            assert len(whole) >= finished
            points["stop"] = 0 if len(whole) > finished else points["stop"]
            finished = len(whole)
    assert contents(tmp_path / "kimi") == expected
    assert not (tmp_path / "kimi.partial").exists()
    assert finished == len(files) and stopped > 5 * len(files)


def test_a_run_goes_on_after_its_last_whole_file(source, small_files, tmp_path, monkeypatch):
    request, made = QuantiseRequest(source, tmp_path / "out"), []
    original = quantising.make_file

    def counted(output, *args):
        made.append(output.name)
        if len(made) == 3:
            raise Stop
        original(output, *args)

    monkeypatch.setattr(quantising, "make_file", counted)
    with pytest.raises(Stop):
        quantise(request)
    first = tmp_path / "out.partial" / "folder" / made[0]
    os.truncate(first, first.stat().st_size - 1)  # by somebody else
    quantise(request)
    # The third was begun twice, and the one that was cut was made again; no other was.
    assert sorted(name for name in made if made.count(name) > 1) == sorted([made[0], made[2]] * 2)


def test_another_recipe_or_source_is_refused(source, small_files, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "card_notes", lambda *args: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        quantise(QuantiseRequest(source, tmp_path / "out"))
    kept = contents(tmp_path / "out.partial" / "folder")
    with pytest.raises(ValueError, match="an interrupted export with other arguments; remove it"):
        quantise(QuantiseRequest(source, tmp_path / "out", "fp8"))
    os.utime(next(source.glob("*.safetensors")), (1, 1))
    with pytest.raises(ValueError, match="an interrupted export with other arguments; remove it"):
        quantise(QuantiseRequest(source, tmp_path / "out"))
    assert contents(tmp_path / "out.partial" / "folder") == kept


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="is full: the export needs"):
        quantise(QuantiseRequest(source, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


# ---- mistakes


def rewritten(source: Path, name: str, change) -> None:
    """Replace a tensor by what `change` makes of it, or leave it out where that is None."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = source / index["weight_map"][name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is None:
        del index["weight_map"][name]
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors if changed is None else {**tensors, name: changed}, file, {"format": "pt"})


def test_nan_is_named(source, tmp_path):
    for name in (f"{EXPERT}.weight", "model.embed_tokens.weight"):
        for number in (torch.nan, -torch.inf):
            rewritten(source, name, lambda x, number=number: x.index_fill(1, torch.tensor([7]), number))
            with pytest.raises(ValueError, match=f"{name} of .* holds NaN or infinity"):
                quantise(QuantiseRequest(source, tmp_path / "out"))
            assert not list(tmp_path.glob("out*"))
        rewritten(source, name, lambda x: x.index_fill(1, torch.tensor([7]), 0))


def test_mistakes_say_what_to_do(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_checkpoint(tmp_path / "odd", {**CONFIG, "moe_intermediate_size": 40})
    with pytest.raises(ValueError, match=r"w2.weight is \[64, 40\]: its 40 columns don't divide into groups of 32"):
        quantise(QuantiseRequest(tmp_path / "odd", out))
    quantise(QuantiseRequest(tmp_path / "odd", tmp_path / "fp8", "fp8"))
    with pytest.raises(ValueError, match="is quantised already"):
        quantise(QuantiseRequest(tmp_path / "fp8", out))
    with pytest.raises(ValueError, match="'w3a16' is none of w4a16, w4a16-fp8, fp8"):
        quantise(QuantiseRequest(source, out, "w3a16"))
    with pytest.raises(ValueError, match="exists and is not empty"):
        quantise(QuantiseRequest(source, tmp_path / "fp8"))
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "QuantizationConfig", None)
        with pytest.raises(ValueError, match=r"pip install 'compressed-tensors>=0.15'"):
            quantise(QuantiseRequest(source, out))
    rewritten(source, f"{EXPERT}.weight", lambda x: x.to(torch.int8))
    with pytest.raises(ValueError, match=rf"{EXPERT}.weight in model-.* is \[32, 64\] of I8, not an unquant"):
        quantise(QuantiseRequest(source, out))
    rewritten(source, f"{EXPERT}.weight", lambda x: None)
    with pytest.raises(ValueError, match=f"lacks 1 tensors, the first is {EXPERT}"):
        quantise(QuantiseRequest(source, out))
    assert not out.exists()


def test_command_line_with_check(released, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "_MOST_LOGITS", 600 * 512)
    out = tmp_path / "out"
    assert main(["quantize", str(released), "--out", str(out), "--recipe", "fp8", "--check"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}: " in said and "routed experts: relative error" in said and "KL divergence" in said
    card = (out / "README.md").read_text()
    assert "base_model_relation: quantized" in card and "unchanged" not in card
    assert "On 600 tokens of the Python manual" in card and "| routed experts | 0.0" in card
    assert "compressed-tensors" in card.split("pip install")[1].splitlines()[0]
    assert (out / "tokenizer.json").is_file() and (out / "modeling_kimi_linear.py").is_file()
    assert main(["quantize", str(out), "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(quantising, "make_file", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["quantize", str(released), "--out", str(tmp_path / "x")]) == 130
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", str(released), "--out", "x", "--recipe", "int3"])
    assert exit_.value.code == 2 and f"choose from {', '.join(RECIPES)}" in capsys.readouterr().err.replace("'", "")
