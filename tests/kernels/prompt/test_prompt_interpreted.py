"""
The fused inference kernels against PyTorch in float64, in Triton's interpreter.

Bounds. The interpreter truncates where it casts to bf16, a GPU rounds: each rounding counts as one eps of the dtype.
fp32 sums of n terms err by some sqrt(n) eps.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from tiny_checkpoints import TINY_CONFIGS

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.kernels.gpu import availability as gpu_availability
from kimi_linear.kernels.prompt.attention_lse import attention_with_lse, merge_attention
from kimi_linear.kernels.prompt.expert_rows import combine_rows_fwd, route_fwd, scatter_rows_fwd, silu_mul_fwd
from kimi_linear.kernels.prompt.grouped_experts import expert_order, grouped_experts
from kimi_linear.kernels.prompt.merge_attention import merge_attention_fwd
from kimi_linear.kernels.prompt.mla_keys import mla_keys_fwd
from kimi_linear.kernels.prompt.norms import add_rms_norm_fwd, gated_rms_norm_fwd, rms_norm_fwd
from kimi_linear.kernels.prompt.short_convolution import causal_short_conv
from kimi_linear.kernels.prompt.short_convolution_kernel import short_conv_fwd
from kimi_linear.modeling.layers.moe import KimiTopkRouter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nan_allocations(monkeypatch):
    """No output may depend on what an allocation contained."""
    empty = torch.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(0)

    monkeypatch.setattr(torch, "empty", filled)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def check(got, want, roundings=2, scale=None):
    """`got` within so many roundings of its dtype of the float64 `want`, or of the terms `scale` that cancel in it."""
    assert got.shape == want.shape
    scale = want.abs() if scale is None else scale
    floor = scale.max() * 2**-4 if want.numel() else 0
    bound = roundings * torch.finfo(got.dtype).eps * scale.clamp(min=floor)
    assert ((got.double() - want).abs() <= bound).all()


def exact_norm(x, eps):
    return x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 100), (0, 64), (2, 0, 64), (2, 1, 2304)])
def test_rms_norm(shape, dtype):
    x, weight = randn(*shape, dtype=dtype) * 3, 1 + 0.1 * randn(shape[-1], dtype=dtype)
    y = rms_norm_fwd(x, weight, 1e-5)
    assert y.dtype == dtype and y.is_contiguous()
    check(y, weight.double() * exact_norm(x, 1e-5), roundings=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_strided_rows(dtype):
    rows = randn(2, 7, 96, dtype=dtype)
    weight = randn(64, dtype=dtype)
    for x in (rows[..., :64], rows[:, :5, 16:80], rows.transpose(1, 2)[:, :64].transpose(1, 2)):
        assert not x.is_contiguous()
        check(rms_norm_fwd(x, weight, 1e-5), weight.double() * exact_norm(x, 1e-5), roundings=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum(dtype):
    x, residual, weight = (
        randn(3, 5, 96, dtype=dtype),
        randn(3, 5, 2 * 96, dtype=dtype)[..., :96],
        randn(96, dtype=dtype),
    )
    y, total = add_rms_norm_fwd(x, residual, weight, 1e-5)
    check(total, residual.double() + x.double(), roundings=1)
    assert dtype == torch.bfloat16 or torch.equal(total, residual + x)
    check(y, weight.double() * exact_norm(total, 1e-5), roundings=3)


def test_half_precision_norm_rounds_before_the_weight():
    x, weight = randn(64, 256, dtype=torch.float16), randn(256, dtype=torch.float16)
    want = weight * exact_norm(x, 1e-5).half()
    # An fp32 value next to the middle of two fp16 numbers may go either way; nearly all are equal.
    assert (rms_norm_fwd(x, weight, 1e-5) == want).float().mean() > 0.99
    assert (weight.double() * exact_norm(x, 1e-5)).half().ne(
        want
    ).float().mean() > 0.05  # another order is another result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (2, 9, 3, 24), (0, 4, 16), (33, 128)])
def test_gated_norm(shape, dtype):
    x, gate = randn(*shape, dtype=dtype), randn(*shape, 2, dtype=dtype, seed=1)[..., 0] * 30
    weight = randn(shape[-1], dtype=dtype)
    check(gated_rms_norm_fwd(x, gate, weight, 1e-5), weight.double() * exact_norm(x, 1e-5) * gate.double().sigmoid())


def conv_case(B, T, D, W=4, dtype=torch.float32):
    return randn(B, T, D, dtype=dtype), randn(D, 1, W, dtype=dtype), randn(B, D, W - 1, dtype=dtype, seed=1)


def exact_conv(x, weight, window):
    """Outputs and new window in float64 by torch's convolution."""
    inputs = torch.cat([window.double(), x.double().transpose(1, 2)], dim=2)
    if x.shape[1] == 0:
        return x.double(), inputs
    y = F.silu(F.conv1d(inputs, weight.double(), groups=x.shape[2])).transpose(1, 2)
    return y, inputs[..., x.shape[1] :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("T", [0, 1, 2, 3, 15, 16, 17, 130])
def test_short_conv(T, W, dtype):
    x, weight, window = conv_case(2, T, 20, W, dtype)
    for given in (window, None):
        want, want_window = exact_conv(x, weight, window if given is not None else torch.zeros_like(window))
        y, new_window = short_conv_fwd(x, weight, given, None, None)
        check(y, want, roundings=2 if dtype != torch.float32 else 16)
        assert torch.equal(new_window.double(), want_window) and new_window.dtype == dtype


@pytest.mark.parametrize("T", [1, 6, 40])
def test_short_conv_stops_at_the_lengths(T):
    lengths = torch.tensor([0, 1, min(T, 2), T])
    x, weight, window = conv_case(4, T, 150)
    y, new_window = short_conv_fwd(x, weight, window, lengths, None)
    for row, n in enumerate(lengths.tolist()):
        want, want_window = exact_conv(x[row : row + 1, :n], weight, window[row : row + 1])
        check(y[row : row + 1, :n], want, roundings=16)
        assert torch.equal(new_window[row : row + 1].double(), want_window)


@pytest.mark.parametrize("with_window", [True, False])
@pytest.mark.parametrize("cuts", [[0, 0, 1, 6, 6, 9], [0, 33, 35, 100], [0], [0, 0], [0, 64]])
def test_packed_short_conv(cuts, with_window):
    x, weight, _ = conv_case(1, cuts[-1], 24)
    window = randn(len(cuts) - 1, 24, 3, seed=5)
    ends = torch.tensor(cuts, dtype=torch.int32)
    y, new_window = short_conv_fwd(x, weight, window if with_window else None, None, ends)
    assert y.isfinite().all() and new_window.isfinite().all()
    for n, (begin, end) in enumerate(zip(cuts, cuts[1:])):
        before = window[n : n + 1] if with_window else torch.zeros(1, 24, 3)
        want, want_window = exact_conv(x[:, begin:end], weight, before)
        check(y[:, begin:end], want, roundings=16)
        assert torch.equal(new_window[n : n + 1].double(), want_window)
    assert y.shape == x.shape and new_window.shape == window.shape


def test_short_conv_of_strided_input():
    packed = randn(2, 40, 3, 48)
    for x in (packed[:, :, 1], packed[:, 3:, 2, 5:30], packed.permute(0, 1, 3, 2)[..., 0]):
        _, weight, window = conv_case(2, 1, x.shape[2])
        check(short_conv_fwd(x, weight, window, None, None)[0], exact_conv(x, weight, window)[0], roundings=16)


def router(**changes):
    config = KimiLinearConfig.from_dict({**TINY_CONFIGS["hybrid"], **changes})
    module = KimiTopkRouter(config).eval()
    module.weight.data = randn(module.num_experts, config.hidden_size)
    module.e_score_correction_bias = randn(module.num_experts, seed=1) * 0.3
    return module


@torch.no_grad()
@pytest.mark.parametrize("N", [0, 1, 63, 65])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 256, "num_experts_per_token": 8},
        {"num_experts": 20, "num_experts_per_token": 1},
        {"moe_renormalize": False},
        {"router_weight_uses_score_correction_bias": True},
    ],
)
def test_route(N, changes):
    module = router(**changes)
    x = randn(N, module.weight.shape[1])
    logits, want_weights, want_experts = module(x)  # on a CPU the module takes PyTorch's operators
    weights, experts = route_fwd(
        logits,
        module.e_score_correction_bias,
        module.top_k,
        module.renormalize,
        module.scaling_factor,
        module.biased_weights,
    )
    order = want_experts.argsort(1)
    assert torch.equal(experts.sort(1).values, want_experts.gather(1, order))
    torch.testing.assert_close(weights.gather(1, experts.argsort(1)), want_weights.gather(1, order), rtol=1e-5, atol=0)


def test_route_stays_inside_for_nan_and_infinite_logits():
    logits = torch.full((4, 20), float("nan"))
    logits[1] = float("inf")
    logits[2] = float("-inf")
    logits[3, 7] = 1.0
    weights, experts = route_fwd(logits, torch.zeros(20), 3, True, 2.0, False)
    assert ((experts >= 0) & (experts < 20)).all()
    assert experts[3].tolist() == [0, 1, 2]  # NaN is above all numbers, and shows in the weights
    assert experts[1].unique().numel() == experts[2].unique().numel() == 3
    assert weights[[0, 3]].isnan().all() and weights[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "k"), [(0, 16, 2), (1, 16, 1), (65, 100, 3), (9, 2304, 8)])
def test_scatter_and_combine(N, H, k, dtype):
    x = randn(N, 2 * H, dtype=dtype)[:, :H]
    position = torch.randperm(N * k, generator=torch.Generator().manual_seed(N)).int().view(N, k)
    rows = scatter_rows_fwd(x, position)
    assert rows.shape == (N * k, H)
    assert torch.equal(rows[position.long()], x[:, None].expand(N, k, H))
    outputs, weights, shared = (
        randn(N * k, H, dtype=dtype, seed=1),
        randn(N, k).abs(),
        randn(N, 2 * H, dtype=dtype)[:, H:],
    )
    routed = (outputs[position.long()].double() * weights.double()[..., None]).sum(1)
    check(combine_rows_fwd(outputs, position, weights, None), routed, roundings=2 if dtype != torch.float32 else 8)
    both = combine_rows_fwd(outputs, position, weights, shared)
    scale = routed.abs() + shared.double().abs()
    check(both, routed + shared.double(), roundings=3 if dtype != torch.float32 else 8, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (2, 3, 100), (5, 1500)])
def test_silu_mul(shape, dtype):
    both = randn(*shape[:-1], 2 * shape[-1], dtype=dtype) * 4
    gate, up = both.chunk(2, dim=-1)
    y = silu_mul_fwd(gate, up)
    assert y.is_contiguous()
    rounded = F.silu(gate.double()).to(dtype)
    check(y, rounded.double() * up.double(), roundings=3 if dtype != torch.float32 else 8)


@pytest.mark.parametrize(("N", "E", "k"), [(0, 4, 2), (1, 8, 3), (50, 8, 3), (40, 300, 4)])
def test_grouped_experts(N, E, k):
    x = randn(N, 32, dtype=torch.bfloat16)
    gate_up, down = randn(E, 48, 32, dtype=torch.bfloat16) * 0.2, randn(E, 32, 24, dtype=torch.bfloat16) * 0.2
    experts = torch.rand(N, E, generator=torch.Generator().manual_seed(1)).topk(k).indices
    weights, shared = randn(N, k).abs(), randn(N, 32, dtype=torch.bfloat16, seed=3)
    position, offsets = expert_order(experts, E)
    flat = experts.flatten()
    assert torch.equal(flat[position.flatten().argsort()], flat.sort().values)
    assert torch.equal(offsets.long(), torch.bincount(flat, minlength=E).cumsum(0))
    y = grouped_experts(x, experts, weights, gate_up, down, shared)
    want = shared.double()
    for slot in range(k):
        gate, up = torch.einsum("nh,nih->ni", x.double(), gate_up.double()[experts[:, slot]]).chunk(2, dim=1)
        hidden = F.silu(gate) * up
        output = torch.einsum("ni,nhi->nh", hidden, down.double()[experts[:, slot]])
        want = want + weights.double()[:, slot, None] * output
    assert y.shape == want.shape
    # Five roundings to bf16, one behind the other.
    assert N == 0 or (y.double() - want).norm() / want.norm() < 5 * 2**-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 63, 65])
def test_merge_attention(T, dtype):
    B, H, V = 2, 3, 20
    o, lse = randn(B, T, H, V), randn(B, H, T)
    part, part_lse = randn(B, H, T, V, dtype=dtype).transpose(1, 2), randn(B, H, T, seed=2) * 50
    total = torch.logaddexp(lse.double(), part_lse.double())
    old, new = ((x.double() - total).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
    want = o.double() * old + part.double() * new
    plain, plain_lse = o.clone(), lse.clone()
    merge_attention(plain, plain_lse, part, part_lse)
    merge_attention_fwd(o, lse, part, part_lse)
    for got in (o, plain):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for got in (lse, plain_lse):
        torch.testing.assert_close(got.double(), total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "H", "N", "V", "S"), [(1, 0, 2, 8, 8, 4), (2, 3, 5, 24, 16, 10), (1, 2, 32, 128, 128, 64)]
)
def test_mla_keys(B, T, H, N, V, S, dtype):
    expanded, rows = randn(B, T, H, N + V, dtype=dtype), randn(B, T + 2, 40 + S, dtype=dtype)
    shared = rows[:, 1 : T + 1, 40:]
    want = torch.cat([expanded[..., :N], shared[:, :, None].expand(-1, -1, H, -1)], dim=-1)
    assert torch.equal(mla_keys_fwd(expanded, shared, N), want)


def test_attention_over_blocks_equals_attention_over_all():
    query, key, value = randn(2, 3, 40, 24).double(), randn(2, 3, 100, 24).double(), randn(2, 3, 100, 16).double()
    want = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    o, lse = attention_with_lse(query, key[:, :, :60], value[:, :, :60], causal=False, scale=0.3)
    o = o.transpose(1, 2).contiguous()
    for block in (slice(60, 61), slice(61, 100)):
        part, part_lse = attention_with_lse(query, key[:, :, block], value[:, :, block], causal=False, scale=0.3)
        merge_attention(o, lse, part.transpose(1, 2), part_lse)
    torch.testing.assert_close(o.transpose(1, 2), want)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_model_on_the_fused_path(monkeypatch, load_tiny, random_ids, padded):
    """Every kernel inside the fp32 model, against PyTorch's operators."""
    model = load_tiny("hybrid")
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 1 - padded
    want = model(ids, attention_mask=mask)
    calls = []
    monkeypatch.setattr(gpu_availability, "device_serves", lambda device: calls.append(device) or True)
    got = model(ids, attention_mask=mask)
    assert calls
    valid = mask.bool()
    torch.testing.assert_close(got.logits[valid], want.logits[valid], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(got.past_key_values.layers, want.past_key_values.layers):
        if hasattr(ours, "window"):
            torch.testing.assert_close(ours.window, theirs.window, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.state, theirs.state, rtol=1e-4, atol=1e-4)


def test_gradients_take_the_other_path(monkeypatch):
    monkeypatch.setattr(gpu_availability, "device_serves", lambda device: True)
    x, weight, _ = conv_case(1, 5, 8)
    causal_short_conv(x.requires_grad_(), weight)[0].sum().backward()
    assert x.grad is not None
