"""Quantised checkpoints that would load wrong are refused before a weight is read, with format and advice."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM, KimiLinearModel

REFUSED = {
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "ModelOpt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "MLX": {"bits": 4, "group_size": 64},
    "MXFP4": {"quant_method": "mxfp4"},
    "'hqq'": {"quant_method": "hqq"},
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny checkpoint whose weight files are damaged: reading them would be another error."""
    target = tmp_path / "folder"
    shutil.copytree(tiny_folder("hybrid"), target)
    for path in target.glob("*.safetensors"):
        path.write_bytes(b"not weights")
    return target


def write_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("model_class", [KimiLinearForCausalLM, KimiLinearModel])
def test_method_in_the_config_is_refused(folder, name, model_class):
    write_config(folder, quantization_config=REFUSED[name])
    with pytest.raises(ValueError, match=rf"quantisation method is {name}.*(load|run|serve) the"):
        model_class.from_pretrained(folder)


def test_method_is_refused_where_the_config_is_given_as_an_object(folder):
    write_config(folder, quantization_config=REFUSED["GPTQ"])
    config = KimiLinearForCausalLM.config_class.from_pretrained(folder)  # reading the config alone is allowed
    with pytest.raises(ValueError, match="quantisation method is GPTQ"):
        KimiLinearForCausalLM.from_pretrained(folder, config=config)


def test_mlx_of_older_versions_and_modelopt_with_a_file_of_its_own(folder):
    write_config(folder, quantization=REFUSED["MLX"])
    with pytest.raises(ValueError, match=r"quantization of .*is MLX"):
        KimiLinearForCausalLM.from_pretrained(folder)
    write_config(folder, quantization=None)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(ValueError, match=r"hf_quant_config.json.*ModelOpt"):
        KimiLinearForCausalLM.from_pretrained(folder)


def test_gguf(folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"GGUF.*llama.cpp"):
        KimiLinearForCausalLM.from_pretrained(folder, gguf_file="model.gguf")


@pytest.mark.parametrize("old,new", [(".weight", ".qweight"), (".weight", ".weight_packed")])
def test_quantised_tensors_without_a_config_are_refused(tiny_folder, tmp_path, old, new):
    target = tmp_path / "folder"
    shutil.copytree(tiny_folder("hybrid"), target)
    (target / "model.safetensors.index.json").unlink()
    tensors = {}
    for path in sorted(target.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    renamed = {(name.replace(old, new) if ".experts." in name else name): x for name, x in tensors.items()}
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"experts\.0\.w1\{new} .* is a quantised tensor"):
        KimiLinearForCausalLM.from_pretrained(target)
