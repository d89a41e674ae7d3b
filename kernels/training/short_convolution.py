"""
Gradients of the short convolution with SiLU, which keeps its input only (forward: kernels/prompt).

With z_t = sum_i weight[W - 1 - i] x_{t - i}, s = sigmoid(z) and dz_t = dy_t s (1 + z (1 - s)), inside one sequence:

    dx_t = sum_i weight[W - 1 - i] dz_{t + i}        dweight[W - 1 - i] = sum over t of dz_t x_{t - i}

in fp32, rounded once. A program computes dz of its tokens and of the W - 1 after them again from x; its part of dweight
is added to the others' afterwards in a fixed order. The window before a sequence is zeros: with one, PyTorch serves.
"""

from typing import Any

import torch

from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)
# Tokens of a program; each program gives one part of dweight.
_PROGRAM_TOKENS = 128


@triton.jit(do_not_specialize=["T"])
def short_conv_bwd_kernel(
    x, dy, weight, first, dx, dweights, T, stride_xb, stride_xt, stride_yb, stride_yt,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """BT tokens of BD channels, BS at a time. dx [B, T, D] contiguous; dweights [B programs, D, W]; first [T]."""
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    x += i_b * stride_xb
    dy += i_b * stride_yb
    dx += i_b * T * D
    o_w = tl.arange(0, BW)
    m_w = (o_d < D)[:, None] & (o_w < W)[None, :]
    b_taps = tl.load(weight + o_d[:, None] * W + o_w[None, :], mask=m_w, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BD, BW], tl.float32)
    for i_s in range(i_t * BT, tl.minimum(i_t * BT + BT, T), BS):
        o_t = i_s + tl.arange(0, BS)
        b_dx = tl.zeros([BS, BD], tl.float32)
        for i in tl.static_range(0, W):
            # dz of the tokens t + i. Loads are masked by their address alone, so that equal ones are made once.
            o_z = o_t + i
            b_first = tl.zeros([BS], tl.int32)
            if PACKED:
                b_first = tl.load(first + o_z, mask=o_z < T, other=0)
            b_z = tl.zeros([BS, BD], tl.float32)
            for j in tl.static_range(0, W):
                o_x = o_t + (i + j - W + 1)
                m_x = ((o_x >= 0) & (o_x < T))[:, None] & m_d
                b_x = tl.load(x + o_x.to(tl.int64)[:, None] * stride_xt + o_d[None, :], mask=m_x, other=0.0)
                if PACKED:
                    b_x = tl.where((o_x >= b_first)[:, None], b_x, 0.0)
                b_z += b_x.to(tl.float32) * tl.sum(tl.where(o_w[None, :] == j, b_taps, 0.0), axis=1)[None, :]
            p_y = dy + o_z.to(tl.int64)[:, None] * stride_yt + o_d[None, :]
            b_dz = tl.load(p_y, mask=(o_z < T)[:, None] & m_d, other=0.0).to(tl.float32)
            b_s = tl.sigmoid(b_z)
            b_dz *= b_s * (1.0 + b_z * (1.0 - b_s))
            if i == 0:
                for j in tl.static_range(0, W):
                    o_x = o_t + (j - W + 1)
                    m_x = ((o_x >= 0) & (o_x < T))[:, None] & m_d
                    b_x = tl.load(x + o_x.to(tl.int64)[:, None] * stride_xt + o_d[None, :], mask=m_x, other=0.0)
                    if PACKED:
                        b_x = tl.where((o_x >= b_first)[:, None], b_x, 0.0)
                    b_part = tl.sum(b_dz * b_x.to(tl.float32), axis=0)
                    b_dw += tl.where(o_w[None, :] == j, b_part[:, None], 0.0)
            if PACKED:
                b_dz = tl.where((o_t >= b_first)[:, None], b_dz, 0.0)
            b_dx += b_dz * tl.sum(tl.where(o_w[None, :] == W - 1 - i, b_taps, 0.0), axis=1)[None, :]
        p_x = dx + o_t.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(p_x, b_dx.to(dx.dtype.element_ty), mask=(o_t < T)[:, None] & m_d)
    p_w = dweights + ((i_b * tl.num_programs(1) + i_t) * D + o_d)[:, None] * W + o_w[None, :]
    tl.store(p_w, b_dw, mask=m_w)


@torch.library.custom_op(f"{_NAMESPACE}::short_conv_bwd", mutates_args=())
@launches_beside_first_argument
def short_conv_bwd(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, first: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [B, T, D], dweight [D, 1, W]) in the dtypes of x and weight; `first` [T] int32: see `first_tokens`."""
    (B, T, D), W = x.shape, weight.shape[-1]
    x, dy = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dy))
    BT, BS, BD = _PROGRAM_TOKENS, 8, 128
    NT = triton.cdiv(T, BT)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    parts = torch.empty(B * NT, D, W, dtype=torch.float32, device=x.device)
    if dx.numel() > 0:
        short_conv_bwd_kernel[(triton.cdiv(D, BD), NT, B)](
            x, dy, weight.contiguous(), first, dx, parts, T, *x.stride()[:2], *dy.stride()[:2],
            D=D, W=W, BT=BT, BS=BS, BD=BD, BW=power_of_two(W), PACKED=first is not None, num_warps=4,
        )  # fmt: skip
    return dx, parts.sum(0).view(weight.shape).to(weight.dtype)


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
