"""Triton KDA, forward and backward, on a CUDA device: what can't be shown without one. `pytest -m gpu`."""

import pytest
import torch

from kimi_linear.kernels.kda import backward
from kimi_linear.kernels.kda import operators as kda_operators
from kimi_linear.kernels.kda.inter import kda_inter_fwd_kernel
from kimi_linear.kernels.kda.intra import kda_intra_fwd_kernel
from kimi_linear.kernels.kda.operators import chunk_kda
from kimi_linear.kernels.kda.reference import recurrent_kda_reference

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Products round their operands: a handful of roundings in a row, of bf16 (2^-9) or of tf32 (2^-12, fp16 inputs).
BOUNDS = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-5}


def inputs(B, T, H=2, K=128, V=128, dtype=torch.bfloat16, wild=0.05):
    """Arguments of chunk_kda; `wild` of the gates decay by hundreds of nats a step."""
    gen = torch.Generator().manual_seed(T)

    def draw(*shape):
        return torch.randn(*shape, generator=gen)

    g = torch.where(torch.rand(B, T, H, K, generator=gen) < wild, 100.0, draw(B, T, H, K) - 3)
    x = {"q": draw(B, T, H, K), "k": draw(B, T, H, K), "v": draw(B, T, H, V), "g": g, "beta": draw(B, T, H)}
    x = {name: t.to(DEVICE, dtype) for name, t in x.items()}
    gates = {"A_log": draw(H).to(DEVICE), "dt_bias": draw(H * K).to(DEVICE)}
    return x | gates


def check(x, bound, **kwargs):
    o, state = chunk_kda(**x, output_final_state=True, **kwargs)
    exact, exact_state = recurrent_kda_reference(**x, **kwargs)
    for ours, wanted in ((o, exact), (state, exact_state)):
        assert (ours.double() - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("wild", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130, 300])
def test_lengths(T, wild):
    check(inputs(2, T, wild=wild), BOUNDS[torch.bfloat16], initial_state=torch.randn(2, 2, 128, 128, device=DEVICE))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("K", "V"), [(16, 16), (64, 64), (100, 40), (128, 128), (256, 256)])
def test_head_sizes_and_dtypes(K, V, dtype):
    check(inputs(1, 150, K=K, V=V, dtype=dtype), BOUNDS[dtype])


def test_packed():
    cu_seqlens = torch.tensor([0, 0, 1, 65, 65, 200, 300], dtype=torch.int32, device=DEVICE)
    state = torch.randn(6, 2, 128, 128, device=DEVICE)
    check(inputs(1, 300), BOUNDS[torch.bfloat16], cu_seqlens=cu_seqlens, initial_state=state)


def test_wrong_boundaries_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 9, 5\]"):
        chunk_kda(**inputs(1, 5), cu_seqlens=torch.tensor([0, 9, 5], device=DEVICE))


def test_reruns_are_identical():
    x = inputs(2, 1000, H=8)
    first = chunk_kda(**x, output_final_state=True)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, chunk_kda(**x, output_final_state=True)))


def test_lengths_share_compiled_kernels():
    def versions():
        kernels = (kda_intra_fwd_kernel, kda_inter_fwd_kernel)
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    chunk_kda(**inputs(1, 100))
    compiled = versions()
    for B, T in ((1, 101), (2, 333), (3, 4096), (1, 9000)):
        chunk_kda(**inputs(B, T))
    assert versions() == compiled


@pytest.mark.parametrize(("B", "T"), [(1, 8192), (1, 45000), (3, 3001)])
def test_side_by_side_equals_in_turn(B, T, monkeypatch):
    """Two segments, more segments than are held at once, several rows: the same bits, also from a graph."""
    x = inputs(B, T, wild=0.01) | {"initial_state": torch.randn(B, 2, 128, 128, device=DEVICE)}
    beside = chunk_kda(**x, output_final_state=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunk_kda(**x, output_final_state=True)
    graph.replay()
    asked = []
    monkeypatch.setattr(kda_operators, "runs_beside", lambda *args: asked.append(args))
    in_turn = chunk_kda(**x, output_final_state=True)
    assert len(asked) == 1
    for a, b, c in zip(beside, captured, in_turn):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_capture():
    """A captured call reads new inputs at each replay."""
    x = inputs(1, 200)
    cu_seqlens = torch.tensor([0, 70, 200], dtype=torch.int32, device=DEVICE)
    chunk_kda(**x, cu_seqlens=cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = chunk_kda(**x, cu_seqlens=cu_seqlens, output_final_state=True)
    x["v"].mul_(-1)
    cu_seqlens[1] = 100
    graph.replay()
    wanted, wanted_state = chunk_kda(**x, cu_seqlens=cu_seqlens, output_final_state=True)
    assert torch.equal(o, wanted)
    assert torch.equal(state, wanted_state)


def test_compiled_whole():
    x = inputs(1, 200)
    compiled = torch.compile(lambda **x: chunk_kda(**x, output_final_state=True), fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(**x), chunk_kda(**x, output_final_state=True)))


def gradients(op, x, weights, state, **kwargs):
    leaves = {name: t.detach().requires_grad_() for name, t in {**x, "initial_state": state}.items()}
    o, final = op(**leaves, **kwargs)
    found = torch.autograd.grad((o, final), list(leaves.values()), [w.to(t.dtype) for w, t in zip(weights, (o, final))])
    return dict(zip(leaves, found))


def magnitudes(exact, x):
    """Of gradients that are sums over tokens (and channels), the sums of their terms' absolute values.

    With z = g + dt_bias the decay is -exp(A_log) softplus(z): a token's part of dt_bias's gradient is dg, and of
    A_log's dg softplus(z) / sigmoid(z). Over 300 tokens the latter are up to 60 times their sum.
    """
    H, K = x["g"].shape[2:]
    z = x["g"].double() + x["dt_bias"].double().view(H, K)
    of_A_log = exact["g"] * torch.nn.functional.softplus(z) / torch.sigmoid(z)
    return {"A_log": of_A_log.abs().sum((0, 1, 3)), "dt_bias": exact["g"].abs().sum((0, 1)).flatten()}


def check_gradients(x, rows, **kwargs):
    """Against autograd of the float64 recurrence; twice the forward's bounds, as forward and backward both round.

    What is summed may cancel: such a gradient may also be off by one rounding (a quarter of the bound) of each term.
    """
    (H, K), V, bound = x["q"].shape[2:], x["v"].shape[-1], BOUNDS[x["q"].dtype]
    state, weight = (torch.randn(rows, H, K, V, device=DEVICE) for _ in range(2))
    weights = torch.randn_like(x["v"]), 0.1 * weight

    def op(**x):
        return chunk_kda(**x, output_final_state=True)

    found, again = (gradients(op, x, weights, state, **kwargs) for _ in range(2))
    double = {name: t.double() for name, t in x.items()}
    exact = gradients(recurrent_kda_reference, double, [w.double() for w in weights], state.double(), **kwargs)
    terms = magnitudes(exact, x)
    for name, wanted in exact.items():
        assert torch.equal(found[name], again[name]), name
        cancelled = bound / 4 * terms[name].norm() if name in terms else 0.0
        # Where every gate is far below its floor the exact gradient is nothing, and ours no more than rounding.
        floor = 1e-9 * wanted.numel() ** 0.5
        assert (found[name].double() - wanted).norm() <= 2 * bound * wanted.norm() + cancelled + floor, name


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("wild", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("cuts", [None, [0, 0, 1, 65, 65, 200, 300]])
def test_gradients(cuts, wild, dtype):
    kwargs = {} if cuts is None else {"cu_seqlens": torch.tensor(cuts, dtype=torch.int32, device=DEVICE)}
    check_gradients(inputs(1, 300, dtype=dtype, wild=wild), 1 if cuts is None else len(cuts) - 1, **kwargs)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("K", "V"), [(16, 16), (33, 64), (48, 40), (64, 64), (100, 40), (256, 256)])
def test_gradients_of_head_sizes(K, V, dtype):
    check_gradients(inputs(2, 150, K=K, V=V, dtype=dtype), 2)


def test_gradients_of_segments(monkeypatch):
    x, state = inputs(2, 1000, wild=0.01), torch.randn(2, 2, 128, 128, device=DEVICE)
    weights = torch.randn_like(x["v"]), torch.randn_like(state)

    def op(**x):
        return chunk_kda(**x, output_final_state=True)

    whole = gradients(op, x, weights, state)
    monkeypatch.setattr(backward, "SEGMENT_TOKENS", 512)
    parts = gradients(op, x, weights, state)
    for name in whole:
        if name not in ("A_log", "dt_bias"):  # summed in another order
            assert torch.equal(whole[name], parts[name]), name


def test_gradients_compiled_whole():
    x = {name: t.requires_grad_() for name, t in inputs(1, 200).items()}
    compiled = torch.compile(lambda **x: chunk_kda(**x)[0].float().square().sum(), fullgraph=True)
    eager = torch.autograd.grad(chunk_kda(**x)[0].float().square().sum(), list(x.values()))
    for a, b in zip(eager, torch.autograd.grad(compiled(**x), list(x.values()))):
        assert (a - b).float().norm() <= 2**-7 * a.float().norm()
