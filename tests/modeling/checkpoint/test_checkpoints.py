"""Checkpoints: the released layout in, the same layout out, tensor for tensor, in the memory of one copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensor_files import assert_same_tensors, read_folder
from tiny_checkpoints import TINY_CONFIGS, released_tensors, tiny_config, write_checkpoint

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.code_flattening import flatten_sources
from kimi_linear.modeling.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearModel,
)

FP32_BY_NATURE = ("A_log", "dt_bias", "e_score_correction_bias")


# Reading the released layout


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("name", ["hybrid", "interleaved", "dense", "all_mla", "all_kda"])
def test_every_tensor_lands_where_it_belongs(tmp_path, name, shards):
    tensors = write_checkpoint(tmp_path, TINY_CONFIGS[name], shards=shards)
    model, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    loaded = model.state_dict()
    stacked = set()
    for name, tensor in tensors.items():
        if ".experts." not in name:
            assert torch.equal(loaded[name], tensor), name
            continue
        prefix, expert, kind, _ = name.rsplit(".", 3)
        if kind == "w2":
            target = loaded[f"{prefix}.down_proj"][int(expert)]
        else:
            target = loaded[f"{prefix}.gate_up_proj"][int(expert)].chunk(2)[kind == "w3"]
        assert torch.equal(target, tensor), name
        stacked |= {f"{prefix}.down_proj", f"{prefix}.gate_up_proj"}
    assert {name for name in loaded if name not in tensors} == stacked


def test_experts_of_one_layer_in_many_shards(tmp_path):
    config = tiny_config(num_experts=16)
    write_checkpoint(tmp_path, config, shards=7)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert len({file for name, file in files.items() if name.startswith(prefix)}) == 7
    tensors = released_tensors(config)
    experts = KimiLinearForCausalLM.from_pretrained(tmp_path).model.layers[1].block_sparse_moe.experts
    for i in range(16):
        w1, w3 = (tensors[f"{prefix}.{i}.{kind}.weight"] for kind in ("w1", "w3"))
        assert torch.equal(experts.gate_up_proj[i], torch.cat([w1, w3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_auto_takes_what_the_file_holds(tiny_folder, dtype):
    model = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid", dtype), dtype="auto")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith(FP32_BY_NATURE) else dtype), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_casts_all_but_the_gate_parameters(tiny_folder, dtype):
    tensors = released_tensors(TINY_CONFIGS["hybrid"])
    loaded = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"), dtype=dtype).state_dict()
    for name, tensor in tensors.items():
        if name in loaded:
            expected = tensor if name.endswith(FP32_BY_NATURE) else tensor.to(dtype)
            assert loaded[name].dtype == expected.dtype
            assert torch.equal(loaded[name], expected), name
    w1 = tensors["model.layers.1.block_sparse_moe.experts.5.w1.weight"]
    assert torch.equal(loaded["model.layers.1.block_sparse_moe.experts.gate_up_proj"][5].chunk(2)[0], w1.to(dtype))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_a_device_map_changes_nothing(tiny_folder, shared_tiny, device_map):
    mapped = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"), device_map=device_map)
    assert_same_tensors(mapped.state_dict(), shared_tiny("hybrid").state_dict())


def test_the_decoder_loads_from_the_language_model_s_folder(tiny_folder, shared_tiny, random_ids):
    decoder, info = KimiLinearModel.from_pretrained(tiny_folder("hybrid"), output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_tensors(decoder.state_dict(), shared_tiny("hybrid").model.state_dict())
    ids = random_ids(2, 9)
    with torch.no_grad():
        hidden = decoder(ids).last_hidden_state
        assert torch.equal(shared_tiny("hybrid").lm_head(hidden), shared_tiny("hybrid")(ids).logits)


def test_the_classifier_loads_from_the_language_model_s_folder(tiny_folder, shared_tiny, tmp_path, random_ids):
    classifier, info = KimiLinearForSequenceClassification.from_pretrained(
        tiny_folder("hybrid"), num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}  # the new head, and nothing else
    assert_same_tensors(classifier.model.state_dict(), shared_tiny("hybrid").model.state_dict())
    classifier.save_pretrained(tmp_path)
    ids = random_ids(2, 9)
    again, info = KimiLinearForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        logits = again.eval()(ids).logits
        assert logits.shape == (2, 3)
        assert torch.equal(logits, classifier.eval()(ids).logits)


# Writing it


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_saving_writes_what_was_loaded(tiny_folder, tmp_path, name, dtype, max_shard_size):
    folder = tiny_folder(name, dtype)
    KimiLinearForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(tmp_path, max_shard_size=max_shard_size)
    expected = read_folder(folder)
    assert {expected[n].dtype for n in expected if n.endswith(("A_log", "dt_bias"))} <= {torch.float32}
    assert_same_tensors(read_folder(tmp_path), expected)
    files = sorted(tmp_path.glob("*.safetensors"))
    if max_shard_size == "100KB":
        assert len(files) > 1
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert {n: f for f in files for n in load_file(f)} == {n: tmp_path / f for n, f in index["weight_map"].items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    else:
        assert [file.name for file in files] == ["model.safetensors"]


def test_saved_config_equals_the_loaded_one(tiny_folder, tmp_path):
    KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"), dtype="auto").save_pretrained(tmp_path)
    released, saved = (json.loads((f / "config.json").read_text()) for f in (tiny_folder("hybrid"), tmp_path))
    for written in (released, saved):
        written.pop("transformers_version")
        written.pop("rope_scaling", None)
    assert saved.pop("auto_map")["AutoConfig"] == "configuration_kimi_linear.KimiLinearConfig"
    assert saved == released


def test_the_installed_class_saves_the_code_that_reads_the_folder(tiny_folder, tmp_path):
    model = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"))
    model.save_pretrained(tmp_path / "main")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").glob("*.py"))
    assert {path.name: path.read_text() for path in (tmp_path / "main").glob("*.py")} == flatten_sources()
    for reference in json.loads((tmp_path / "main" / "config.json").read_text())["auto_map"].values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / "main" / f"{module}.py").read_text()


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_a_model_from_scratch_saves_the_released_names(tmp_path, name):
    config = TINY_CONFIGS[name]
    KimiLinearForCausalLM(KimiLinearConfig(**config)).save_pretrained(tmp_path)
    saved, expected = read_folder(tmp_path), released_tensors(config)
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in expected.items()}


def test_a_trained_expert_is_saved_under_its_own_name(tiny_folder, tmp_path):
    model = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"))
    with torch.no_grad():
        model.model.layers[2].block_sparse_moe.experts.gate_up_proj[5, 40] = 7.0  # row 8 of w3
    model.save_pretrained(tmp_path)
    expected = read_folder(tiny_folder("hybrid"))
    expected["model.layers.2.block_sparse_moe.experts.5.w3.weight"][8] = 7.0
    assert_same_tensors(read_folder(tmp_path), expected)


def test_the_native_class_reads_what_we_save(native_class, tiny_folder, tmp_path, random_ids):
    ours = KimiLinearForCausalLM.from_pretrained(tiny_folder("interleaved"))
    ours.save_pretrained(tmp_path, max_shard_size="100KB")
    native, info = native_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(native).__module__.startswith("transformers.")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = random_ids(2, 33)
    with torch.no_grad():
        # fp32 logits of order 1 after some 1e3 roundings of 6e-8
        torch.testing.assert_close(ours(ids).logits, native(ids).logits, atol=1e-4, rtol=1e-4)


# Memory

PEAK_SCRIPT = """
import json, sys, threading, time
import torch
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

warm_up, folder, dtype = sys.argv[1:]
KimiLinearForCausalLM.from_pretrained(warm_up)
before = peak = anonymous()
done = False

def sample():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=sample)
thread.start()
model = KimiLinearForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
done = True
thread.join()
layer = sum(tensor.nbytes for tensor in model.model.layers[1].state_dict().values())
weights = sum(tensor.nbytes for tensor in model.state_dict().values())
print(json.dumps({"peak": peak - before, "weights": weights, "layer": layer}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon of /proc/self/status (Linux)")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"], ids=["as stored", "cast"])
@pytest.mark.processes
def test_loading_peaks_at_one_copy_of_the_weights_and_a_layer(tiny_folder, tmp_path, dtype):
    config = tiny_config(
        kda_layers=(1, 2, 4, 5),
        full_attn_layers=(3, 6),
        hidden_size=256,
        head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_experts=64,
    )
    write_checkpoint(tmp_path, config, dtype=torch.bfloat16, shards=3)
    # Pages mapped from files can be dropped at any time; what must fit is anonymous memory. A fixed threshold makes the
    # C library give freed tensors back at once, so that the figure is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK_SCRIPT, str(tiny_folder("hybrid")), str(tmp_path), dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["weights"] > 100e6
    # Python objects, tensors below the threshold and the sampler take some more: 5% of the weights.
    assert measured["peak"] <= 1.05 * measured["weights"] + measured["layer"]
