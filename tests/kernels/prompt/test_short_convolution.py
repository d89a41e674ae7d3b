"""The short convolution against torch's own conv1d in float64.

Bounds. Half-precision outputs are at most twice as far from the truth as its rounding. In fp32, W products and sums and
SiLU round some 2 W + 4 times by eps / 2.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

from kimi_linear.kernels.prompt import short_convolution
from kimi_linear.kernels.prompt.short_convolution import causal_short_conv


def make(B, T, D, W=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, D), (D, 1, W), (B, D, W - 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(x, weight, window):
    if x.shape[1] == 0:
        return x.double()
    padded = torch.cat([window.double(), x.double().transpose(1, 2)], dim=2)
    return F.silu(F.conv1d(padded, weight.double(), groups=x.shape[2])).transpose(1, 2)


def check(y, want):
    assert y.shape == want.shape
    if y.numel() == 0:
        return
    error = (y.double() - want).abs().max() / want.abs().max()
    rounding = (want.to(y.dtype).double() - want).abs().max() / want.abs().max()
    assert error <= (2 * rounding if y.itemsize == 2 else 12 * torch.finfo(y.dtype).eps / 2)


def check_same(got, want):
    """Windows bit for bit; y but for the rounding of vectorised and scalar SiLU."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_lengths_and_dtypes(T, dtype, W):
    x, weight, window = make(2, T, 5, W, dtype)
    y, new_window = causal_short_conv(x, weight, window=window)
    assert y.dtype == new_window.dtype == dtype and new_window.is_contiguous()
    check(y, oracle(x, weight, window))
    inputs = torch.cat([window, x.transpose(1, 2)], dim=2)
    assert torch.equal(new_window, inputs[..., T:])
    assert W == 1 or new_window.data_ptr() != window.data_ptr()
    y, new_window = causal_short_conv(x, weight)
    check(y, oracle(x, weight, torch.zeros_like(window)))
    assert torch.equal(new_window, torch.cat([torch.zeros_like(window), x.transpose(1, 2)], dim=2)[..., T:])


def test_float64_gradients():
    x, weight, window = (tensor.requires_grad_() for tensor in make(2, 5, 3, dtype=torch.float64))
    check(causal_short_conv(x.detach(), weight.detach(), window=window.detach())[0], oracle(x, weight, window).detach())
    lengths = torch.tensor([5, 2])
    for options in ({}, {"lengths": lengths}):
        function = lambda x, weight, window: causal_short_conv(x, weight, window=window, **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, (x, weight, window))


@pytest.mark.parametrize("T", [0, 1, 6])
def test_right_padding_leaves_the_window_of_the_row_alone(T):
    lengths = torch.arange(T + 1)
    x, weight, window = make(T + 1, T, 3)
    y, new_window = causal_short_conv(x, weight, window=window, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = causal_short_conv(x[row : row + 1, :n], weight, window=window[row : row + 1])
        check_same((y[row : row + 1, :n], new_window[row : row + 1]), alone)


def test_packed_sequences_equal_each_alone():
    ends = torch.tensor([0, 0, 1, 6, 6, 9], dtype=torch.int32)
    x, weight, _ = make(1, 9, 3)
    window = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(1))
    for windows in (window, None):
        y, new_window = causal_short_conv(x, weight, window=windows, cu_seqlens=ends)
        for n in range(5):
            own = None if windows is None else window[n : n + 1]
            alone = causal_short_conv(x[:, ends[n] : ends[n + 1]], weight, window=own)
            check_same((y[:, ends[n] : ends[n + 1]], new_window[n : n + 1]), alone)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(1, 5))
def test_any_split_equals_one_pass(split, W):
    x, weight, window = make(2, 12, 3, W)
    whole = causal_short_conv(x, weight, window=window)
    first, middle = causal_short_conv(x[:, :split], weight, window=window)
    second, last = causal_short_conv(x[:, split:], weight, window=middle)
    check_same((torch.cat([first, second], dim=1), last), whole)


def test_pieces_change_nothing(monkeypatch):
    inputs = [tensor.requires_grad_() for tensor in make(2, 50, 3)]
    results = []
    for elements in (10**9, 7 * 6, 1):
        monkeypatch.setattr(short_convolution, "_PIECE_ELEMENTS", elements)
        y, new_window = causal_short_conv(inputs[0], inputs[1], window=inputs[2])
        results.append((y, new_window, *torch.autograd.grad(y.square().sum() + new_window.sum(), inputs)))
    torch.testing.assert_close(results[1:], results[:1] * 2)


def test_strides():
    x, weight, window = make(2, 20, 6)
    want = causal_short_conv(x, weight, window=window)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    part = torch.cat([x * float("nan"), x], dim=2)[..., 6:]
    for strided in (transposed, part):
        assert not strided.is_contiguous()
        check_same(causal_short_conv(strided, weight, window=window), want)


def test_compiles_without_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(causal_short_conv, fullgraph=True, backend="aot_eager")
    for T in (1, 9, 14):
        x, weight, window = (tensor.requires_grad_() for tensor in make(2, T, 6))
        options = {"window": window, "lengths": torch.tensor([T, T // 2])}
        got, want = compiled(x, weight, **options), causal_short_conv(x, weight, **options)
        torch.testing.assert_close(got, want)
        got, want = (torch.autograd.grad(y.sum() + w.sum(), [x, weight, window]) for y, w in (got, want))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grad", [False, True])
def test_memory_at_full_size(grad):
    """Fake bf16 tensors of the released width: what a longer input adds is bf16, not W fp32 copies."""
    peaks = []
    with FakeTensorMode():
        for T in (8192, 16384):
            x = torch.empty(1, T, 4096, dtype=torch.bfloat16, requires_grad=grad)
            weight = torch.empty(4096, 1, 4, dtype=torch.bfloat16, requires_grad=grad)
            with PeakMemory() as memory, torch.set_grad_enabled(grad):
                y, _ = causal_short_conv(x, weight)
                if grad:
                    y.sum().backward()
            peaks.append(memory.peak)
    added = 8192 * 4096 * 2
    # Forward: y and, while they are joined, its parts. Backward: gradients of y and x too, in parts and joined.
    assert peaks[1] - peaks[0] <= (6 if grad else 2) * added + 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x must be .*\[3, 4\]"),
        ({"x": torch.zeros(1, 3, 4, dtype=torch.int64)}, "x must be a floating-point"),
        ({"weight": torch.zeros(4, 4)}, r"weight must be .*got \[4, 4\]"),
        ({"weight": torch.zeros(5, 1, 4)}, r"weight must be .*got \[5, 1, 4\]"),
        ({"weight": torch.zeros(4, 1, 4, device="meta")}, "weight must be on cpu as x is, got meta"),
        ({"window": torch.zeros(2, 3, 4)}, r"= \[2, 4, 3\], got \[2, 3, 4\]"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths must be integers"),
        ({"lengths": torch.tensor([1])}, r"\[B\] = \[2\], got torch.int64 \[1\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "batch of one row, got 2"),
        ({"x": torch.zeros(1, 3, 4), "cu_seqlens": torch.tensor([0, 2])}, "rise from 0 to the number of tokens 3"),
        ({"cu_seqlens": torch.tensor([0, 3]), "lengths": torch.tensor([1, 2])}, "exclude each other"),
    ],
)
def test_wrong_inputs(options, message):
    with pytest.raises(ValueError, match=message):
        causal_short_conv(**({"x": torch.zeros(2, 3, 4), "weight": torch.zeros(4, 1, 4)} | options))
