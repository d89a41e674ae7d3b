"""
The short convolution before KDA in one pass, on GPUs: depthwise, causal, with SiLU.

    y_t = round(silu(sum_i weight[W - 1 - i] * x_{t - i}))        accumulated in fp32

x [B, T, D] with dense channels and any other strides, weight [D, W] with tap W - 1 at the current token, window
[N, D, W - 1] the inputs before each sequence, oldest first. A sequence is a row, or a part of the only row between
two of `cu_seqlens` [N + 1]. The new window holds each sequence's last W - 1 inputs, of its first `lengths` tokens.
"""

import torch

from ..gpu.direct_calls import called_directly
from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import power_of_two
from ..training.short_convolution import differentiate_short_conv, first_tokens

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)
# Taps are unrolled.
MAX_WIDTH = 16


@triton.jit(do_not_specialize=["T"])
def short_conv_fwd_kernel(
    x, weight, first, y, T, stride_xb, stride_xt,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """BT tokens of BD channels, BS tokens at a time, as if zeros came before. first [T]: see `first_tokens`."""
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    x += i_b * stride_xb
    y += i_b * T * D
    # All taps before the loop: the stores in it would keep the compiler from moving loads out.
    o_w = tl.arange(0, BW)
    m_w = m_d[:, None] & (o_w < W)[None, :]
    b_taps = tl.load(weight + o_d[:, None] * W + o_w[None, :], mask=m_w, other=0.0).to(tl.float32)
    for i_s in range(i_t * BT, tl.minimum(i_t * BT + BT, T), BS):
        o_t = i_s + tl.arange(0, BS)
        m_t = o_t < T
        b_first = tl.zeros([BS], tl.int32)
        if PACKED:
            b_first = tl.load(first + o_t, mask=m_t, other=0)
        b_y = tl.zeros([BS, BD], tl.float32)
        for i in tl.static_range(0, W):
            o_s = o_t - (W - 1) + i
            m_x = (m_t & (o_s >= b_first))[:, None] & m_d[None, :]
            b_x = tl.load(x + o_s.to(tl.int64)[:, None] * stride_xt + o_d[None, :], mask=m_x, other=0.0)
            b_w = tl.sum(tl.where(o_w[None, :] == i, b_taps, 0.0), axis=1)
            b_y += b_x.to(tl.float32) * b_w[None, :]
        b_y *= tl.sigmoid(b_y)
        p_y = y + o_t.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def short_conv_input(x, window, o_s, o_d, m_d, stride_xt, D: tl.constexpr, W: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Inputs [BD] at token o_s ([BD], all equal) of the sequence that x begins with; before it, those of the window."""
    b_x = tl.load(x + o_s.to(tl.int64) * stride_xt + o_d, mask=m_d & (o_s >= 0), other=0.0)
    if HAS_WINDOW:
        b_w = tl.load(window + o_d * (W - 1) + (o_s + W - 1), mask=m_d & (o_s < 0), other=0.0)
        b_x = tl.where(o_s >= 0, b_x, b_w)
    return b_x


@triton.jit(do_not_specialize=["T"])
def short_conv_edges_fwd_kernel(
    x, weight, window, lengths, cu_seqlens, y, new_window, T, stride_xb, stride_xt,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sequence n, BD channels: y of its first W - 1 tokens, which the window reaches, and the window after it."""
    i_d, i_n = tl.program_id(1), tl.program_id(0).to(tl.int64)  # more than 65,535 sequences fit into the first only
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    n_t, n_y = T, T
    if PACKED:
        begin = tl.load(cu_seqlens + i_n).to(tl.int64)
        n_t = (tl.load(cu_seqlens + i_n + 1) - begin).to(tl.int32)
        n_y = n_t
        x += begin * stride_xt
        y += begin * D
    else:
        x += i_n * stride_xb
        y += i_n * T * D
    if HAS_LENGTHS:
        n_t = tl.load(lengths + i_n).to(tl.int32)
    window += i_n * D * (W - 1)
    new_window += i_n * D * (W - 1)
    o_0 = tl.zeros([BD], tl.int32)
    if HAS_WINDOW:
        for i_t in tl.static_range(0, W - 1):
            b_y = tl.zeros([BD], tl.float32)
            for i in tl.static_range(0, W):
                o_s = o_0 + (i_t - (W - 1) + i)
                m_s = m_d & (o_s < n_y)
                b_x = short_conv_input(x, window, o_s, o_d, m_s, stride_xt, D, W, HAS_WINDOW)
                b_y += b_x.to(tl.float32) * tl.load(weight + o_d * W + i, mask=m_d, other=0.0).to(tl.float32)
            b_y *= tl.sigmoid(b_y)
            tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d & (o_0 + i_t < n_y))
    for i in tl.static_range(0, W - 1):
        b_x = short_conv_input(x, window, o_0 + n_t - (W - 1) + i, o_d, m_d, stride_xt, D, W, HAS_WINDOW)
        tl.store(new_window + o_d * (W - 1) + i, b_x, mask=m_d)


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::short_conv_fwd", mutates_args=())
@launches_beside_first_argument
def short_conv_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    window: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [B, T, D], new window [N, D, W - 1]), both fresh, contiguous and in x's dtype; weight is [D, 1, W].

    `lengths` [B] and `cu_seqlens` [N + 1] are read on the device only. The window must have x's dtype.
    """
    (B, T, D), W = x.shape, weight.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, window = weight.contiguous(), None if window is None else window.contiguous()
    y = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    new_window = torch.empty(N, D, W - 1, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        first = None if cu_seqlens is None else first_tokens(cu_seqlens, T)
        BT, BD = 128, 128
        short_conv_fwd_kernel[(triton.cdiv(D, BD), triton.cdiv(T, BT), B)](
            x, weight, first, y, T, *x.stride()[:2],
            D=D, W=W, BT=BT, BS=16, BD=BD, BW=power_of_two(W), PACKED=cu_seqlens is not None, num_warps=4,
        )  # fmt: skip
    if new_window.numel() > 0:
        BD = 512
        short_conv_edges_fwd_kernel[(N, triton.cdiv(D, BD))](
            # Pointers that are not read still move by whole sequences.
            x, weight, new_window if window is None else window, lengths, cu_seqlens, y, new_window, T,
            *x.stride()[:2], D=D, W=W, BD=BD,
            HAS_WINDOW=window is not None, HAS_LENGTHS=lengths is not None, PACKED=cu_seqlens is not None, num_warps=4,
        )  # fmt: skip
    return y, new_window


@short_conv_fwd.register_fake
def _(x, weight, window, lengths, cu_seqlens):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(N, x.shape[2], weight.shape[2] - 1)


differentiate_short_conv(short_conv_fwd)


__all__ = ["MAX_WIDTH", "short_conv_fwd"]
