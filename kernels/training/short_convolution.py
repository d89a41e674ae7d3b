"""
Gradients of the short convolution with SiLU, which keeps its input only (forward: kernels/prompt).

With z_t = sum_i weight[W - 1 - i] x_{t - i}, s = sigmoid(z) and dz_t = dy_t s (1 + z (1 - s)), inside one sequence:

    dx_t = sum_i weight[W - 1 - i] dz_{t + i}        dweight[W - 1 - i] = sum over t of dz_t x_{t - i}

in fp32, rounded once. A program walks over its tokens and the W - 1 after them and computes dz of each again from x.
Its part of dweight is added to the others' afterwards in a fixed order. The window before a sequence is zeros: with
one, PyTorch serves.
"""

from typing import Any

import torch

from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)
# Tokens of a program, a multiple of those whose loads are under way together; each program gives a part of dweight.
_PROGRAM_TOKENS = 64
_LOADED_TOKENS = 8


@triton.jit
def short_conv_bwd_rows(x, dy, first, t, T, stride_xt, stride_yt, o_d, m_d, COUNT: tl.constexpr, PACKED: tl.constexpr):
    """COUNT tokens from t on, as tuples of rows: x, dy and where their sequences begin. Zeros from T on."""
    b_x, b_dy, b_first = (), (), ()
    for i in tl.static_range(0, COUNT):
        o_t = tl.cast(t + i, tl.int64)
        m_t = m_d & (tl.zeros_like(o_d) + (t + i) < T)
        b_x = b_x + (tl.load(x + o_t * stride_xt + o_d, mask=m_t, other=0.0),)
        b_dy = b_dy + (tl.load(dy + o_t * stride_yt + o_d, mask=m_t, other=0.0),)
        if PACKED:
            b_first = b_first + (tl.load(first + o_t, mask=o_t < T, other=0),)
        else:
            b_first = b_first + (0,)
    return b_x, b_dy, b_first


@triton.jit
def short_conv_bwd_token(
    b_x, b_dy, first, t, taps, xs, dxs, dws, W: tl.constexpr, ADD_DW: tl.constexpr, PACKED: tl.constexpr
):
    """
    xs, dxs and dws once token t is in: its x, what it adds to the dx of the last W tokens, and to dweight.

    xs and dxs belong to the tokens t - W + 1 to t, oldest first (on entry: to those one earlier), dws to the taps.
    """
    xs = xs[1:] + (b_x.to(tl.float32),)
    dxs = dxs[1:] + (tl.zeros_like(dxs[0]),)
    b_z = tl.zeros_like(dxs[0])
    for j in tl.static_range(0, W):
        if PACKED:
            b_z += tl.where(t - (W - 1) + j >= first, xs[j], 0.0) * taps[j]
        else:
            b_z += xs[j] * taps[j]
    b_s = tl.sigmoid(b_z)
    b_dz = b_dy.to(tl.float32) * (b_s * (1.0 + b_z * (1.0 - b_s)))
    new_dxs, new_dws = (), ()
    for j in tl.static_range(0, W):
        b_dx, b_dw = b_dz * taps[j], b_dz * xs[j]
        if PACKED:
            b_dx = tl.where(t - (W - 1) + j >= first, b_dx, 0.0)
            b_dw = tl.where(t - (W - 1) + j >= first, b_dw, 0.0)
        new_dxs = new_dxs + (dxs[j] + b_dx,)
        if ADD_DW:
            new_dws = new_dws + (dws[j] + b_dw,)
        else:
            new_dws = new_dws + (dws[j],)
    return xs, new_dxs, new_dws


@triton.jit
def short_conv_bwd_store(dx, b_dx, t, begin, T, o_d, m_d, D: tl.constexpr):
    """Row t of dx, if it is one of the program's, which begin at `begin`."""
    o_t = tl.zeros_like(o_d) + t
    m_t = m_d & (o_t >= begin) & (o_t < T)
    tl.store(dx + tl.cast(t, tl.int64) * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["T"])
def short_conv_bwd_kernel(
    x, dy, weight, first, dx, dweights, T, stride_xb, stride_xt, stride_yb, stride_yt,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """
    BT tokens of BD channels, one after the other, BS loaded at a time.

    dx [B, T, D] contiguous; dweights [B programs, W, D]; first [T]. A token's input is in registers until W - 1 tokens
    have followed, and so is its dx until they have added to it: both are read and written once.
    """
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    x += i_b * stride_xb
    dy += i_b * stride_yb
    dx += i_b * T * D
    begin = i_t * BT
    end = begin + tl.cdiv(tl.minimum(BT, T - begin), BS) * BS
    o_0, b_0 = tl.zeros([BD], tl.int32), tl.zeros([BD], tl.float32)
    taps, dws, dxs, xs = (), (), (), (b_0,)
    for j in tl.static_range(0, W):
        taps = taps + (tl.load(weight + o_d * W + j, mask=m_d, other=0.0).to(tl.float32),)
        dws = dws + (b_0,)
        dxs = dxs + (b_0,)
    for j in tl.static_range(1, W):
        o_x = tl.cast(begin - W + j, tl.int64)
        xs = xs + (tl.load(x + o_x * stride_xt + o_d, mask=m_d & (o_0 + o_x >= 0), other=0.0).to(tl.float32),)
    for i_s in range(begin, end, BS):
        b_x, b_dy, b_first = short_conv_bwd_rows(x, dy, first, i_s, T, stride_xt, stride_yt, o_d, m_d, BS, PACKED)
        for i in tl.static_range(0, BS):
            t = i_s + i
            xs, dxs, dws = short_conv_bwd_token(b_x[i], b_dy[i], b_first[i], t, taps, xs, dxs, dws, W, True, PACKED)
            short_conv_bwd_store(dx, dxs[0], t - (W - 1), begin, T, o_d, m_d, D)
    if W > 1:
        # The tokens after those, for what they add to dx.
        b_x, b_dy, b_first = short_conv_bwd_rows(x, dy, first, end, T, stride_xt, stride_yt, o_d, m_d, W - 1, PACKED)
        for i in tl.static_range(0, W - 1):
            t = end + i
            xs, dxs, dws = short_conv_bwd_token(b_x[i], b_dy[i], b_first[i], t, taps, xs, dxs, dws, W, False, PACKED)
            short_conv_bwd_store(dx, dxs[0], t - (W - 1), begin, T, o_d, m_d, D)
    for j in tl.static_range(0, W):
        tl.store(dweights + ((i_b * tl.num_programs(1) + i_t) * W + j) * D + o_d, dws[j], mask=m_d)


@torch.library.custom_op(f"{_NAMESPACE}::short_conv_bwd", mutates_args=())
@launches_beside_first_argument
def short_conv_bwd(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, first: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [B, T, D], dweight [D, 1, W]) in the dtypes of x and weight; `first` [T] int32: see `first_tokens`."""
    (B, T, D), W = x.shape, weight.shape[-1]
    x, dy = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dy))
    BT, BS, BD = _PROGRAM_TOKENS, _LOADED_TOKENS, 256 if W <= 8 else 128  # a channel of W taps takes 4 W registers
    NT = triton.cdiv(T, BT)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    parts = torch.empty(B * NT, W, D, dtype=torch.float32, device=x.device)
    if dx.numel() > 0:
        short_conv_bwd_kernel[(triton.cdiv(D, BD), NT, B)](
            x, dy, weight.contiguous(), first, dx, parts, T, *x.stride()[:2], *dy.stride()[:2],
            D=D, W=W, BT=BT, BS=BS, BD=BD, PACKED=first is not None, num_warps=4,
        )  # fmt: skip
    return dx, parts.sum(0).t().contiguous().view(weight.shape).to(weight.dtype)


@short_conv_bwd.register_fake
def _(x, dy, weight, first):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def first_tokens(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Where the sequence of each of T tokens begins, [T] int32."""
    positions = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1].to(torch.int32)


def _add_window_gradient(
    dx: torch.Tensor, dwindow: torch.Tensor, lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """dx [B, T, D] plus what the new window [N, D, W - 1] took from each sequence's last inputs."""
    (B, T), width = dx.shape[:2], dwindow.shape[-1]
    if cu_seqlens is None:
        begins = torch.arange(B, device=dx.device) * T
        ends = begins + (T if lengths is None else lengths)
    else:
        begins, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    rows = ends[:, None] - width + torch.arange(width, device=dx.device)
    inside = rows >= begins[:, None]
    source = torch.where(inside[..., None], dwindow.transpose(1, 2), 0.0).to(dx.dtype)
    if T * B == 0:
        return dx
    return dx.flatten(0, 1).index_add(0, torch.where(inside, rows, 0).flatten(), source.flatten(0, 1)).view(dx.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, window, lengths, cu_seqlens = inputs
    ctx.has_window = window is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lengths, cu_seqlens)


def _backward(ctx: Any, dy: torch.Tensor | None, dwindow: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if ctx.has_window:
        raise RuntimeError("short_conv_fwd has no backward with a window: causal_short_conv goes through PyTorch then")
    x, weight, lengths, cu_seqlens = ctx.saved_tensors
    if dy is None:  # the window alone was used
        dx, dweight = torch.zeros_like(x), None
    else:
        first = None if cu_seqlens is None else first_tokens(cu_seqlens, x.shape[1])
        dx, dweight = short_conv_bwd(x, dy, weight, first)
    if dwindow is not None:
        dx = _add_window_gradient(dx, dwindow, lengths, cu_seqlens)
    return dx, dweight, None, None, None


def differentiate_short_conv(short_conv_fwd: Any) -> None:
    """Give the forward's operator its backward."""
    short_conv_fwd.register_autograd(_backward, setup_context=_setup_context)


__all__ = ["differentiate_short_conv", "first_tokens", "short_conv_bwd"]
