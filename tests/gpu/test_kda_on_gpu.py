"""The Triton KDA forward on a CUDA device: what the interpreter and offline compiles cannot show. `pytest -m gpu`."""

import pytest
import torch

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
