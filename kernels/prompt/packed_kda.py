"""
KDA of a packed prompt around its recurrence: what comes before and after kda/intra.py and kda/inter.py, one pass each.

    conv      y_t = round(silu(sum_i w[W - 1 - i] x_{t - i}))      of q, k and v in one launch, fp32 sums
    window    the last W - 1 inputs of each sequence, into the cache
    norm      y = round(w o / sqrt(mean(o^2) + eps) sigmoid(gate))                   (arXiv 2510.26692, eq. 10)

T tokens of N sequences lie end to end: sequence n has tokens cu_seqlens[n] .. cu_seqlens[n + 1], and `rows` [T] int32
says which sequence a token is of, -1 for padding, which is neither read nor written. Inputs from before a sequence are
in the window that the cache holds for it: `table` [4] int64 has the address of the windows [N, 3 H K, W - 1] (q, k and
v in this order, oldest first) in its second place. All of q, k and v have H heads of K channels.
"""

import torch

from ..gpu.sizes import padded, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit(do_not_specialize=["T"])
def packed_conv_fwd_kernel(
    x, weight_q, weight_k, weight_v, table, rows, cu_seqlens, y, T, stride_x,
    D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (BD channels of q, k or v, BT tokens). x [T, at least 3 D] with dense rows; y [T, 3 D] contiguous."""
    NB: tl.constexpr = (D + BD - 1) // BD
    i_part, i_t = tl.program_id(0) // NB, tl.program_id(1)
    weight = weight_q
    if i_part == 1:
        weight = weight_k
    if i_part == 2:
        weight = weight_v
    o_d, o_w = tl.program_id(0) % NB * BD + tl.arange(0, BD), tl.arange(0, BW)
    m_d = o_d < D
    b_taps = tl.load(weight + o_d[:, None] * W + o_w[None, :], mask=m_d[:, None] & (o_w < W)[None, :], other=0.0).to(
        tl.float32
    )
    o_c = i_part * D + o_d
    o_t = i_t * BT + tl.arange(0, BT)
    b_row = tl.load(rows + o_t, mask=o_t < T, other=-1)
    m_t = b_row >= 0
    b_first = tl.load(cu_seqlens + b_row, mask=m_t, other=0).to(tl.int32)
    window = tl.load(table + 1).to(tl.pointer_type(x.dtype.element_ty))
    p_window = window + b_row.to(tl.int64)[:, None] * (3 * D * (W - 1)) + o_c[None, :] * (W - 1)
    b_y = tl.zeros([BT, BD], tl.float32)
    for i in tl.static_range(0, W):
        o_s = o_t - (W - 1) + i
        m_x = (m_t & (o_s >= b_first))[:, None] & m_d[None, :]
        m_w = (m_t & (o_s < b_first))[:, None] & m_d[None, :]
        b_x = tl.load(x + o_s.to(tl.int64)[:, None] * stride_x + o_c[None, :], mask=m_x, other=0.0)
        b_x += tl.load(p_window + (o_s - b_first + (W - 1))[:, None], mask=m_w, other=0.0)
        b_tap = tl.sum(tl.where(o_w[None, :] == i, b_taps, 0.0), axis=1)
        b_y += b_x.to(tl.float32) * b_tap[None, :]
    b_y *= tl.sigmoid(b_y)
    p_y = y + o_t.to(tl.int64)[:, None] * (3 * D) + o_c[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def packed_window_fwd_kernel(
    x, table, cu_seqlens, stride_x, CHANNELS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr
):
    """Program (BD channels, sequence): its window in the cache, in place. x [T, at least CHANNELS], dense rows."""
    i_n = tl.program_id(1).to(tl.int64)
    begin, end = tl.load(cu_seqlens + i_n).to(tl.int32), tl.load(cu_seqlens + i_n + 1).to(tl.int32)
    if end <= begin:
        return
    o_d, o_w = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BW)
    m_d = o_d < CHANNELS
    window = tl.load(table + 1).to(tl.pointer_type(x.dtype.element_ty)) + i_n * (CHANNELS * (W - 1))
    p_window = window + o_d[:, None] * (W - 1)
    o_s = end - (W - 1) + o_w  # slot i takes this token; one before `begin` is an input that the window holds
    m_s = m_d[:, None] & (o_w < W - 1)[None, :]
    m_new = m_s & (o_s >= begin)[None, :]
    b_new = tl.load(x + o_s.to(tl.int64)[None, :] * stride_x + o_d[:, None], mask=m_new, other=0.0)
    b_old = tl.load(p_window + (o_s - begin + (W - 1))[None, :], mask=m_s & (o_s < begin)[None, :], other=0.0)
    tl.debug_barrier()  # all read before any is written: other threads may read what this one writes
    tl.store(p_window + o_w[None, :], b_new + b_old, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def packed_gated_norm_fwd_kernel(
    o, gate, weight, y, rows, T, stride_g, eps,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM heads of tokens a program. o and y [T, H, V] contiguous, gate [T, at least H V] with dense rows."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_t, o_v = o_m // H, tl.arange(0, BV)
    m_t = tl.load(rows + o_t, mask=o_t < T, other=-1) >= 0
    m_mv = m_t[:, None] & (o_v < V)[None, :]
    b_o = tl.load(o + o_m[:, None] * V + o_v[None, :], mask=m_mv, other=0.0).to(tl.float32)
    b_g = tl.load(gate + (o_t * stride_g + o_m % H * V)[:, None] + o_v[None, :], mask=m_mv, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    b_o *= tl.rsqrt(tl.sum(b_o * b_o, axis=1) / V + eps)[:, None]
    tl.store(y + o_m[:, None] * V + o_v[None, :], (b_w[None, :] * b_o * tl.sigmoid(b_g)).to(y.dtype.element_ty), m_mv)


def packed_conv_fwd(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    rows: torch.Tensor,
    cu_seqlens: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Write y [T, 3 D] contiguous, but for padding.

    Args:
        x: [T, at least 3 D], rows dense: the raw projections q, k, v side by side.
        weights: of the three convolutions, [D, 1, W] each, contiguous, in any dtype.
        table: [4] int64 (module docstring).
        rows: [T] int32.
        cu_seqlens: [N + 1] int32.
    """
    (D, _, W), T = weights[0].shape, x.shape[0]
    BT, BD = 16, min(128, padded(D))
    packed_conv_fwd_kernel[(3 * triton.cdiv(D, BD), triton.cdiv(T, BT))](
        x, *weights, table, rows, cu_seqlens, y, T, x.stride(0), D=D, W=W, BW=power_of_two(W), BT=BT, BD=BD, num_warps=4
    )


def packed_window_fwd(x: torch.Tensor, table: torch.Tensor, cu_seqlens: torch.Tensor, channels: int, W: int) -> None:
    """Move the cache's windows [N, channels, W - 1] on over x [T, at least `channels`]; after `packed_conv_fwd`."""
    if W > 1:
        BD = 256
        packed_window_fwd_kernel[(triton.cdiv(channels, BD), cu_seqlens.shape[0] - 1)](
            x, table, cu_seqlens, x.stride(0), CHANNELS=channels, W=W, BW=power_of_two(W - 1), BD=BD, num_warps=4
        )


def packed_gated_norm_fwd(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, eps: float
) -> None:
    """Write y [T, H, V] contiguous, but for padding, from o of the same shape and gate [T, H V], rows dense."""
    T, H, V = o.shape
    BV = padded(V)
    BM = max(1, 2048 // BV)
    packed_gated_norm_fwd_kernel[(triton.cdiv(T * H, BM),)](
        o, gate, weight, y, rows, T, gate.stride(0), eps, H=H, V=V, BV=BV, BM=BM, num_warps=4
    )


__all__ = ["packed_conv_fwd", "packed_gated_norm_fwd", "packed_window_fwd"]
