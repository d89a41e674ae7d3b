"""The kernels of the decode step: the interpreter's tests, and a compilation for the GPU classes they claim."""

import itertools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from offline_compile import DESKTOP_SHARED, DESKTOPS, SHARED_LIMIT, TARGETS, compiling, resources
from packed_weights import COMPRESSED
from tiny_checkpoints import RELEASED_CONFIG

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.kernels.decode import attend as decode_attend
from kimi_linear.kernels.decode import dequantize as decode_dequantize
from kimi_linear.kernels.decode import experts as decode_experts
from kimi_linear.kernels.decode import grouped_experts as decode_grouped_experts
from kimi_linear.kernels.decode import latent as decode_latent
from kimi_linear.kernels.decode import linear as decode_linear
from kimi_linear.kernels.decode import packed_experts as decode_packed_experts
from kimi_linear.kernels.decode import packed_grouped as decode_packed_grouped
from kimi_linear.kernels.decode import routing as decode_routing
from kimi_linear.kernels.kda import step as kda_step
from kimi_linear.modeling.decode.step import DecodeStep
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

HERE = Path(__file__).parent
KERNELS = [
    decode_linear.decode_gemv_kernel, decode_linear.decode_skinny_kernel,
    decode_linear.decode_norm_kernel, decode_linear.decode_gate_kernel,
    decode_routing.decode_route_kernel, decode_routing.decode_group_kernel,
    decode_experts.decode_expert_up_kernel, decode_experts.decode_expert_down_kernel,
    decode_grouped_experts.decode_grouped_up_kernel, decode_grouped_experts.decode_grouped_down_kernel,
    decode_grouped_experts.decode_combine_kernel,
    decode_attend.decode_attend_kernel, decode_attend.decode_attend_tokens_kernel,
    decode_latent.decode_absorb_kernel, decode_latent.decode_join_kernel, decode_latent.decode_value_kernel,
    kda_step.kda_step_fwd_kernel,
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """One layer of each kind at the released shape, without memory."""
    config = KimiLinearConfig.from_dict(RELEASED_CONFIG)
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config).to(torch.bfloat16)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[2], layers[3]])  # KDA dense, KDA MoE, MLA MoE
    return model


@pytest.mark.parametrize(
    ("gpu", "batch", "tokens"),
    [*itertools.product(TARGETS, [1, 64], [1]), ("sm_90", 8, 1), ("sm_90", 512, 1), ("sm_90", 1, 4)],
)
def test_step_compiles_and_fits(gpu, batch, tokens, model, monkeypatch):
    """At the released shape: shared memory within limits; matrix products on tensor cores; wide loads of weights."""
    target, step = TARGETS[gpu], DecodeStep(model, batch, tokens)
    step.plan._gpu, step.plan._pdl = gpu, gpu in ("sm_90", "sm_100")
    with compiling(KERNELS, target, monkeypatch) as compiled:
        step.plan.launch()
    with compiling(KERNELS, target, monkeypatch) as side_by_side:
        for launch in step.plan.kinds_of_launches():
            launch()
    assert {kernel.hash for _, kernel in side_by_side} == {kernel.hash for _, kernel in compiled}
    several = {"decode_skinny_kernel", "decode_grouped_up_kernel", "decode_group_kernel"}
    one = {"decode_gemv_kernel", "decode_expert_up_kernel", "decode_expert_down_kernel"}
    attend = "decode_attend_kernel" if tokens == 1 else "decode_attend_tokens_kernel"
    wanted = {"kda_step_fwd_kernel", attend, *(one if batch * tokens == 1 else several)}
    assert wanted <= {name for name, _ in compiled}
    for name, kernel in {kernel.hash: (name, kernel) for name, kernel in compiled}.values():
        registers, spilled = resources(kernel, target.backend)
        shared = kernel.metadata.shared
        step_name = f"{gpu:7} batch {batch:2} tokens {tokens}"
        print(f"{step_name} {name:28} registers {registers:3} spilled {spilled:4} shared {shared:6}")
        # Desktop GPUs (sm_86, sm_89, sm_120) take the sm_80 choices and have 99 KiB.
        assert shared <= (99 << 10 if gpu == "sm_80" else SHARED_LIMIT[gpu]), (name, shared)
        if gpu == "sm_90":
            # Bytes a thread. Attention of several tokens fills the registers with its sums: Triton 3.6 spills none of
            # it, Triton 3.9 some addresses.
            assert spilled <= (320 if name == "decode_attend_tokens_kernel" else 128), (name, spilled)
            if name in ("decode_gemv_kernel", "decode_expert_up_kernel", "decode_expert_down_kernel"):
                assert len(re.findall(r"ld\.global[.\w:]*\.v4", kernel.asm["ptx"])) >= 4, name
            if "skinny" in name or "grouped" in name or "attend" in name:
                assert "mma" in kernel.asm["ptx"], name


def test_numbers_of_rows_share_their_kernels(model, monkeypatch):
    """Sizes are arguments: within the same block sizes another number of rows compiles nothing."""
    kernels = []
    for batch, splits in ((40, 3), (47, 2)):
        step = DecodeStep(model, batch, 1)
        plan = step.plan
        plan._gpu, plan._pdl = "sm_90", True
        plan.partial = plan.partial.new_empty(batch, splits, *plan.partial.shape[2:])
        with compiling(KERNELS, TARGETS["sm_90"], monkeypatch) as compiled:
            step.plan.launch()
        kernels.append({kernel.hash for _, kernel in compiled})
    assert kernels[0] == kernels[1]


PACKED_KERNELS = [
    decode_packed_experts.decode_packed_up_kernel, decode_packed_experts.decode_packed_down_kernel,
    decode_packed_grouped.decode_packed_grouped_up_kernel, decode_packed_grouped.decode_packed_grouped_down_kernel,
    decode_dequantize.decode_dequantize_kernel,
]  # fmt: skip
_MIXED, _BLOCKS = "int4 experts, E4M3 by row", "E4M3 in blocks"
_FP8_BLOCKS = {**COMPRESSED["fp8 block"]["weights"], "block_structure": [128, 128]}
_PACKED = {
    _MIXED: {r"re:.*\.experts\..*": COMPRESSED["w4a16 g32"], "Linear": COMPRESSED["fp8 channel"]},
    _BLOCKS: {"Linear": {**COMPRESSED["fp8 block"], "weights": _FP8_BLOCKS}},
}


def packed_layer(formats):
    """A model of one layer with MLA and experts at the released shape, packed, without memory."""
    groups = {
        f"group_{i}": {**group, "targets": [target]} for i, (target, group) in enumerate(_PACKED[formats].items())
    }
    fields = {"quant_method": "compressed-tensors", "config_groups": groups, "format": "mixed-precision"}
    fields["ignore"] = ["lm_head", r"re:.*\.gate$"]
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "quantization_config": fields}
    layers["linear_attn_config"] = {**RELEASED_CONFIG["linear_attn_config"], "kda_layers": [], "full_attn_layers": [1]}
    with torch.device("meta"):
        return KimiLinearForCausalLM(KimiLinearConfig.from_dict({**RELEASED_CONFIG, **layers})).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("gpu", "batch", "formats"),
    [
        ("sm_90", 1, _MIXED), ("sm_90", 64, _MIXED), ("sm_100", 1, _BLOCKS), ("sm_86", 64, _BLOCKS),
        ("sm_89", 1, _MIXED), ("sm_120", 64, _MIXED), ("gfx942", 1, _MIXED),
    ],
)  # fmt: skip
def test_step_over_packed_weights_compiles_and_fits(gpu, batch, formats, monkeypatch):
    """No barrier hands inputs around among the threads of one token's products, but for the last sums."""
    target, model = {**TARGETS, **DESKTOPS}[gpu], packed_layer(formats)
    step = DecodeStep(model, batch, 1)
    step.plan._gpu = "sm_80" if gpu in DESKTOPS else gpu
    step.plan._pdl = gpu in ("sm_90", "sm_100")
    with compiling([*KERNELS, *PACKED_KERNELS], target, monkeypatch) as compiled:
        layer, plan = model.model.layers[0], step.plan
        plan._linear(plan.x, [layer.self_attn.q_proj], plan.p[:, : 32 * 192], layer.input_layernorm)
        plan._kv_b(layer.self_attn)
        plan._launch_mlp(layer)
    one = {"decode_packed_up_kernel", "decode_packed_down_kernel", "decode_gemv_kernel", "decode_dequantize_kernel"}
    several = {"decode_packed_grouped_up_kernel", "decode_packed_grouped_down_kernel", "decode_skinny_kernel"}
    assert (one if batch == 1 else several) <= {name for name, _ in compiled}
    for name, kernel in {kernel.hash: (name, kernel) for name, kernel in compiled if name in one | several}.values():
        registers, spilled = resources(kernel, target.backend)
        shared = kernel.metadata.shared
        print(f"{gpu:7} batch {batch:2} {name:34} registers {registers:3} spilled {spilled:4} shared {shared:6}")
        limit = DESKTOP_SHARED if gpu in DESKTOPS or gpu == "sm_80" else SHARED_LIMIT[gpu]
        assert shared <= limit and spilled <= 128, (name, shared, spilled)
        if gpu == "sm_90" and name in one - {"decode_dequantize_kernel"}:
            sums = 7 if kernel.metadata.num_warps > 1 else 0
            assert kernel.asm["ptx"].count("bar.sync") <= sums, name
