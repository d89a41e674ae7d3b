"""
Gradients of the Triton kernels against autograd of the float64 recurrence, in Triton's interpreter: fp32 to fp32
rounding, small shapes.
"""

import pytest
import torch

pytest.importorskip("triton")

from test_kda_interpreted import GATES, make, nan_allocations
from torch.utils.checkpoint import checkpoint

from kimi_linear.kernels.kda import backward
from kimi_linear.kernels.kda.operators import chunk_kda
from kimi_linear.kernels.kda.reference import recurrent_kda_reference

nan_allocations = nan_allocations  # a fixture for this file too

# Norms below which a gradient counts as this large. One step's decay counts for at least 2^-48 (kda_gate_log2), so of a
# state's gradient that is exactly nothing 4e-15 may be left. Gates' gradients keep the fp32 rounding (6e-8) of sums of
# order 1 that cancel, times log decays of up to 33, and A_log's is the sum of some thousand of them.
FLOORS = {"initial_state": 1e-9, "g": 1e-2, "dt_bias": 1e-2, "A_log": 0.2}


def run(op, x, weights, initial_state=None, **kwargs):
    """Gradients by name of the sum of outputs and final states times `weights`."""
    x = {name: t.detach().requires_grad_() for name, t in x.items()}
    if initial_state is not None:
        kwargs["initial_state"] = initial_state.detach().requires_grad_()
    o, state = op(**x, **kwargs)
    loss = (o.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    leaves = x if initial_state is None else {**x, "initial_state": kwargs["initial_state"]}
    if not loss.requires_grad:  # the oracle's, of no sequences
        return {name: torch.zeros_like(t) for name, t in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))


def ours(**kwargs):
    return chunk_kda(**kwargs, output_final_state=True)


def gradients(x, state=None, dstate=True, **kwargs):
    """Ours and the oracle's; `dstate`: whether the final state is asked for too."""
    gen = torch.Generator().manual_seed(5)
    (B, T, H, K), V = x["q"].shape, x["v"].shape[-1]
    N = len(kwargs["cu_seqlens"]) - 1 if "cu_seqlens" in kwargs else B
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    weights = draw(B, T, H, V), draw(N, H, K, V) * dstate
    double = {name: t.double() for name, t in x.items()}
    exact = run(recurrent_kda_reference, double, weights, None if state is None else state.double(), **kwargs)
    return run(ours, x, weights, state, **kwargs), exact


def relative(x, exact, floor):
    return float((x.double() - exact).norm() / exact.norm().clamp(min=floor)) if exact.numel() else 0.0


def check(x, bound=2e-5, state=None, **kwargs):
    found, exact = gradients(x, state, **kwargs)
    for name, wanted in exact.items():
        like = x.get(name, state)
        assert found[name].shape == like.shape and found[name].dtype == like.dtype
        assert relative(found[name], wanted, FLOORS.get(name, 1e-30)) < bound, name


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate):
    check(make(1, 65, 1, 32, 16, gate), state=torch.randn(1, 1, 32, 16))


@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 32, 33, 63, 64, 100])
def test_lengths(T):
    check(make(1, T, 1, 16, 16, "mixed"), dstate=T % 2 == 0)


@pytest.mark.parametrize("T", [0, 5])
def test_no_tokens_or_no_rows(T):
    x = make(1, T, 2, 16, 16) if T == 0 else {n: t[:0] if t.ndim > 2 else t for n, t in make(1, T, 2, 16, 16).items()}
    N = x["q"].shape[0]
    found, exact = gradients(x, torch.randn(N, 2, 16, 16))
    for name in exact:
        assert torch.equal(found[name], exact[name].float()), name


@pytest.mark.parametrize(("K", "V"), [(16, 32), (24, 40), (64, 16)])
def test_head_sizes_and_rows(K, V):
    check(make(2, 40, 2, K, V, "mixed"), state=torch.randn(2, 2, K, V))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["tame", "mixed", "steep"])
def test_half_precision(dtype, gate):
    # As the forward's bound: products of operands rounded to 2^-9 (bf16) or 2^-12 (fp16, and its own gradients).
    check(make(1, 70, 2, 32, 32, gate, dtype), bound=4e-2 if dtype == torch.bfloat16 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_gates_have_no_gradient_and_no_nan(dtype):
    """Log decays of -1e4 and beyond between tame tokens: gradients are what they are without the decayed past."""
    x = make(1, 70, 1, 16, 16, "tame", dtype)
    x["g"][:, :40:3] = 6e4 if dtype != torch.float16 else 6e3
    x["g"][..., 3] = float("-inf")
    x["A_log"] = torch.tensor([5.3])
    state = torch.randn(1, 1, 16, 16)
    check(x, state=state, bound={torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype])
    found, _ = gradients(x, state)
    assert all(t.isfinite().all() for t in found.values())
    assert not found["g"][:, :40:3].any() and not found["g"][..., 3].any()
    found["initial_state"][..., 3, :] = 0  # the channel that nothing decays
    assert float(found["initial_state"].abs().max()) < 1e-9


@pytest.mark.parametrize("cuts", [[0, 0, 33, 34, 70, 70], [0, 1, 2, 3], [0], [0, 0], [0, 65]])
def test_packed(cuts):
    x = make(1, cuts[-1], 2, 16, 16, "mixed")
    state = torch.randn(len(cuts) - 1, 2, 16, 16)
    check(x, state=state, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))


def test_padding_changes_nothing():
    """What -inf logits pad has no gradient, and the other tokens have the same."""
    x = make(1, 40, 1, 16, 16, "mixed")
    padded = {name: torch.cat([t, t], 1) if t.ndim > 2 else t for name, t in x.items()}
    padded["g"][:, 40:] = padded["beta"][:, 40:] = float("-inf")
    weights = torch.zeros(1, 80, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, 16, dtype=torch.float64)
    weights[0][:, :40] = torch.randn(1, 40, 1, 16, dtype=torch.float64)
    short = run(ours, x, (weights[0][:, :40], weights[1]))
    for name, found in run(ours, padded, weights).items():
        if found.ndim > 2:
            assert not found[:, 40:].any(), name
            found = found[:, :40]
        assert relative(found, short[name].double(), 1e-30) < 1e-6, name


def test_strided_views_scale_and_expanded_gradient():
    x = make(1, 40, 2, 32, 16, "mixed", packed_views=True)
    check(x, scale=0.3)
    o, _ = chunk_kda(**{name: t.requires_grad_() for name, t in x.items()})
    o.sum().backward()  # its gradient is one element with strides 0
    assert x["q"].grad is not None and x["q"].grad.isfinite().all()


def test_no_scale_no_gradient_of_q():
    found, _ = gradients(make(1, 33, 1, 16, 16), scale=0.0)
    assert not found["q"].any() and found["k"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_change_nothing(dtype, monkeypatch):
    """Cut into segments, the bits of all but the sums over tokens are those of one."""
    x, state = make(2, 150, 1, 16, 16, "mixed", dtype), torch.randn(2, 1, 16, 16)
    whole, _ = gradients(x, state)
    monkeypatch.setattr(backward, "SEGMENT_TOKENS", 128)
    parts, _ = gradients(x, state)
    assert backward.segment_count(2, 150, False) == 3
    for name in whole:
        if name in ("A_log", "dt_bias"):  # summed in another order
            assert torch.allclose(whole[name], parts[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(whole[name], parts[name]), name


def test_two_runs_give_the_same_bits():
    x = make(1, 70, 2, 16, 16, "mixed", torch.bfloat16)
    first, second = gradients(x)[0], gradients(x)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_asked_for():
    """A frozen gate, and a loss that asks for the state alone."""
    x, state = make(1, 33, 1, 16, 16), torch.randn(1, 1, 16, 16, requires_grad=True)
    x["v"].requires_grad_()
    _, final = chunk_kda(**x, initial_state=state, output_final_state=True)
    final.sum().backward()
    exact_v, exact_state = x["v"].detach().double().requires_grad_(), state.detach().double().requires_grad_()
    recurrent_kda_reference(**{**x, "v": exact_v}, initial_state=exact_state)[1].sum().backward()
    assert relative(x["v"].grad, exact_v.grad, 1e-30) < 1e-5
    assert relative(state.grad, exact_state.grad, 1e-30) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    x = {name: t.requires_grad_() for name, t in make(1, 33, 1, 16, 16).items()}
    names = list(x)
    plain = torch.autograd.grad(chunk_kda(**x)[0].square().sum(), list(x.values()))
    o = checkpoint(lambda *values: chunk_kda(**dict(zip(names, values)))[0], *x.values(), use_reentrant=use_reentrant)
    o.square().sum().backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(plain, x.values()))


def test_compiled_whole():
    """One graph forward and one backward, with the bits of eager execution."""
    x = {name: t.requires_grad_() for name, t in make(1, 33, 1, 16, 16).items()}
    compiled = torch.compile(lambda **x: chunk_kda(**x)[0].square().sum(), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(chunk_kda(**x)[0].square().sum(), list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(eager, torch.autograd.grad(compiled(**x), list(x.values()))))


def test_nothing_outside_the_inputs_is_read_or_written():
    """Inputs inside larger tensors of huge values, and gradients that don't depend on them."""
    x = make(1, 37, 1, 24, 16, "mixed")
    plain, _ = gradients(x)
    guarded = {}
    for name, t in x.items():
        big = torch.full([n + 4 for n in t.shape], 1e30)
        inner = big[tuple(slice(2, 2 + n) for n in t.shape)]
        inner.copy_(t)
        guarded[name] = inner
    found, _ = gradients(guarded)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
