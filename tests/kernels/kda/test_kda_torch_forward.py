"""The PyTorch path of KDA against the float64 recurrence.

Bounds. Error is the RMS of the difference over the RMS of the truth. In fp32 each element is a dot product over K
channels and chains over the tokens a decay remembers, each step rounding by at most eps / 2: with random signs some
sqrt(K + T) of these add up. Half-precision inputs are exact in the oracle, so only the rounding of o remains.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

from kimi_linear.kernels.kda import torch_forward as kda_torch_forward
from kimi_linear.kernels.kda.reference import recurrent_kda_reference
from kimi_linear.kernels.kda.torch_forward import chunk_kda_torch, recurrent_kda_torch

PATHS = pytest.mark.parametrize("path", [chunk_kda_torch, recurrent_kda_torch])
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def gates(name, T, H, K, generator):
    """(logits [1, T, H, K], A_log, dt_bias) of a named regime."""
    x = torch.randn(1, T, H, K, generator=generator)
    A = torch.empty(H).uniform_(1, 16, generator=generator)
    step = torch.empty(H * K).uniform_(-6.9, -2.3, generator=generator).exp()
    dt_bias = step + torch.log(-torch.expm1(-step))  # inverse of softplus
    if name == "released":  # exp(A_log) up to 201, |g| of some tokens and channels in the thousands
        A[0] = 201.0
        x[:, ::7, :, ::5] += 13.0
    elif name == "none":
        x.fill_(float("-inf"))
    elif name == "strongest":  # -1e4 at every step
        A.fill_(100.0)
        x.fill_(100.0)
        dt_bias.zero_()
    elif name == "one_wild_channel":
        x[..., 1] = 600.0
    elif name == "after_a_cliff":  # one gate of -2661, then some -1e-3 a step
        A.fill_(1.0)
        dt_bias.zero_()
        x.fill_(-6.9)
        x[:, 3::64] = 2661.0
    return x, A.log(), dt_bias


GATES = ("tame", "released", "none", "strongest", "one_wild_channel", "after_a_cliff")


def make(T, H=2, K=16, V=8, gate="tame", dtype=torch.float32, state=1.0, seed=0, B=1):
    """Keyword arguments for every path; q, k, v of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x, A_log, dt_bias = gates(gate, T, H, K, generator)
    q, k = (torch.randn(B, T, H, K, generator=generator) for _ in range(2))
    v, beta = torch.randn(B, T, H, V, generator=generator), torch.randn(B, T, H, generator=generator)
    x = x.expand(B, -1, -1, -1).clone()
    inputs = {name: y.to(dtype) for name, y in zip(NAMES, (q, k, v, x, beta))}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    initial_state = state * torch.randn(B, H, K, V, generator=generator).to(wide)
    return inputs | {"A_log": A_log.to(wide), "dt_bias": dt_bias.to(wide), "initial_state": initial_state}


def error(got, want):
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30)).item()


def check(got, inputs, want=None, factor=1.0):
    """`got` (o, state) is as near the oracle as its dtypes allow."""
    (o, state), (o_want, state_want) = got, want or recurrent_kda_reference(**inputs)
    _, T, _, K = inputs["q"].shape
    bound = factor * torch.finfo(torch.float32).eps / 2 * (K + T) ** 0.5
    assert error(state, state_want) <= bound
    if o.dtype == torch.float32:
        assert error(o, o_want) <= bound
    else:
        assert error(o, o_want) <= 2 * error(o_want.to(o.dtype), o_want)


def run(path, inputs, **options):
    return path(**inputs, output_final_state=True, **options)


def cut(inputs, start, end):
    return {name: x[:, start:end] if name in NAMES[:5] else x for name, x in inputs.items()}


def test_oracle_gradients():
    inputs = {name: x.requires_grad_() for name, x in make(3, H=1, K=2, V=3, dtype=torch.float64).items()}
    names = list(inputs)
    function = lambda *tensors: recurrent_kda_reference(**dict(zip(names, tensors)))  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_oracle_by_hand():
    """One head of one channel: scalars."""
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    A_log, dt_bias = torch.tensor([0.5]), torch.tensor([-0.25])
    inputs = {"q": 3 * one, "k": -2 * one, "v": one, "g": 0.75 * one, "beta": 0 * one[..., 0]}
    o, state = recurrent_kda_reference(**inputs, A_log=A_log, dt_bias=dt_bias, scale=2.0)
    k, q = -2 / (4 + 1e-6) ** 0.5, 2 * 3 / (9 + 1e-6) ** 0.5
    decay = (1 + torch.tensor(0.5, dtype=torch.float64).exp()) ** -A_log.double().exp()
    first = 0.5 * k
    second = decay * first + 0.5 * k * (1 - decay * first * k)
    torch.testing.assert_close(o.flatten(), torch.stack([q * first * one.sum() / 2, (q * second).squeeze()]).flatten())
    torch.testing.assert_close(state.flatten(), second.flatten())


@PATHS
@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 127, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lengths_and_dtypes(path, T, dtype):
    inputs = make(T, K=20, V=13, B=2, dtype=dtype)
    o, state = run(path, inputs)
    assert o.dtype == dtype and o.is_contiguous() and state.dtype == torch.float32
    assert state.data_ptr() != inputs["initial_state"].data_ptr()
    check((o, state), inputs)


@PATHS
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("state", [1.0, 1e3])
def test_gates(path, gate, state):
    inputs = make(150, K=24, gate=gate, state=state)
    check(run(path, inputs), inputs, factor=2.0 if state > 1 else 1.0)


@pytest.mark.parametrize("gate", GATES)
def test_gradients(gate, monkeypatch):
    """Against autograd through the oracle; several segments, so that states and recomputation take part."""
    monkeypatch.setattr(kda_torch_forward, "_SEGMENT_ELEMENTS", 64 * 2 * 16)
    inputs = {name: x.requires_grad_() for name, x in make(150, gate=gate).items()}
    want = recurrent_kda_reference(**inputs)
    got = run(chunk_kda_torch, inputs)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in got]
    leaves = list(inputs.values())
    wanted = torch.autograd.grad([(x * w).sum() for x, w in zip(want, weights)], leaves)
    for name, x, y in zip(inputs, torch.autograd.grad([(x * w).sum() for x, w in zip(got, weights)], leaves), wanted):
        # A gradient sums the errors of forward and backward; those of vanished decays are zero on both sides.
        assert error(x, y.double()) <= 4 * torch.finfo(torch.float32).eps * (16 + 150) ** 0.5, name


def test_gradcheck():
    inputs = {name: x.requires_grad_() for name, x in make(5, H=1, K=3, V=2, dtype=torch.float64).items()}
    names = list(inputs)
    for path, options in ((chunk_kda_torch, {"chunk_size": 4}), (recurrent_kda_torch, {})):
        function = lambda *tensors: run(path, dict(zip(names, tensors)), **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@PATHS
@pytest.mark.parametrize("gate", ["released", "strongest", "none"])
def test_gradients_are_finite_in_bf16(path, gate):
    inputs = make(70, gate=gate, dtype=torch.bfloat16, state=1e3)
    inputs["beta"][:, ::3] = 1e4
    inputs["beta"][:, 1::3] = -1e4
    inputs["k"][:, ::5] = 0
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    o, state = run(path, inputs)
    for name, x in zip(inputs, torch.autograd.grad(o.float().sum() + state.sum(), list(inputs.values()))):
        assert x.isfinite().all() and x.dtype == inputs[name].dtype, name


@PATHS
def test_masked_tokens_are_absent(path):
    inputs = make(100)
    keep = torch.ones(100, dtype=torch.bool)
    keep[:9] = keep[40:57] = keep[90:] = False
    inputs["A_log"] = inputs["A_log"] + 5.0
    inputs["g"][:, ~keep] = inputs["beta"][:, ~keep] = float("-inf")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    o, state = run(path, inputs)
    short = {name: x[:, keep] if name in NAMES[:5] else x for name, x in inputs.items()}
    o_short, state_short = run(path, short)
    check((o[:, keep], state), short, want=(o_short.double(), state_short.double()))
    leaves = list(inputs.values())
    got = torch.autograd.grad(o[:, keep].sum() + state.sum(), leaves)
    want = torch.autograd.grad(o_short.sum() + state_short.sum(), leaves)
    for name, x, y in zip(inputs, got, want):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@PATHS
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_saturated_beta_and_zero_keys(path, logit):
    inputs = make(90)
    inputs["beta"].fill_(logit)
    inputs["k"][:, 10:20] = 0
    check(run(path, inputs), inputs)


def test_repeated_keys_without_decay():
    """The triangular system at its hardest: every key the same, nothing forgotten, full overwrites."""
    inputs = make(128, gate="none")
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["beta"].fill_(1e4)
    check(run(chunk_kda_torch, inputs), inputs)


@PATHS
def test_packed_sequences(path):
    ends = torch.tensor([0, 0, 1, 64, 64, 130, 133, 133])
    inputs = make(133)
    inputs["initial_state"] = torch.randn(7, 2, 16, 8, generator=torch.Generator().manual_seed(2))
    o, states = run(path, inputs, cu_seqlens=ends)
    check((o, states), inputs, want=recurrent_kda_reference(**inputs, cu_seqlens=ends))
    for n in range(7):
        alone = cut(inputs, ends[n], ends[n + 1]) | {"initial_state": inputs["initial_state"][n : n + 1]}
        o_alone, state_alone = run(path, alone)
        torch.testing.assert_close(o[:, ends[n] : ends[n + 1]], o_alone, rtol=0, atol=0)
        torch.testing.assert_close(states[n : n + 1], state_alone, rtol=0, atol=0)
    empty = run(path, cut(inputs, 0, 0), cu_seqlens=torch.zeros(8, dtype=torch.int32))
    torch.testing.assert_close(empty[1], inputs["initial_state"], rtol=0, atol=0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 140), st.sampled_from(GATES), st.sampled_from([chunk_kda_torch, recurrent_kda_torch]))
def test_any_split_equals_one_pass(split, gate, second):
    inputs = make(140, gate=gate)
    o_first, state = run(chunk_kda_torch, cut(inputs, 0, split))
    o_second, state = run(second, cut(inputs, split, 140) | {"initial_state": state})
    check((torch.cat([o_first, o_second], dim=1), state), inputs)


def test_segments_and_chunk_sizes_change_nothing(monkeypatch):
    inputs = make(150, B=2, gate="released")
    want = recurrent_kda_reference(**inputs)
    monkeypatch.setattr(kda_torch_forward, "_SEGMENT_ELEMENTS", 1)
    for chunk_size in (1, 16, 64, 256):
        check(run(chunk_kda_torch, inputs, chunk_size=chunk_size), inputs, want)


@PATHS
def test_strides_scale_and_shapes_of_parameters(path):
    inputs = make(70)
    want = recurrent_kda_reference(**inputs, scale=0.3)
    for name in NAMES[:5]:
        wide = torch.full((*inputs[name].shape, 2), float("nan")).transpose(1, 2)
        wide[..., 1] = inputs[name].transpose(1, 2)
        inputs[name] = wide.transpose(1, 2)[..., 1]
        assert not inputs[name].is_contiguous()
    inputs["A_log"] = inputs["A_log"].view(1, 1, 2, 1)
    inputs["dt_bias"] = inputs["dt_bias"].view(2, 16)
    check(run(path, inputs, scale=0.3), inputs, want)
    assert path(**inputs)[1] is None


@PATHS
def test_autocast_does_not_reach_inside(path):
    inputs = make(70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(path, inputs)
    torch.testing.assert_close(got, run(path, inputs), rtol=0, atol=0)


@PATHS
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_breaks(path, grad, monkeypatch):
    """Two segments, and a second length, which torch.compile takes for a dynamic one."""
    monkeypatch.setattr(kda_torch_forward, "_SEGMENT_ELEMENTS", 16 * 2 * 16)
    torch._dynamo.reset()
    compiled = torch.compile(path, fullgraph=True, backend="aot_eager")
    for T in (24, 29) if path is chunk_kda_torch else (2, 3):
        inputs = {name: x.requires_grad_(grad) for name, x in make(T).items()}
        options = {"chunk_size": 16} if path is chunk_kda_torch else {}
        with torch.set_grad_enabled(grad):
            got, want = run(compiled, inputs, **options), run(path, inputs, **options)
        torch.testing.assert_close(got, want)
        if grad:
            leaves = list(inputs.values())
            got, want = (torch.autograd.grad(o.sum() + state.sum(), leaves) for o, state in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_memory_at_full_size(grad):
    """Fake tensors of the released size: temporaries stay small, whatever the length, and none is [C, C, K]."""
    peaks, lengths = [], (1024, 2048) if grad else (4096, 8192)
    with FakeTensorMode():
        for T in lengths:
            q, k, v, g = (torch.empty(1, T, 32, 128, dtype=torch.bfloat16, requires_grad=grad) for _ in range(4))
            beta = torch.empty(1, T, 32, dtype=torch.bfloat16, requires_grad=grad)
            with PeakMemory() as memory, torch.set_grad_enabled(grad):
                o, _ = chunk_kda_torch(q, k, v, g, beta, A_log=torch.empty(32), dt_bias=torch.empty(4096))
                if grad:
                    o.sum().backward()
            peaks.append(memory.peak)
            # In bytes: the whole output (bf16), or one segment of both operands' stacked fp32 copies.
            assert memory.largest <= max(T * 4096 * 2, 2 * 512 * 4096 * 4)
            assert all(shape[-3:-1] != (64, 64) for shape in memory.shapes)
    MiB, growth = 2**20, peaks[1] - peaks[0]
    # Measured: 207 MiB at T = 8192 without gradients, 433 MiB at T = 2048 with them.
    if grad:  # per 1024 tokens, 8 MiB each: o, the gradients of q, k, v, g
        assert peaks[1] <= 520 * MiB and growth <= 48 * MiB
    else:  # o alone
        assert peaks[1] <= 260 * MiB and growth <= 40 * MiB


@PATHS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4)}, r"q must be .*\[3, 4\]"),
        ({"k": torch.zeros(1, 3, 2, 5)}, r"k must be \[1, 3, 2, 4\].*got \[1, 3, 2, 5\]"),
        ({"v": torch.zeros(1, 3, 2)}, r"v must be .*got \[1, 3, 2\]"),
        ({"g": torch.zeros(1, 3, 2, 4).half()}, "g must be torch.float32 as q is, got torch.float16"),
        ({"beta": torch.zeros(1, 2, 3)}, r"beta must be \[1, 3, 2\].*got \[1, 2, 3\]"),
        ({"A_log": torch.zeros(3)}, r"A_log must have one element for each of 2 heads, got shape \[3\]"),
        ({"A_log": torch.zeros(2, dtype=torch.int64)}, "A_log must be floating-point, got torch.int64"),
        ({"dt_bias": torch.zeros(4)}, r"dt_bias must have H \* K = 8 elements, got shape \[4\]"),
        ({"dt_bias": torch.zeros(8, device="meta")}, "dt_bias must be on cpu as q is, got meta"),
        ({"initial_state": torch.zeros(1, 2, 6, 4)}, r"= \[1, 2, 4, 6\], got \[1, 2, 6, 4\]"),
        ({"initial_state": torch.zeros(1, 2, 4, 6, device="meta")}, "initial_state must be on cpu"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, r"rise from 0 to the number of tokens 3, got \[0, 2, 1, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 2])}, r"rise from 0 to the number of tokens 3, got \[0, 2\]"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "cu_seqlens must be an integer tensor"),
    ],
)
def test_wrong_inputs(path, change, message):
    inputs = make(3, K=4, V=6) | change
    if "cu_seqlens" in change:
        del inputs["initial_state"]
    with pytest.raises(ValueError, match=message):
        path(**inputs)


def test_wrong_options():
    with pytest.raises(ValueError, match="power of two, got 48"):
        chunk_kda_torch(**make(3), chunk_size=48)
    with pytest.raises(ValueError, match="batch of one row, got 2"):
        chunk_kda_torch(**make(3, B=2), cu_seqlens=torch.tensor([0, 3]))


def test_softplus_of_a_large_gate_is_itself():
    """The `strongest` regime really has gates of -1e4."""
    x, A_log, dt_bias = gates("strongest", 1, 2, 4, torch.Generator())
    torch.testing.assert_close(
        -A_log.exp().view(2, 1) * F.softplus(x[0, 0] + dt_bias.view(2, 4)), torch.full((2, 4), -1e4)
    )
