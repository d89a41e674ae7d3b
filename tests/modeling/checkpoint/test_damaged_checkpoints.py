"""Damaged folders and odd names: what is refused, what is reported, and what is read and saved all the same."""

import contextlib
import json
import logging
from collections.abc import Callable

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensor_files import assert_same_tensors, read_folder
from tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from torch import nn

from kimi_linear.modeling.modeling_kimi_linear import (
    KimiLinearForCausalLM,
)

FP32_BY_NATURE = ("A_log", "dt_bias", "e_score_correction_bias")


@contextlib.contextmanager
def propagated_logs():
    """transformers keeps its log records from the root logger, where caplog listens."""
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


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
