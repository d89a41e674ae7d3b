"""
The short convolution in front of KDA in one pass, for inference on GPUs: depthwise, causal, with SiLU.

    y_t = round(silu(sum_i weight[W - 1 - i] * x_{t - i}))        accumulated in fp32

x [B, T, D] with dense channels and any other strides, weight [D, W] with tap W - 1 at the current token, window
[N, D, W - 1] the inputs in front of each sequence, oldest first. A sequence is a row, or a part of the only row between
two of `cu_seqlens` [N + 1]. The new window holds each sequence's last W - 1 inputs, of its first `lengths` tokens.
"""

import re

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    from .kda_triton_absent import tl, triton

# The file may be loaded twice in a process (package and Hub folder): each copy registers under its own name.
_NAMESPACE = "kimi_" + re.sub(r"\W", "_", __name__)
# Tokens of a program; only the first block of a row reads the window, so W - 1 must not exceed it.
_BT = 16
MAX_WIDTH = _BT + 1


@triton.jit(do_not_specialize=["T"])
def short_conv_fwd_kernel(
    x, weight, window, first, sequence, y, T, stride_xb, stride_xt,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """BT tokens of BD channels. first, sequence [T]: where each token's sequence begins, and its number (packed)."""
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    x += i_b * stride_xb
    b_first, b_sequence = tl.zeros([BT], tl.int32), tl.zeros([BT], tl.int64) + i_b
    if PACKED:
        b_first = tl.load(first + o_t, mask=m_t, other=0)
        b_sequence = tl.load(sequence + o_t, mask=m_t, other=0)
    b_y = tl.zeros([BT, BD], tl.float32)
    for i in tl.static_range(0, W):
        o_s = o_t - (W - 1) + i
        m_x = m_t & (o_s >= b_first)
        p_x = x + o_s.to(tl.int64)[:, None] * stride_xt + o_d[None, :]
        b_x = tl.load(p_x, mask=m_x[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        if HAS_WINDOW:  # noqa: SIM102 - decided while compiling, the next one while running
            if (i_t == 0) | PACKED:
                p_w = window + (b_sequence[:, None] * D + o_d[None, :]) * (W - 1) + (o_s - b_first + W - 1)[:, None]
                m_w = m_t & (o_s < b_first)
                b_x += tl.load(p_w, mask=m_w[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_y += b_x * tl.load(weight + o_d * W + i, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_y *= tl.sigmoid(b_y)
    p_y = y + (i_b * T + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["T"])
def short_conv_window_fwd_kernel(
    x, window, lengths, cu_seqlens, new_window, T, stride_xb, stride_xt,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The window behind sequence n: BD channels a program."""
    i_d, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    n_t = T
    if HAS_LENGTHS:
        n_t = tl.load(lengths + i_n).to(tl.int32)
    if PACKED:
        begin = tl.load(cu_seqlens + i_n)
        n_t = (tl.load(cu_seqlens + i_n + 1) - begin).to(tl.int32)
        x += begin.to(tl.int64) * stride_xt
    else:
        x += i_n * stride_xb
    for i in tl.static_range(0, W - 1):
        o_s = tl.zeros([BD], tl.int32) + n_t - (W - 1) + i
        b_x = tl.load(x + o_s.to(tl.int64) * stride_xt + o_d, mask=m_d & (o_s >= 0), other=0.0)
        if HAS_WINDOW:
            p_w = window + (i_n * D + o_d) * (W - 1) + (n_t + i)
            b_x = tl.where(o_s >= 0, b_x, tl.load(p_w, mask=m_d & (o_s < 0), other=0.0))
        tl.store(new_window + (i_n * D + o_d) * (W - 1) + i, b_x, mask=m_d)


@torch.library.custom_op(f"{_NAMESPACE}::short_conv_fwd", mutates_args=())
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
    flags = {"HAS_WINDOW": window is not None and W > 1, "PACKED": cu_seqlens is not None}
    if y.numel() > 0:
        first, sequence = (None, None) if cu_seqlens is None else _sequences(cu_seqlens, T)
        BD = 128
        short_conv_fwd_kernel[(triton.cdiv(D, BD), triton.cdiv(T, _BT), B)](
            x, weight, window, first, sequence, y, T, *x.stride()[:2], D=D, W=W, BT=_BT, BD=BD, **flags, num_warps=4
        )
    if new_window.numel() > 0:
        BD = 1024
        short_conv_window_fwd_kernel[(triton.cdiv(D, BD), N)](
            x, window, lengths, cu_seqlens, new_window, T, *x.stride()[:2],
            D=D, W=W, BD=BD, HAS_LENGTHS=lengths is not None, **flags, num_warps=4,
        )  # fmt: skip
    return y, new_window


@short_conv_fwd.register_fake
def _(x, weight, window, lengths, cu_seqlens):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(N, x.shape[2], weight.shape[2] - 1)


def _sequences(cu_seqlens: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(first token of its sequence int32, number of its sequence int64) of each of T tokens."""
    positions = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, positions, right=True) - 1
    return cu_seqlens[sequence].to(torch.int32), sequence


__all__ = ["MAX_WIDTH", "short_conv_fwd"]
