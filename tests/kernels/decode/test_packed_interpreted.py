"""
Products over packed weights against the dequantised weights in float64, in Triton's interpreter.

Bounds. Sums of n fp32 terms err by some sqrt(n) eps. One token's 4-bit products sum terms of up to 264 |x| that cancel
to some 5 |x| (kernels/decode/tiles.py), fifty times as much; several tokens' weights are exact in fp32. bf16: the
interpreter truncates where it casts, so each rounding on the way counts as one eps; several tokens round weights too.
"""

import pytest
import torch
import torch.nn.functional as F
from packed_weights import format_of, random_weight

pytest.importorskip("triton")

from kimi_linear.kernels.decode.configs import GROUP, GemvConfig, gemv_config, grouped_configs, skinny_config
from kimi_linear.kernels.decode.dequantize import decode_dequantize
from kimi_linear.kernels.decode.linear import decode_linear
from kimi_linear.kernels.decode.packed_experts import decode_packed_expert_down, decode_packed_expert_up
from kimi_linear.kernels.decode.packed_grouped import decode_packed_grouped_experts
from kimi_linear.kernels.decode.routing import decode_group, most_blocks
from kimi_linear.kernels.prompt import quantised_experts as prompt_experts
from kimi_linear.kernels.weights.handle import WeightHandle
from kimi_linear.kernels.weights.tiles import PackedStack, tile_format, tiles_of

NAN, EPS = float("nan"), torch.finfo(torch.float32).eps
# Layout, class of the GPU: sm_80 takes the bits of E4M3 apart, sm_90 has instructions.
READ = [
    ("w4a16 g32", "sm_90"), ("w4a16 g128", "sm_90"), ("w4a16 channel", "sm_90"), ("fp8 channel", "sm_90"),
    ("fp8 channel", "sm_80"), ("fp8 block", "sm_90"), ("fp8 block", "sm_80"), ("fp8 tensor static", "sm_90"),
]  # fmt: skip


def bound(dtype, roundings, one_token=False):
    return EPS * (50 if one_token else 10) if dtype == torch.float32 else roundings * torch.finfo(dtype).eps


def relative(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def randn(generator):
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


def guarded(*shape, dtype):
    """A tensor of NaN between bands of NaN, all of it."""
    whole = torch.full((torch.Size(shape).numel() + 128,), NAN, dtype=dtype)
    return whole, whole[64:-64].view(shape)


def untouched(whole):
    return bool(whole[:64].isnan().all() and whole[-64:].isnan().all())


def packed(layout, rows, columns, generator):
    """(handle, dequantised in float64)."""
    format = format_of(layout)
    held = random_weight(format, rows, columns, generator)
    handle = WeightHandle(format, (rows, columns), held["packed"], held[format.scale_name])
    return handle, handle.dequantize()


def stacked(layout, experts, rows, columns, parts, generator):
    """(stack of `parts` weights an expert one below the other, dequantised)."""
    pairs = [[packed(layout, rows, columns, generator) for _ in range(parts)] for _ in range(experts)]
    data, scale = (
        torch.stack([torch.cat([getattr(handle, name) for handle, _ in weights]) for weights in pairs])
        for name in ("data", "scale")
    )
    dense = torch.stack([torch.cat([exact for _, exact in weights]) for weights in pairs])
    return PackedStack(format_of(layout), data, scale), dense


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (65, torch.float32)])
@pytest.mark.parametrize(("layout", "gpu"), READ)
def test_projections_of_several_formats(layout, gpu, tokens, dtype, generator, randn):
    """Odd widths, a dense weight between packed ones, inputs at columns of their own, in place of the residual."""
    columns, sizes = (300, (8, 5)) if tokens == 1 else (72, (8, 3))
    handles = [packed(layout, rows, columns, generator) for rows in sizes]
    plain = randn(7, columns, dtype=dtype) * columns**-0.5
    weights = [handles[0][0], plain, handles[1][0]]
    dense = [handles[0][1], plain.double(), handles[1][1]]
    rows = sum(sizes) + 7
    x = randn(tokens, columns + 10, dtype=dtype)
    whole, y = guarded(tokens, rows, dtype=dtype)
    y.copy_(randn(tokens, rows))
    residual, options = y.double(), {}
    config = skinny_config(tokens, columns, rows, x.element_size())
    if tokens == 1:
        config, options = gemv_config(columns, rows), {"norm_weight": randn(columns, dtype=dtype), "eps": 1e-5}
    decode_linear(x, weights, y, config, residual=y, x_columns=(0, 1, 2), upcast=True, gpu=gpu, **options)
    parts = [x[:, i : i + columns].double() for i in range(3)]
    if options:
        parts = [x * (x.square().mean() + 1e-5).rsqrt() * options["norm_weight"].double() for x in parts]
    exact = torch.cat([part @ weight.T for part, weight in zip(parts, dense)], dim=1) + residual
    assert relative(y, exact) < bound(dtype, 2, one_token=tokens == 1)
    assert untouched(whole)


def expert(x, gate_up, down):
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "shared", "gpu"), [
    ("w4a16 g32", "dense", "sm_90"), ("w4a16 g32", None, "sm_90"), ("w4a16 g128", "fp8 channel", "sm_80"),
    ("fp8 block", "fp8 tensor static", "sm_90"), ("dense", "w4a16 g32", "sm_90"),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 4])
def test_experts(layout, shared, gpu, tokens, dtype, generator, randn):
    E, D, I, topk, eps = 6, 80, 40, 2, 1e-5

    def stack(rows, columns, parts):
        if layout != "dense":
            return stacked(layout, E, rows, columns, parts, generator)
        weight = randn(E, parts * rows, columns, dtype=dtype) * columns**-0.5
        return weight, weight.double()

    def linear(rows, columns):
        if shared != "dense":
            return packed(shared, rows, columns, generator)
        weight = randn(rows, columns, dtype=dtype) * columns**-0.5
        return weight, weight.double()

    (gate_up, gate_up_exact), (down, down_exact) = stack(I, D, 2), stack(D, I, 1)
    own = [linear(I, D), linear(I, D), linear(D, I)] if shared else None
    projections = own and tuple(weight for weight, _ in own)
    x, norm, logits = randn(tokens, D, dtype=dtype), randn(D, dtype=dtype), randn(tokens, E)
    scores = logits.double().sigmoid()
    best = scores.topk(topk).indices
    weights = scores.gather(1, best)
    normed = x.double() * (x.double().square().mean(1, keepdim=True) + eps).rsqrt() * norm.double()
    inputs = normed if tokens == 1 else x.double()
    exact = x.double().clone()
    for n in range(tokens):
        for e, weight in zip(best[n].tolist(), weights[n]):
            exact[n] += weight * expert(inputs[n], gate_up_exact[e], down_exact[e])
        if own:
            exact[n] += expert(inputs[n], torch.cat([own[0][1], own[1][1]]), own[2][1])
    choices = topk + (shared is not None)
    whole, y = guarded(tokens, D, dtype=dtype)
    y.copy_(x)
    whole_h, h = guarded(tokens * choices, I, dtype=dtype)
    if tokens == 1:
        chosen, held = torch.full((topk,), -7, dtype=torch.int32), torch.full((topk,), NAN)
        rule = {"factor": 1.0, "biased": False, "renormalize": False, "gpu": gpu}
        decode_packed_expert_up(
            y[0], logits[0], h, chosen, held, norm_weight=norm, eps=eps, bias=torch.zeros(E), gate_up=gate_up,
            shared=projections and projections[:2], configs=(GemvConfig(16, 128, 1, 1), GemvConfig(8, 128, 1, 1)),
            **rule,
        )  # fmt: skip
        assert sorted(chosen.tolist()) == sorted(best[0].tolist())
        decode_packed_expert_down(
            h, chosen, held, down, projections and projections[2], y[0], GemvConfig(32, 64, topk, 1), gpu=gpu
        )
    else:
        blocks = most_blocks(tokens, topk, E, GROUP)
        groups = [torch.full((n,), -7, dtype=torch.int32) for n in (blocks * GROUP, blocks, 1)]
        decode_group(best.int(), *groups, E)
        decode_packed_grouped_experts(
            x, weights.float(), y, groups=tuple(groups), gate_up=gate_up, down=down, shared=projections, h=h,
            z=torch.full((tokens * choices, D), NAN, dtype=dtype), configs=grouped_configs(D, I, x.element_size()),
            upcast=True, gpu=gpu,
        )  # fmt: skip
    assert relative(y, exact) < bound(dtype, 3, one_token=tokens == 1)
    assert untouched(whole) and untouched(whole_h)


@pytest.mark.parametrize(("layout", "gpu"), READ)
def test_dequantised_is_the_exact_path_s_number(layout, gpu, generator):
    stack, dense = stacked(layout, 3, 24, 72, 2, generator)
    for dtype in (torch.float32, torch.float16):
        whole, y = guarded(3, 24, 72, dtype=dtype)
        decode_dequantize(stack, y, 2, gpu)
        exact = dense.view(6, 24, 72)[2:5]
        assert torch.equal(y, exact.to(dtype)) if dtype == torch.float32 else relative(y, exact) < 2**-10
        assert untouched(whole)


@pytest.mark.parametrize("few", [512, 0])  # by the grouped kernels; by chunks of dequantised experts
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_prompt_s_experts(few, tokens, generator, randn, monkeypatch):
    monkeypatch.setattr(prompt_experts, "_FEW_TOKENS", few)
    monkeypatch.setattr(prompt_experts, "_CHUNK", 2)
    gate_up, gate_up_exact = stacked("w4a16 g32", 5, 32, 64, 2, generator)
    down, down_exact = stacked("w4a16 g32", 5, 64, 32, 1, generator)
    x, shared = (randn(tokens, 64, dtype=torch.bfloat16) for _ in range(2))
    weights = randn(tokens, 2)
    experts = randn(tokens, 5).topk(2).indices
    exact = shared.double().clone()
    for n in range(tokens):
        for e, weight in zip(experts[n].tolist(), weights[n]):
            exact[n] += weight * expert(x[n].double(), gate_up_exact[e], down_exact[e])
    y = prompt_experts.quantised_experts(x, experts, weights, gate_up, down, shared)
    assert y.shape == x.shape and (tokens == 0 or relative(y, exact) < bound(torch.bfloat16, 4))


def test_formats_without_tiles():
    for layout in ("w4a16 g32 asymmetric", "w3a16", "w8a16", "int8", "nvfp4", "mxfp4", "mxfp8"):
        assert tile_format(format_of(layout)) is None, layout
    handle = WeightHandle(format_of("nvfp4"), (8, 64), torch.zeros(8, 32, dtype=torch.uint8), torch.zeros(8, 4))
    with pytest.raises(ValueError, match="cannot read nvfp4-pack-quantized float4, groups of 16: ask tile_format"):
        tiles_of(handle)


def test_prompt_s_experts_serve_what_the_library_s_product_takes(generator, monkeypatch):
    """It wants rows of 16 bytes of both its operands: of D and of I numbers."""
    monkeypatch.setattr(prompt_experts, "fused_path_serves", lambda *tensors: True)
    for D, I, serves in ((64, 32, True), (60, 32, False), (64, 20, False)):
        gate_up, down = (stacked("w4a16 channel", 2, *shape, generator)[0] for shape in ((I, D, 2), (D, I, 1)))
        x = torch.zeros(3, D, dtype=torch.bfloat16)
        assert prompt_experts.quantised_experts_serve(x, gate_up, down) == serves, (D, I)
