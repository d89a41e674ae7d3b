"""Quantised checkpoints are exported as they are, and check-serving knows what they hold."""

import json

import pytest
from packed_weights import LAYOUTS, config_of, quantised_tensors, write_quantised
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kimi_linear.hub_card.exporter import ExportRequest, export
from kimi_linear.hub_card.serving_requirements import check_serving


@pytest.fixture
def folder(tmp_path):
    write_quantised(tmp_path / "w4", "w4a16 g32", quantised_tensors("w4a16 g32")[0])
    return tmp_path / "w4"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_served(tmp_path, layout):
    write_quantised(tmp_path / "file", layout, quantised_tensors(layout)[0])
    report = check_serving(tmp_path / "file")
    assert report.problems == []
    assert any("names were checked" in note for note in report.notes)


def test_what_quantised_folders_lack_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    experts = "model.layers.1.block_sparse_moe.experts"
    del tensors[f"{experts}.0.w2.weight_scale"]
    tensors[f"{experts}.1.w1.weight_scale"] = tensors[f"{experts}.1.w1.weight_scale"][:, :1].clone()
    tensors[f"{experts}.2.w3.weight_zero_point"] = tensors[f"{experts}.2.w3.weight_packed"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lacks, unknown, shape = check_serving(folder).problems
    assert "lacks 1 tensors" in lacks and "experts.0.w2.weight_scale" in lacks
    assert "would not know" in unknown and "experts.2.w3.weight_zero_point" in unknown
    assert "another shape" in shape and "experts.1.w1.weight_scale" in shape


def test_layers_that_the_config_wrongly_calls_quantised_are_noted(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    report = check_serving(folder)
    assert report.problems == []
    assert any("1 layers" in note and "f_b_proj" in note for note in report.notes)


def test_gptq_is_known_by_its_names_and_not_exported(folder):
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("weight_packed", "qweight").replace("weight_scale", "scales"): x for name, x in tensors.items()
    }
    kept = {name: x for name, x in renamed.items() if not name.endswith("weight_shape")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    report = check_serving(folder)
    assert report.problems == [] and any("quantised (gptq): whether" in note for note in report.notes)
    with pytest.raises(ValueError, match="quantisation method is GPTQ"):
        export(ExportRequest(folder.parent / "out", checkpoint=folder))
    assert not (folder.parent / "out").exists()


def test_export_keeps_weights_and_config(folder):
    out = folder.parent / "out"
    export(ExportRequest(out, checkpoint=folder))
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {
        **config_of("w4a16 g32", ["lm_head", "model.layers.0.self_attn.f_b_proj"])
    }
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "model.layers.1.block_sparse_moe.experts.0.w1.weight_packed" in file.keys()  # noqa: SIM118
