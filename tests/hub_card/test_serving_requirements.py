"""`check-serving`: an exported folder passes, and each thing that vLLM or SGLang would stumble over is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import RELEASED_CONFIG, TINY_CONFIGS, released_tensors, tiny_config, write_checkpoint

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.cli import main
from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.hub_card.released_tensors import released_shapes
from kimi_linear.hub_card.serving_requirements import ENGINES, check_serving


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_names_and_shapes_are_those_of_the_released_layout(name):
    written = {tensor: tuple(value.shape) for tensor, value in released_tensors(TINY_CONFIGS[name]).items()}
    assert released_shapes(KimiLinearConfig(**TINY_CONFIGS[name])) == written


def test_the_released_shape_has_its_parameters():
    """20,493 tensors and 49.1 billion parameters, as in the index of the released snapshot."""
    shapes = released_shapes(KimiLinearConfig(**RELEASED_CONFIG))
    assert len(shapes) == 20493
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 49_122_681_728


def test_exported_folders_can_be_served(exported):
    report = check_serving(exported)
    assert report.problems == []
    assert report.notes[0] == "tensor parallel sizes that divide all heads: 1, 2, 4"
    assert report.notes[1].startswith("leave --trust-remote-code out")
    assert not any("tokenizer" in note or "template" in note for note in report.notes)
    assert check_serving(SMALL_CHECKPOINT).problems == []


def folder_with(path, changes=None, removed=()):
    """A tiny released folder whose config.json is changed after its weights were written."""
    write_checkpoint(path, tiny_config(), shards=1)
    fields = {**json.loads((path / "config.json").read_text()), **(changes or {})}
    for name in removed:
        fields.pop(name)
    (path / "config.json").write_text(json.dumps(fields))
    return path


FIELDS = {
    "epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps must be 1e-05"),
    "biased mix": ({"router_weight_uses_score_correction_bias": True}, "unbiased scores"),
    "architecture": ({"architectures": ["Other"]}, "architectures is ['Other']"),
}


@pytest.mark.parametrize("changes, words", FIELDS.values(), ids=FIELDS)
def test_fields_with_one_value_that_works(tmp_path, changes, words):
    (problem,) = check_serving(folder_with(tmp_path, changes)).problems
    assert words in problem


def test_fields_that_are_left_out(tmp_path):
    """Only those whose value is not the engines' default: moe_layer_freq is 1 for them too."""
    removed = ("rope_scaling", "moe_layer_freq", "num_key_value_heads", "mla_use_nope", "model_max_length")
    (problem,) = check_serving(folder_with(tmp_path, removed=removed)).problems
    assert "leaves out model_max_length, mla_use_nope:" in problem


def test_no_shared_experts_and_tied_embeddings(tmp_path):
    report = check_serving(folder_with(tmp_path, {"num_shared_experts": 0, "tie_word_embeddings": True}))
    text = " ".join(report.problems)
    for words in ("num_shared_experts must be 1", "tie_word_embeddings must be False", "would not know, 10 tensors"):
        assert words in text


@pytest.mark.parametrize("change", ["lacks", "would not know", "another shape"])
def test_tensors_by_name_and_shape(tmp_path, change):
    file = folder_with(tmp_path) / "model-00001-of-00001.safetensors"
    tensors, name = load_file(file), "model.layers.0.self_attn.A_log"
    if change == "lacks":
        del tensors[name]
    elif change == "another shape":
        tensors[name] = tensors[name].flatten()
    else:
        tensors[name := "model.layers.0.self_attn.g_proj.weight"] = torch.zeros(1)
    save_file(tensors, file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (problem,) = check_serving(tmp_path).problems
    assert change in problem
    assert f"1 tensors, the first is {name}" in problem


def test_notes_about_the_tokenizer(tmp_path):
    folder = folder_with(tmp_path)
    assert "there is no tokenizer: requests must hold token ids" in check_serving(folder).notes
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 100}')
    notes = check_serving(folder).notes
    assert "there is no chat template: only completions, no chat" in notes
    assert any("no more than 100 tokens" in note and "4096" in note for note in notes)


def test_command(exported, tmp_path, capsys):
    assert main(["check-serving", str(exported)]) == 0
    assert f"{ENGINES} can serve {exported}\nnote: tensor parallel" in capsys.readouterr().out
    assert main(["check-serving", str(folder_with(tmp_path, {"rms_norm_eps": 1e-6}))]) == 1
    assert f"{ENGINES} cannot serve {tmp_path}\n  - config.json: rms_norm_eps" in capsys.readouterr().out
    for folder, words in ((tmp_path / "none", "is not a folder"), (tmp_path.parent, "config.json does not exist")):
        assert main(["check-serving", str(folder)]) == 1
        assert words in capsys.readouterr().err
