"""The PyTorch decode step: against the float64 recurrence, and the same bits however calls are split.

Bounds: fp32 as the other PyTorch kernels, 2e-5 of the largest value after some 20 tokens; bf16 inputs are rounded once
after the convolution and once at the end, 2^-8 each.
"""

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.kernels.kda import dispatch
from kimi_linear.kernels.kda.dispatch import step_kda
from kimi_linear.kernels.kda.reference import recurrent_kda_reference
from kimi_linear.kernels.kda.torch_step import kda_step_torch

H, K, V, W = 2, 16, 24, 4
EPS = 1e-5


def make(B: int, T: int, dtype: torch.dtype = torch.float32, seed: int = 0, H: int = H, K: int = K, V: int = V) -> dict:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    sizes = (H * K, H * K, H * V)
    return {
        **{name: randn(B, T, size).to(dtype) for name, size in zip("qkvf", (*sizes, H * K))},
        "beta": randn(B, T, H).to(dtype),
        "gate": randn(B, T, H * V).to(dtype),
        "conv_weights": tuple(randn(size, 1, W).to(dtype) for size in sizes),
        "window": randn(B, sum(sizes), W - 1).to(dtype),
        "A_log": randn(H),
        "dt_bias": randn(H * K),
        "norm_weight": 1 + randn(V) / 10,
        "norm_eps": EPS,
        "state": randn(B, H, K, V),
    }


def doubled(x: dict) -> dict:
    x = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in x.items()}
    return {**x, "conv_weights": tuple(weight.double() for weight in x["conv_weights"])}


def oracle(x: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, state) in float64."""
    x = doubled(x)
    inputs = torch.cat([x["window"].transpose(1, 2), torch.cat([x["q"], x["k"], x["v"]], -1)], 1)
    taps = torch.cat(x["conv_weights"])
    y = F.silu(F.conv1d(inputs.transpose(1, 2), taps, groups=taps.shape[0])).transpose(1, 2)
    q, k, v = y.split([H * K, H * K, H * V], -1)
    o, state = recurrent_kda_reference(
        q.unflatten(-1, (H, K)),
        k.unflatten(-1, (H, K)),
        v.unflatten(-1, (H, V)),
        x["f"].unflatten(-1, (H, K)),
        x["beta"],
        A_log=x["A_log"],
        dt_bias=x["dt_bias"],
        initial_state=x["state"],
    )
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + EPS)
    return x["norm_weight"] * o * x["gate"].unflatten(-1, (H, V)).sigmoid(), state


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (2, 5), (1, 20)])
def test_follows_the_reference(dtype, bound, B, T):
    x = make(B, T, dtype)
    if dtype == torch.float64:
        x = doubled(x)
    y, window, state = kda_step_torch(**x)
    expected_y, expected_state = oracle(x)
    scale = max(expected_y.abs().max(), expected_state.abs().max())
    assert y.dtype == dtype
    assert (y.double() - expected_y).abs().max() <= bound * scale
    assert (state.double() - expected_state).abs().max() <= bound * scale
    inputs = torch.cat([x["window"], torch.cat([x["q"], x["k"], x["v"]], -1).transpose(1, 2)], -1)
    assert torch.equal(window, inputs[..., -(W - 1) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, [0, 3, 7]])
@pytest.mark.parametrize("shape", [(2, 16, 24), (3, 5, 7), (32, 128, 128)], ids=str)
def test_bits_do_not_depend_on_the_split(dtype, lengths, shape):
    x = make(3, 7, dtype, 0, *shape)
    lengths = None if lengths is None else torch.tensor(lengths)
    _, window, state = kda_step_torch(**x, lengths=lengths)
    part = dict(x)
    for start, end in ((0, 1), (1, 4), (4, 7)):
        part.update({name: x[name][:, start:end] for name in ("q", "k", "v", "f", "beta", "gate")})
        taken = None if lengths is None else (lengths - start).clamp(min=0)
        _, part["window"], part["state"] = kda_step_torch(**part, lengths=taken)
    assert torch.equal(part["state"], state)
    assert torch.equal(part["window"], window)


def test_rows_stop_at_their_lengths():
    x = make(3, 7)
    y, window, state = kda_step_torch(**x, lengths=torch.tensor([0, 3, 7]))
    assert torch.equal(state[0], x["state"][0])
    assert torch.equal(window[0], x["window"][0])
    some = {**x, **{name: x[name][:, :3] for name in ("q", "k", "v", "f", "beta", "gate")}}
    expected, expected_window, expected_state = kda_step_torch(**some)
    assert torch.equal(state[1], expected_state[1])
    assert torch.equal(window[1], expected_window[1])
    torch.testing.assert_close(y[1, :3], expected[1])


def test_without_a_gate_only_the_state_is_made():
    x = make(2, 4)
    _, window, state = kda_step_torch(**x)
    y, window_alone, state_alone = kda_step_torch(**{**x, "gate": None})
    assert y is None
    assert torch.equal(window, window_alone)
    assert torch.equal(state, state_alone)


def test_gradients():
    x = doubled(make(1, 3))
    names = ("q", "k", "v", "f", "beta", "gate", "window", "A_log", "dt_bias", "norm_weight", "state")
    leaves = [x[name].requires_grad_() for name in names]

    def outputs(*values):
        return kda_step_torch(**{**x, **dict(zip(names, values))})

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


def test_the_dispatch_takes_pytorch_where_triton_does_not_serve():
    x = make(2, 3)
    given = [x["state"].clone(), x["window"].clone()]
    outputs = step_kda(**x, lengths=None, backend="auto")
    for a, b in zip(outputs, kda_step_torch(**x)):
        assert torch.equal(a, b)
    assert torch.equal(x["state"], given[0]), "PyTorch must leave what it was given alone"
    assert torch.equal(x["window"], given[1])


def test_gradients_of_steps_are_pytorchs(monkeypatch):
    """The step's kernel has none, so what "triton" serves goes to PyTorch where one is wanted."""
    monkeypatch.setattr(dispatch, "resolve_kda_backend", lambda *args: "triton")
    x = make(2, 3)
    x["state"].requires_grad_()
    y, _, _ = step_kda(**x, lengths=None, backend="triton")
    y.sum().backward()
    assert x["state"].grad.isfinite().all()
