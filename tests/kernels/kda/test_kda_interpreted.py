"""
The Triton kernels against the float64 recurrence, in Triton's interpreter: fp32 to fp32 rounding, small shapes.
"""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.kernels.kda.operators import chunk_kda, kda_step
from kimi_linear.kernels.kda.reference import recurrent_kda_reference

GATES = ("tame", "steep", "mixed", "wild_channel", "all_wild", "zero")


@pytest.fixture(autouse=True)
def nan_allocations(monkeypatch):
    """No output may depend on what an allocation contained."""
    empty = torch.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-7)

    monkeypatch.setattr(torch, "empty", filled)


def make(B, T, H, K, V, gate="tame", dtype=torch.float32, seed=0, packed_views=False):
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen)

    if packed_views:
        qkv = randn(B, T, H, 2 * K + V).to(dtype)
        q, k, v = qkv[..., :K], qkv[..., K : 2 * K], qkv[..., 2 * K :]
    else:
        q, k, v = randn(B, T, H, K).to(dtype), randn(B, T, H, K).to(dtype), randn(B, T, H, V).to(dtype)
    g = randn(B, T, H, K) - 3
    A = torch.rand(H, generator=gen) * 15 + 1
    if gate == "steep":  # some 10 nats a step in every channel
        g, A = g + 6, A * 0 + 3
    elif gate == "mixed":  # wild tokens and channels among tame ones
        g = torch.where(torch.rand(B, T, H, K, generator=gen) < 0.05, g * 0 + 1000.0, g)
    elif gate == "wild_channel":
        g[..., 0] = 1000.0
    elif gate == "all_wild":
        g, A = g * 0 + 1e4, A * 0 + 1
    elif gate == "zero":
        g = torch.full_like(g, float("-inf"))
    beta = randn(B, T, H)
    beta[:, T // 2 :: 5] = float("-inf")
    beta[:, T // 3 :: 7] = 40.0
    k[:, T // 4 : T // 4 + 1] = 0
    return {"q": q, "k": k, "v": v, "g": g.to(dtype), "beta": beta.to(dtype), "A_log": A.log(), "dt_bias": randn(H * K)}


def relative(x, exact, floor=1e-30):
    return float((x.double() - exact).norm() / exact.norm().clamp(min=floor)) if exact.numel() else 0.0


def check(x, bound=1e-5, **kwargs):
    o, state = chunk_kda(**x, output_final_state=True, **kwargs)
    exact, exact_state = recurrent_kda_reference(**x, **kwargs)
    assert o.shape == x["v"].shape and o.dtype == x["v"].dtype and state.dtype == torch.float32
    # One step's decay counts for at least 2^-48 (kda_gate_log2), so where the exact result is nothing, 4e-15 of the
    # initial state may be left: what the floor allows is 2^-30 * 1e-5 = 1e-14 of it.
    initial = kwargs.get("initial_state")
    floor = 1e-30 if initial is None or not initial.numel() else max(1e-30, 2**-30 * float(initial.norm()))
    assert relative(o, exact, floor) < bound
    assert relative(state, exact_state, floor) < bound


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths_and_gates(gate, T):
    check(make(1, T, 1, 32, 16, gate))


@pytest.mark.parametrize(("K", "V"), [(16, 16), (24, 40), (64, 16), (100, 64)])
def test_head_sizes(K, V):
    check(make(2, 70, 1, K, V, "mixed"), initial_state=torch.randn(2, 1, K, V))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["tame", "mixed"])
def test_half_precision(dtype, gate):
    # The products round their operands: 2^-9 each in bf16, a handful in a row, worst where heads are as small as this.
    check(make(1, 130, 2, 32, 32, gate, dtype), bound=2.5e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("cuts", [[0, 0, 64, 65, 150, 150], [0, 1, 2, 3], [0], [0, 0], [0, 129]])
def test_packed(cuts):
    x = make(1, cuts[-1], 2, 16, 16, "mixed")
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    check(x, cu_seqlens=cu_seqlens, initial_state=torch.randn(len(cuts) - 1, 2, 16, 16))


def test_no_tokens():
    x = make(2, 0, 2, 16, 16)
    state = torch.randn(2, 2, 16, 16)
    o, final = chunk_kda(**x, initial_state=state, output_final_state=True)
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(final, state)
    assert torch.equal(chunk_kda(**x, output_final_state=True)[1], torch.zeros_like(state))


def test_strided_views_and_scale():
    check(make(1, 70, 2, 32, 16, packed_views=True), scale=0.3)


def test_large_state_is_forgotten():
    check(make(1, 40, 1, 16, 16, "all_wild"), initial_state=torch.randn(1, 1, 16, 16) * 1e6)


def test_padding_changes_nothing():
    x = make(1, 80, 1, 16, 16)
    padded = {n: t.clone() for n, t in x.items()}
    padded["g"][:, 50:] = float("-inf")
    padded["beta"][:, 50:] = float("-inf")
    short = {n: t[:, :50] if t.ndim > 2 else t for n, t in x.items()}
    o, state = chunk_kda(**padded, output_final_state=True)
    o_short, state_short = chunk_kda(**short, output_final_state=True)
    assert relative(o[:, :50], o_short.double()) < 1e-6
    assert relative(state, state_short.double()) < 1e-6


@pytest.mark.parametrize("slots", [1, 2])
def test_segments_change_nothing(slots, monkeypatch):
    x = make(2, 150, 1, 16, 16, "mixed")
    whole = chunk_kda(**x, output_final_state=True)
    monkeypatch.setattr("kimi_linear.kernels.kda.operators.segments", lambda B, T, C, beside: (2 * C, slots))
    parts = chunk_kda(**x, output_final_state=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.lists(st.sampled_from([0, 1, 15, 63, 64, 65, 80]), min_size=1, max_size=3),
    gate=st.sampled_from(GATES),
    with_state=st.booleans(),
    views=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_pack(cuts, gate, with_state, views, seed):
    cu_seqlens = torch.tensor([0, *cuts]).cumsum(0)
    x = make(1, int(cu_seqlens[-1]), 1, 16, 16, gate, seed=seed, packed_views=views)
    state = torch.randn(len(cuts), 1, 16, 16) if with_state else None
    check(x, cu_seqlens=cu_seqlens, initial_state=state)


def step_case(B, T, H, K, V, W=4):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, T, H * (2 * K + V)).split([H * K, H * K, H * V], -1)
    return {
        "q": q, "k": k, "v": v,
        "f": torch.randn(B, T, H * K), "beta": torch.randn(B, T, H), "gate": torch.randn(B, T, H * V),
        "conv_weights": tuple(torch.randn(n, 1, W) for n in (H * K, H * K, H * V)),
        "windows": tuple(torch.randn(B, n, W - 1) for n in (H * K, H * K, H * V)),
        "A_log": torch.rand(H), "dt_bias": torch.randn(H * K), "norm_weight": torch.randn(V), "norm_eps": 1e-5,
        "state": torch.randn(B, H, K, V),
    }  # fmt: skip


def exact_step(x, row, n):
    """
    Outputs [n, H, V], windows and state of `row` after n tokens, float64, by the oracle after a plain convolution.
    """
    H, K, V = x["state"].shape[1:]
    qkv, windows = [], []
    for name, weight, window in zip("qkv", x["conv_weights"], x["windows"]):
        seen = torch.cat([window[row].T, x[name][row, :n]]).double()  # [W - 1 + n, D]
        w = weight[:, 0].double()
        taps = [torch.nn.functional.silu((seen[t : t + w.shape[1]].T * w).sum(1)) for t in range(n)]
        qkv.append(torch.stack(taps).view(1, n, H, -1) if n else seen.new_zeros(1, 0, H, w.shape[0] // H))
        windows.append(seen[n:].T)
    f = x["f"][row, :n].view(1, n, H, K)
    beta = x["beta"][row, :n][None]
    state = x["state"][row : row + 1]
    o, state = recurrent_kda_reference(*qkv, f, beta, A_log=x["A_log"], dt_bias=x["dt_bias"], initial_state=state)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + x["norm_eps"]) * x["norm_weight"].double()
    return (o * x["gate"][row, :n].view(1, n, H, V).double().sigmoid())[0], windows, state[0]


@pytest.mark.parametrize(
    ("T", "K", "V", "lengths"),
    [(1, 16, 32, None), (1, 24, 16, [1, 0, 1]), (5, 16, 16, [0, 2, 5]), (2, 32, 16, [9, 1, 2])],
)
def test_step(T, K, V, lengths):
    x = step_case(3, T, 2, K, V)
    counts = [T] * 3 if lengths is None else [min(n, T) for n in lengths]
    wanted = [exact_step(x, row, n) for row, n in enumerate(counts)]
    y = kda_step(**x, lengths=None if lengths is None else torch.tensor(lengths))
    for row, (n, (o, windows, state)) in enumerate(zip(counts, wanted)):
        assert torch.allclose(y[row, :n].double(), o, atol=1e-5, rtol=1e-5)
        assert not y[row, n:].any()
        assert torch.allclose(x["state"][row].double(), state, atol=1e-5, rtol=1e-5)
        for window, exact in zip(x["windows"], windows):
            assert torch.equal(window[row].double(), exact)


def test_steps_equal_one_call():
    once, stepwise = step_case(2, 4, 1, 16, 16), step_case(2, 4, 1, 16, 16)
    y = kda_step(**once)
    parts = []
    for t in range(4):
        token = {n: stepwise[n][:, t : t + 1] for n in ("q", "k", "v", "f", "beta", "gate")}
        parts.append(kda_step(**{**stepwise, **token}))
    assert torch.equal(y, torch.cat(parts, 1))
    assert torch.equal(once["state"], stepwise["state"])
    assert all(torch.equal(a, b) for a, b in zip(once["windows"], stepwise["windows"]))
