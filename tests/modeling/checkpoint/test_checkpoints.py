"""Checkpoints: the released layout in, the same layout out, tensor for tensor, and what is said of damaged folders."""

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensor_files import assert_same_tensors, read_folder
from tiny_checkpoints import RELEASED_CONFIG, TINY_CONFIGS, released_tensors, tiny_config, write_checkpoint
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.code_flattening import flatten_sources
from kimi_linear.modeling.checkpoint.saving import to_released
from kimi_linear.modeling.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearModel,
)

FP32_BY_NATURE = ("A_log", "dt_bias", "e_score_correction_bias")


@contextlib.contextmanager
def propagated_logs():
    """transformers keeps its log records from the root logger, where caplog listens."""
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


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


# The released size. Names and shapes are the table of tensors of the released checkpoint, written out.


def released_names_and_sizes() -> dict[str, int]:
    hidden, inner, heads = 2304, 32 * 128, 32
    full = {3, 7, 11, 15, 19, 23, 26}
    sizes = {
        "model.embed_tokens.weight": 163840 * hidden,
        "lm_head.weight": 163840 * hidden,
        "model.norm.weight": hidden,
    }
    kda = {f"{kind}_proj.weight": inner * hidden for kind in "qkvo"}
    kda |= {f"{kind}_conv1d.weight": inner * 4 for kind in "qkv"}
    kda |= {f"{kind}_a_proj.weight": 128 * hidden for kind in "fg"} | {
        f"{kind}_b_proj.weight": inner * 128 for kind in "fg"
    }
    kda |= {"A_log": heads, "dt_bias": inner, "b_proj.weight": heads * hidden, "o_norm.weight": 128}
    mla = {
        "q_proj.weight": 6144 * hidden,
        "kv_a_proj_with_mqa.weight": 576 * hidden,
        "kv_a_layernorm.weight": 512,
        "kv_b_proj.weight": 8192 * 512,
        "o_proj.weight": hidden * 4096,
    }
    for i in range(27):
        layer = f"model.layers.{i}"
        sizes |= {f"{layer}.{norm}_layernorm.weight": hidden for norm in ("input", "post_attention")}
        sizes |= {f"{layer}.self_attn.{name}": size for name, size in (mla if i in full else kda).items()}
        if i == 0:
            sizes |= {f"{layer}.mlp.{kind}_proj.weight": 9216 * hidden for kind in ("gate", "up", "down")}
            continue
        moe = f"{layer}.block_sparse_moe"
        sizes |= {f"{moe}.gate.weight": 256 * hidden, f"{moe}.gate.e_score_correction_bias": 256}
        sizes |= {f"{moe}.experts.{e}.{w}.weight": 1024 * hidden for e in range(256) for w in ("w1", "w2", "w3")}
        sizes |= {f"{moe}.shared_experts.{kind}_proj.weight": 1024 * hidden for kind in ("gate", "up", "down")}
    return sizes


@pytest.fixture(scope="module")
def full_size() -> KimiLinearForCausalLM:
    with torch.device("meta"):
        return KimiLinearForCausalLM._from_config(KimiLinearConfig(**RELEASED_CONFIG), dtype=torch.bfloat16)


def test_the_full_size_model_has_the_released_parameter_count(full_size):
    parameters = sum(parameter.numel() for parameter in full_size.parameters())
    biases = sum(buffer.numel() for buffer in full_size.buffers())
    assert biases == 26 * 256  # the correction biases: buffers here, counted as parameters in the release
    assert parameters + biases == 49_122_681_728
    assert sum(math.prod(t.shape) for t in full_size.state_dict().values()) == 49_122_681_728


def test_the_full_size_model_saves_exactly_the_released_tensors(full_size):
    expected = released_names_and_sizes()
    assert len(expected) == 20_493
    assert sum(expected.values()) == 49_122_681_728
    written = revert_weight_conversion(full_size, full_size.state_dict())
    assert {name: tensor.numel() for name, tensor in written.items()} == expected


def test_the_full_size_model_saves_the_released_bytes(full_size):
    state = full_size.state_dict()
    to_released(state, torch.bfloat16)
    written = revert_weight_conversion(full_size, state)
    assert sum(tensor.nbytes for tensor in written.values()) == 98_245_528_576


def test_the_full_size_shapes_are_the_released_ones(full_size):
    shapes = {name: tuple(t.shape) for name, t in revert_weight_conversion(full_size, full_size.state_dict()).items()}
    for name, shape in {
        "model.layers.0.self_attn.q_conv1d.weight": (4096, 1, 4),
        "model.layers.0.self_attn.A_log": (1, 1, 32, 1),
        "model.layers.0.self_attn.f_b_proj.weight": (4096, 128),
        "model.layers.3.self_attn.q_proj.weight": (6144, 2304),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": (576, 2304),
        "model.layers.26.self_attn.kv_b_proj.weight": (8192, 512),
        "model.layers.0.mlp.down_proj.weight": (2304, 9216),
        "model.layers.1.block_sparse_moe.experts.255.w1.weight": (1024, 2304),
        "model.layers.1.block_sparse_moe.experts.0.w2.weight": (2304, 1024),
        "model.layers.26.block_sparse_moe.shared_experts.up_proj.weight": (1024, 2304),
    }.items():
        assert shapes[name] == shape, name


@pytest.mark.parametrize(
    "target",
    [
        *("q_proj", "k_proj", "v_proj", "o_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj"),
        *("kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    ],
)
def test_adapters_find_the_released_module_names(full_size, target):
    found = [module for name, module in full_size.named_modules() if name.split(".")[-1] == target]
    assert found and all(type(module) is nn.Linear for module in found)


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


# Damaged folders. The messages are transformers' and safetensors' own.


@pytest.fixture
def damaged(tmp_path):
    """A fresh tiny checkpoint in two shards, and the way to take tensors out of it."""

    class Damaged:
        folder = tmp_path
        second = tmp_path / "model-00002-of-00002.safetensors"

        def replace(self, name: str, tensor: torch.Tensor | None) -> None:
            """Put `tensor` in the place of a released tensor, or drop that with None, in shard and index."""
            path = tmp_path / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            shard = tmp_path / index["weight_map"].pop(name)
            tensors = load_file(shard)
            tensors.pop(name)
            if tensor is not None:
                tensors[name] = tensor
                index["weight_map"][name] = shard.name
            save_file(tensors, shard, metadata={"format": "pt"})
            path.write_text(json.dumps(index))

        def rename(self, new: Callable[[str], str | None]) -> None:
            """Give every tensor a new name, or drop it where that is None."""
            path = tmp_path / "model.safetensors.index.json"
            index = {"metadata": {}, "weight_map": {}}
            for shard in sorted(tmp_path.glob("*.safetensors")):
                tensors = {new(name): tensor for name, tensor in load_file(shard).items() if new(name)}
                index["weight_map"] |= dict.fromkeys(tensors, shard.name)
                save_file(tensors, shard, metadata={"format": "pt"})
            path.write_text(json.dumps(index))

    write_checkpoint(tmp_path, TINY_CONFIGS["hybrid"])
    return Damaged()


@pytest.mark.parametrize("kept", [-100, 4, 0], ids=["last bytes", "all but 4 bytes", "empty"])
def test_a_cut_shard_is_refused(damaged, kept):
    damaged.second.write_bytes(damaged.second.read_bytes()[:kept])
    with pytest.raises(SafetensorError, match=rf"{damaged.second.name} \(.*(header|metadata)"):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


def test_a_shard_that_is_no_safetensors_file_is_refused(damaged):
    damaged.second.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SafetensorError, match=rf"{damaged.second.name} \(.*header"):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


def test_a_missing_shard_is_named(damaged):
    damaged.second.unlink()
    with pytest.raises(OSError, match=damaged.second.name):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.A_log",
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
    ],
)
def test_a_missing_tensor_is_reported_and_initialised(damaged, caplog, name):
    damaged.replace(name, None)
    with propagated_logs():
        model, info = KimiLinearForCausalLM.from_pretrained(damaged.folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    assert name in caplog.text and "MISSING" in caplog.text
    assert model.state_dict()[name].isfinite().all()


def test_a_missing_expert_is_refused(damaged):
    damaged.replace("model.layers.1.block_sparse_moe.experts.3.w1.weight", None)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


def test_an_expert_missing_in_all_its_parts_is_refused(damaged):
    for kind in ("w1", "w2", "w3"):
        damaged.replace(f"model.layers.1.block_sparse_moe.experts.3.{kind}.weight", None)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("model.layers.1.self_attn.q_proj.weight", (3, 3), "ignore_mismatched_sizes"),
        ("model.layers.0.self_attn.q_conv1d.weight", (64, 4, 1), "ignore_mismatched_sizes"),
        ("model.layers.1.block_sparse_moe.experts.3.w1.weight", (16, 64), "conversion of the weights"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_and_named(damaged, caplog, name, shape, message):
    damaged.replace(name, torch.zeros(shape))
    with propagated_logs(), pytest.raises(RuntimeError, match=message):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)
    assert name.split(".experts.")[0] in caplog.text


EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize("suffix", ["kernel", "qweight", "weight_packed", "weight_scale_inv"])
def test_experts_under_names_that_nobody_reads_end_the_loading(damaged, suffix):
    damaged.rename(lambda name: name.replace(".weight", f".{suffix}") if EXPERTS in name else name)
    # Before 5.21 the loader's patterns take the start of a name, so that the second list has other names than the file.
    message = rf"no tensor fills: {EXPERTS}.*nobody reads: {EXPERTS}"
    if suffix != "kernel":  # a name that only quantised files have ends it before a weight is read
        message = rf"{EXPERTS}\.0\.w1\.{suffix} .* is a quantised tensor"
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


def test_experts_that_no_tensor_fills_end_the_loading(damaged):
    damaged.rename(lambda name: None if EXPERTS in name else name)
    with pytest.raises(ValueError, match=rf"no tensor fills: {EXPERTS}\.down_proj, {EXPERTS}\.gate_up_proj\. They"):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


def test_a_tensor_of_experts_that_nobody_reads_ends_the_loading(damaged):
    tensors = load_file(damaged.second) | {f"{EXPERTS}.0.w1.bias": torch.ones(1)}
    save_file(tensors, damaged.second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"nobody reads: {EXPERTS}\.0\.w1\.bias\."):
        KimiLinearForCausalLM.from_pretrained(damaged.folder)


def test_fewer_layers_leave_out_the_experts_of_the_others(tiny_folder, random_ids):
    linear = TINY_CONFIGS["hybrid"]["linear_attn_config"] | {"full_attn_layers": []}
    options = {"num_hidden_layers": 2, "linear_attn_config": linear}
    model = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"), **options)
    assert model(random_ids(1, 5)).logits.isfinite().all()


def test_the_names_of_llm_compressor_are_read_and_saved_as_released(damaged, tiny_folder, tmp_path):
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        old, new = f".{ours}.weight", f".{theirs}.weight"
        damaged.rename(lambda name, old=old, new=new: name.replace(old, new))
    model, info = KimiLinearForCausalLM.from_pretrained(damaged.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_folder(tmp_path / "saved"), read_folder(tiny_folder("hybrid")))


class ExpertsApart(nn.ModuleList):
    """Experts as llm-compressor takes them apart."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(nn.Module() for _ in range(experts.num_experts))
        for i, expert in enumerate(self):
            gate, up = experts.gate_up_proj[i].detach().chunk(2)
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj[i].detach())):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.clone())
                setattr(expert, name, linear)


@pytest.mark.parametrize("given", [False, True])
def test_experts_that_were_taken_apart_are_saved_as_released(load_tiny, tiny_folder, tmp_path, given):
    model = load_tiny()
    for layer in model.model.layers[1:]:
        layer.block_sparse_moe.experts = ExpertsApart(layer.block_sparse_moe.experts)
    model.save_pretrained(tmp_path, state_dict=model.state_dict() if given else None)
    assert_same_tensors(read_folder(tmp_path), read_folder(tiny_folder("hybrid")))


def test_stacked_names_never_reach_the_disk(tiny_folder, tmp_path):
    model = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    from_stacked = KimiLinearForCausalLM.from_pretrained(tmp_path)
    del model._weight_conversions  # as transformers 5.24 does where it has dequantised
    for i, each in enumerate((from_stacked, model)):
        each.save_pretrained(tmp_path / str(i))
        assert_same_tensors(read_folder(tmp_path / str(i)), read_folder(tiny_folder("hybrid")))


def test_moved_biases_survive_a_bf16_save_and_a_resume(tiny_folder, tmp_path):
    folder = tiny_folder("hybrid", torch.bfloat16)
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype="auto")
    router = model.model.layers[1].block_sparse_moe.gate
    router.e_score_correction_bias += 1e-3
    model.save_pretrained(tmp_path)
    saved = read_folder(tmp_path)
    moved, unmoved = (saved[f"model.layers.{i}.block_sparse_moe.gate.e_score_correction_bias"] for i in (1, 2))
    assert moved.dtype == torch.float32 and unmoved.dtype == torch.bfloat16
    again = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype="auto")
    resumed = KimiLinearForCausalLM.from_pretrained(folder, dtype="auto")
    resumed.load_state_dict(saved)
    for each in (again, resumed):
        bias = each.model.layers[1].block_sparse_moe.gate.e_score_correction_bias
        assert torch.equal(bias, router.e_score_correction_bias)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.model.layers.bfloat16()]
)
def test_a_cast_of_the_model_leaves_the_gate_parameters_in_fp32(load_tiny, random_ids, cast):
    model = load_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(FP32_BY_NATURE)}
    model(random_ids(1, 5), labels=random_ids(1, 5)).loss.backward()
    cast(model)
    after = model.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], tensor), name
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
    assert model.model.layers[0].self_attn.q_proj.weight.dtype != torch.float32


def test_a_cast_to_float64_takes_all_parameters_along(load_tiny):
    model = load_tiny().double()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
    assert {tensor.dtype for tensor in model.float().state_dict().values()} == {torch.float32}


def test_an_unknown_tensor_is_reported(damaged, caplog):
    tensors = load_file(damaged.second)
    tensors["model.layers.0.self_attn.rotary.weight"] = torch.zeros(2)
    save_file(tensors, damaged.second, metadata={"format": "pt"})
    _, info = KimiLinearForCausalLM.from_pretrained(damaged.folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.layers.0.self_attn.rotary.weight"}
