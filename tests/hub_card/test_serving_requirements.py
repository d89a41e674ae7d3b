"""`check-serving`: an exported folder passes, and each thing that vLLM or SGLang would stumble over is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import RELEASED_CONFIG, TINY_CONFIGS, released_tensors, tiny_config, write_checkpoint
from transformers import AutoTokenizer

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.cli import main
from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT, ExportRequest, export
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


def quantise(folder, packed: bool) -> None:
    """FP8 as compressed-tensors writes it, or its packed form, by names: each projection with a scale."""
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name or name.endswith("o_proj.weight")]:
        weight = tensors.pop(name)
        tensors[name + ("_packed" if packed else "")] = (
            torch.zeros(weight.shape[0], 2).int() if packed else weight.half()
        )
        tensors[f"{name}_scale"] = torch.ones(weight.shape[0], 1)
        if packed:
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(tensors, file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("packed", [False, True])
def test_compressed_tensors_folders_can_be_served(tmp_path, packed):
    folder = folder_with(tmp_path, {"quantization_config": {"quant_method": "compressed-tensors"}})
    quantise(folder, packed)
    report = check_serving(folder)
    assert report.problems == []
    assert any(note.startswith("quantised (compressed-tensors): names were checked") for note in report.notes)
    # The same tensors without the config that explains them, and a packed tensor without its scale.
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "gptq"}}))
    assert any("would not know" in problem for problem in check_serving(folder).problems)
    if packed:
        (folder / "config.json").write_text(json.dumps(fields))
        tensors = load_file(folder / "model-00001-of-00001.safetensors")
        name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
        del tensors[f"{name}_scale"]
        save_file(tensors, folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (problem,) = check_serving(folder).problems
        assert f"lacks 1 tensors, the first is {name}" in problem


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_expert_group": 2}, "several expert groups"),
        ({"moe_renormalize": False}, "without renormalisation"),
        ({"tie_word_embeddings": True}, "tied embeddings"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}, "other numbers of heads"),
    ],
)
def test_what_llama_cpp_and_exllamav3_ignore_is_noted(tmp_path, changes, words):
    notes = check_serving(folder_with(tmp_path, changes)).notes
    assert [note for note in notes if "llama.cpp and exllamav3 ignore" in note and words in note]
    assert not [note for note in check_serving(SMALL_CHECKPOINT).notes if "llama.cpp" in note]


def test_a_tokenizer_saved_by_transformers_5_is_noted_and_mended(tmp_path):
    import shutil

    folder = shutil.copytree(SMALL_CHECKPOINT, tmp_path / "five")
    tokenizer = AutoTokenizer.from_pretrained(SMALL_CHECKPOINT)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend" and isinstance(settings["extra_special_tokens"], list)
    assert any("saved by transformers 5" in note for note in check_serving(folder).notes)
    export(ExportRequest(out=tmp_path / "out", checkpoint=folder))
    assert not any("saved by transformers 5" in note for note in check_serving(tmp_path / "out").notes)
    mended = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert mended == json.loads((SMALL_CHECKPOINT / "tokenizer_config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab() and again.all_special_tokens == tokenizer.all_special_tokens


def test_command(exported, tmp_path, capsys):
    assert main(["check-serving", str(exported)]) == 0
    assert f"{ENGINES} can serve {exported}\nnote: tensor parallel" in capsys.readouterr().out
    assert main(["check-serving", str(folder_with(tmp_path, {"rms_norm_eps": 1e-6}))]) == 1
    assert f"{ENGINES} cannot serve {tmp_path}\n  - config.json: rms_norm_eps" in capsys.readouterr().out
    for folder, words in ((tmp_path / "none", "is not a folder"), (tmp_path.parent, "config.json does not exist")):
        assert main(["check-serving", str(folder)]) == 1
        assert words in capsys.readouterr().err
