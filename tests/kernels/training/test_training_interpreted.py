"""
The backwards of the fused passes against autograd in float64, in Triton's interpreter.

Bounds. A gradient is compared over the whole tensor, relative to its norm. Each rounding to a dtype in a row (the
interpreter truncates where it casts to bf16) counts as one eps of it.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from torch.utils.checkpoint import checkpoint

from kimi_linear.kernels.prompt.expert_rows import route_fwd, silu_mul_fwd
from kimi_linear.kernels.prompt.norms import add_rms_norm_fwd, gated_rms_norm_fwd, rms_norm_fwd
from kimi_linear.kernels.prompt.short_convolution import causal_short_conv
from kimi_linear.kernels.prompt.short_convolution_kernel import short_conv_fwd
from kimi_linear.kernels.training import norms as training_norms
from kimi_linear.kernels.training import short_convolution as training_short_convolution
from kimi_linear.kernels.training.expert_adapters import LowRank, adapted_experts
from kimi_linear.kernels.training.grouped_experts import grouped_experts_with_gradients
from kimi_linear.kernels.training.linear_cross_entropy import cross_entropy_in_place
from kimi_linear.kernels.training.routing import router_logits

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


def gradients(op, inputs, weights):
    """Those of all `inputs` for a loss that weighs the outputs of `op`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, leaves, [w.to(o.dtype) for w, o in zip(weights, outputs)])


def check(op, exact_op, inputs, weights, roundings=3):
    """Gradients of `op` against those of `exact_op` in float64; twice, for the same bits."""
    found, again = (gradients(op, inputs, weights) for _ in range(2))
    exact = gradients(exact_op, [x.double() for x in inputs], [w.double() for w in weights])
    for x, ours, repeated, wanted in zip(inputs, found, again, exact):
        assert ours.shape == x.shape and ours.dtype == x.dtype
        assert torch.equal(ours, repeated)
        bound = max(roundings * torch.finfo(weights[0].dtype).eps, 1e-6)
        assert (ours.double() - wanted).norm() <= bound * wanted.norm()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (2, 3, 100), (3, 1500)])
def test_silu_mul(shape, dtype):
    gate, up = randn(*shape[:-1], 2 * shape[-1], dtype=dtype).mul(4).chunk(2, dim=-1)
    check(silu_mul_fwd, lambda g, u: F.silu(g) * u, (gate, up), [randn(*shape, dtype=dtype, seed=1)])


def test_silu_mul_at_extremes():
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    found = check(silu_mul_fwd, lambda g, u: F.silu(g) * u, (gate, torch.ones(5)), [torch.ones(5)])
    assert all(g.isfinite().all() for g in found)


def exact_norm(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


NORM_SHAPES = [(0, 8), (1, 5), (5, 24)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norms(shape, dtype, monkeypatch):
    """Rows of a wider tensor, as latents are, and the gradient of the sum beside that of its norm; few programs."""
    monkeypatch.setattr(training_norms, "_PROGRAMS", 2)
    x, dy = randn(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 3:], randn(*shape, dtype=dtype, seed=1)
    weight, residual = randn(shape[-1], dtype=dtype), randn(*shape, dtype=dtype, seed=2)
    check(lambda x, w: rms_norm_fwd(x, w, 1e-5), exact_norm, (x, weight), [dy])
    check(
        lambda x, r, w: add_rms_norm_fwd(x, r, w, 1e-5),
        lambda x, r, w: (exact_norm(x + r, w), x + r),
        (x, residual, weight),
        [dy, randn(*shape, dtype=dtype, seed=4)],
    )
    check(
        lambda x, g, w: gated_rms_norm_fwd(x, g, w, 1e-5),
        lambda x, g, w: exact_norm(x, w) * g.sigmoid(),
        (x, residual, weight),
        [dy],
    )


def test_a_norm_whose_sum_alone_is_used():
    x, residual, weight = randn(3, 8).requires_grad_(), randn(3, 8, seed=1).requires_grad_(), torch.ones(8)
    add_rms_norm_fwd(x, residual, weight.requires_grad_(), 1e-5)[1].sum().backward()
    assert (x.grad == 1).all() and (residual.grad == 1).all() and weight.grad is None


def conv_ops(lengths=None, cu_seqlens=None):
    """(the kernels, PyTorch): (y, new window) of x and weight."""

    def ours(x, weight):
        return short_conv_fwd(x, weight, None, lengths, cu_seqlens)

    def exact(x, weight):
        return causal_short_conv(x, weight, lengths=lengths, cu_seqlens=cu_seqlens)

    return ours, exact


@pytest.mark.parametrize(
    ("B", "T", "D", "W", "dtype"),
    [
        (1, 1, 5, 4, torch.float32),
        (2, 7, 130, 4, torch.bfloat16),
        (1, 19, 8, 4, torch.float16),
        (2, 9, 8, 1, torch.float32),
        (1, 9, 8, 6, torch.float32),
    ],
)
def test_short_convolution(B, T, D, W, dtype, monkeypatch):
    """Strided inputs, the gradient of the window that a sequence leaves, and more tokens than a program has."""
    monkeypatch.setattr(training_short_convolution, "_PROGRAM_TOKENS", 8)
    x, weight = randn(B, T, D + 3, dtype=dtype)[..., 3:], randn(D, 1, W, dtype=dtype)
    weights = [randn(B, T, D, dtype=dtype, seed=1), randn(B, D, W - 1, dtype=dtype, seed=2)]
    check(*conv_ops(), (x, weight), weights)


def test_short_convolution_without_tokens():
    x, weight = randn(2, 0, 8).requires_grad_(), randn(8, 1, 4).requires_grad_()
    y, window = short_conv_fwd(x, weight, None, None, None)
    (y.sum() + window.sum()).backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.parametrize("cuts", [[0, 0, 1, 3, 9, 9, 12], [0, 2, 4, 6, 12]])
def test_short_convolution_packed(cuts):
    weights = [randn(1, 12, 8, seed=1), randn(len(cuts) - 1, 8, 3, seed=2)]
    ops = conv_ops(cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    check(*ops, (randn(1, 12, 8), randn(8, 1, 4)), weights)


def test_short_convolution_packed_over_several_programs(monkeypatch):
    """Sequences that end and begin at, just before and just after the first token of a program."""
    monkeypatch.setattr(training_short_convolution, "_PROGRAM_TOKENS", 8)
    cuts = [0, 7, 8, 14, 17, 25, 26]
    weights = [randn(1, 26, 8, seed=1), randn(len(cuts) - 1, 8, 3, seed=2)]
    ops = conv_ops(cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    check(*ops, (randn(1, 26, 8), randn(8, 1, 4)), weights)


def test_short_convolution_of_padded_rows():
    weights = [randn(4, 6, 8, seed=1), randn(4, 8, 3, seed=2)]
    check(*conv_ops(lengths=torch.tensor([0, 2, 6, 4])), (randn(4, 6, 8), randn(8, 1, 4)), weights)


def test_the_window_of_a_convolution_alone():
    ours, exact = conv_ops()
    x, weight = randn(1, 5, 8), randn(8, 1, 4)
    check(lambda x: ours(x, weight)[1], lambda x: exact(x, weight.double())[1], (x,), [randn(1, 8, 3)])


def exact_experts(x, experts, weights, gate_up, down, shared):
    y = 0 if shared is None else shared
    for slot in range(experts.shape[1]):
        gate, up = torch.einsum("nd,nid->ni", x, gate_up[experts[:, slot]]).chunk(2, dim=1)
        output = torch.einsum("ni,ndi->nd", F.silu(gate) * up, down[experts[:, slot]])
        y = y + weights[:, slot, None] * output
    return y


def expert_inputs(N, E, k, D=32, I=24):
    """x, weights, stacked experts, the shared experts' output; and which experts were chosen (never the last)."""
    gate_up, down = randn(E, 2 * I, D, dtype=torch.bfloat16) * 0.2, randn(E, D, I, dtype=torch.bfloat16) * 0.2
    experts = torch.rand(N, E - 1, generator=torch.Generator().manual_seed(1)).topk(k).indices
    weights, shared = randn(N, k).abs(), randn(N, D, dtype=torch.bfloat16, seed=3)
    return (randn(N, D, dtype=torch.bfloat16), weights, gate_up, down, shared), experts


@pytest.mark.parametrize(("N", "E", "k"), [(1, 8, 3), (12, 8, 3), (5, 300, 4)])
def test_grouped_experts(N, E, k):
    inputs, experts = expert_inputs(N, E, k)

    def ours(x, weights, *rest):
        return grouped_experts_with_gradients(x, experts, weights, *rest)

    def exact(x, weights, *rest):
        return exact_experts(x, experts, weights, *rest)

    found = check(ours, exact, inputs, [randn(N, 32, dtype=torch.bfloat16, seed=5)], roundings=5)
    assert not found[2][-1].any() and not found[3][-1].any()  # nobody chose the last


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_adapted_experts(which):
    """Against experts whose weights have the adapters added; factors in fp32, B with its experts last, as in PEFT."""
    (x, weights, gate_up, down, shared), experts = expert_inputs(9, 8, 3)
    factors = [
        randn(8, 8, 32) * 0.2,
        randn(48, 8, 8) * 0.2,
        randn(8, 8, 24, seed=1) * 0.2,
        randn(32, 8, 8, seed=1) * 0.2,
    ]

    def parts(a1, b1, a2, b2):
        return [(a1, b1.permute(2, 0, 1)), (a2, b2.permute(2, 0, 1))]

    def ours(x, weights, shared, *factors):
        adapters = [LowRank(*pair, 0.5) if on else None for pair, on in zip(parts(*factors), which)]
        y = adapted_experts(x, experts, weights, gate_up, down, shared, *adapters)
        return y, torch.stack([f.sum() for f in factors])  # so that all have a gradient

    def exact(x, weights, shared, *factors):
        adapted = [
            w.double() + 0.5 * b @ a if on else w.double()
            for w, (a, b), on in zip((gate_up, down), parts(*factors), which)
        ]
        return exact_experts(x, experts, weights, *adapted, shared), torch.stack([f.sum() for f in factors])

    check(ours, exact, (x, weights, shared, *factors), [randn(9, 32, dtype=torch.bfloat16, seed=5), torch.zeros(4)], 6)


def test_grouped_experts_without_tokens():
    inputs, experts = expert_inputs(0, 4, 2)
    leaves = [x.requires_grad_() for x in inputs]
    grouped_experts_with_gradients(leaves[0], experts, *leaves[1:]).sum().backward()
    assert not leaves[2].grad.any() and not leaves[3].grad.any()


def test_only_the_gradients_that_are_wanted():
    """Frozen experts, and no shared expert."""
    (x, weights, gate_up, down, _), experts = expert_inputs(9, 8, 3)
    x.requires_grad_()
    y = grouped_experts_with_gradients(x, experts, weights, gate_up, down, None)
    y.float().square().sum().backward()
    exact = x.detach().double().requires_grad_()
    exact_experts(exact, experts, *(t.double() for t in (weights, gate_up, down)), None).square().sum().backward()
    assert (x.grad.double() - exact.grad).norm() <= 6 * 2**-7 * exact.grad.norm()
    assert gate_up.grad is None and down.grad is None and weights.grad is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_grouped_experts_checkpointed_and_compiled(use_reentrant):
    """Recomputed, and as one graph: the bits of eager execution."""
    inputs, experts = expert_inputs(3, 8, 3)
    inputs = [x.requires_grad_() for x in inputs]

    def op(x, weights, gate_up, down, shared):
        return grouped_experts_with_gradients(x, experts, weights, gate_up, down, shared).float().square().sum()

    plain = torch.autograd.grad(op(*inputs), inputs)
    if use_reentrant:
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(compiled(*inputs), inputs)))
    checkpoint(op, *inputs, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(plain, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 4096, 9000])
def test_cross_entropy_in_place(V, dtype):
    """Rows of ordinary, huge and -inf logits; the last is not counted."""
    logits = randn(4, V, dtype=dtype) * 3
    logits[1] *= 1e3
    logits[2, 1:] = float("-inf")
    labels = torch.tensor([V - 1, V // 2, 0, -100])
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    losses = cross_entropy_in_place(logits, labels, -100)
    assert torch.allclose(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (logits.double() - gradient).norm() <= max(2 * torch.finfo(dtype).eps, 1e-5) * gradient.norm() + 1e-30
    assert not logits[3].any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("N", "E", "k"), [(0, 4, 2), (1, 5, 1), (9, 8, 3), (7, 300, 8)])
def test_route(N, E, k, renormalize, biased):
    logits, bias = randn(N, E) * 3, randn(E, seed=1) * 0.1
    experts = route_fwd(logits, bias, k, renormalize, 2.4, biased)[1]

    def exact(logits):
        scores = logits.sigmoid()
        values = (scores + bias.double() if biased else scores).gather(1, experts)
        return 2.4 * (values / values.sum(1, keepdim=True) if renormalize else values)

    # Renormalised, a weight's gradient is what is left of its own and the mean: some of the rounding's digits cancel.
    check(lambda x: route_fwd(x, bias, k, renormalize, 2.4, biased)[0], exact, (logits,), [randn(N, k, seed=2)], 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_logits(dtype):
    inputs = randn(9, 16, dtype=dtype), randn(5, 16, dtype=dtype)
    found = gradients(router_logits, inputs, [randn(9, 5)])
    exact = gradients(lambda h, w: h @ w.t(), [x.double() for x in inputs], [randn(9, 5).double()])
    for ours, wanted in zip(found, exact):
        assert ours.dtype == dtype
        assert (ours.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()
