"""The released size: names and shapes are the table of tensors of the released checkpoint, written out."""

import math

import pytest
import torch
from tiny_checkpoints import RELEASED_CONFIG
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.checkpoint.saving import to_released
from kimi_linear.modeling.modeling_kimi_linear import (
    KimiLinearForCausalLM,
)


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
