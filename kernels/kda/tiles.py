"""
The tiles of a chunk: what each token contributes alone, and the gate's sums (device functions of stage 1).

With G_i the cumulative log2 decay from the chunk's start to token i (inclusive), G_C that of the whole chunk, q and k
after l2norm, stage 1 writes for stage 2

    xq_i = scale q_i exp2(G_i)          xk_i = -k_i exp2(G_i)           xg_i = k_i exp2(G_C - G_i)           [C, K]
    decay = exp2(G_C), -0 for wild channels (below)                                                          [K], fp32

and keeps for the products inside the chunk the same factors about another reference h = G_C / 2,

    xq_i exp2(-h)                       xk_i exp2(-h)                   xg_i exp2(-h)                        [C, K]

where the chunk's decay is within SPAN: every factor stays within 2^(SPAN/2), and (xq exp2(-h)) (xg exp2(-h))^T are the
decays between two tokens exactly. Channels that decay further are "wild": for them the last tile is 0, `channels` lists
them, and kda/wild.py does their products. No exponent of what stage 2 sees is positive.

A chunk is NG groups of successive tokens. Loads take its rows so that a thread gets whole groups, where scans cost
nothing: NG is the number of rows that one load instruction of the program covers.
"""

from ..gpu.arithmetic import sigmoid
from .gate import kda_gate_log2_scaled

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

# Log2 decay of a channel over a chunk up to which one reference serves: its factors stay within 2^96, with room below
# for small entries of q and k.
SPAN = 192.0


@triton.jit
def kda_rows(
    q, k, beta, rows, scale, n_t, stride_qt, stride_qk, stride_kt, stride_kk, stride_bt,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write rows [4, C] = scale / |q|, 1 / |k|, scale q . k of the normalised rows, and beta, of a chunk's tokens."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)[None, :]
    o_t = o_c[:, None]
    m_tk = (o_t < n_t) & (o_k < K)
    b_q = tl.load(q + o_t * stride_qt + o_k * stride_qk, mask=m_tk, other=0.0).to(tl.float32)
    b_k = tl.load(k + o_t * stride_kt + o_k * stride_kk, mask=m_tk, other=0.0).to(tl.float32)
    b_rq = tl.rsqrt(tl.sum(b_q * b_q, axis=1) + 1e-6) * scale
    b_rk = tl.rsqrt(tl.sum(b_k * b_k, axis=1) + 1e-6)
    tl.store(rows + o_c, b_rq)
    tl.store(rows + C + o_c, b_rk)
    tl.store(rows + 2 * C + o_c, tl.sum(b_q * b_k, axis=1) * b_rq * b_rk)
    b_beta = tl.load(beta + o_c * stride_bt, mask=o_c < n_t, other=float("-inf"))
    tl.store(rows + 3 * C + o_c, sigmoid(b_beta.to(tl.float32)))


@triton.jit
def kda_in_order(b_x, NG: tl.constexpr):
    """Rows n, n + NG, ... of group n as rows of successive tokens."""
    C: tl.constexpr = b_x.shape[0]
    return tl.reshape(tl.permute(tl.reshape(b_x, [C // NG, NG, b_x.shape[1]]), (1, 0, 2)), [C, b_x.shape[1]])


@triton.jit
def kda_tiles(
    q, k, g, beta, dt_bias, a_head, scale, n_t,
    rows, xq, xk, xg, decay, channels,
    stride_qt, stride_qk, stride_kt, stride_kk, stride_gt, stride_gk, stride_bt,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, NG: tl.constexpr,
    SPAN: tl.constexpr, SUFFIX_SCAN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """
    Write a chunk's `rows` (see kda_rows), tiles and list of wild channels (module docstring); all pointers are at the
    chunk's start.

    Returns the three tiles about h in DTYPE and the number of wild channels.
    """
    R: tl.constexpr = C // NG
    o_x, o_k = tl.arange(0, C), tl.arange(0, BK)
    o_x = (o_x % NG) * R + o_x // NG  # token of a row: rows n, n + NG, ... are group n's, and one thread's
    o_t, o_k2 = o_x[:, None], o_k[None, :]
    m_tk = (o_t < n_t) & (o_k2 < K)
    b_g = tl.load(g + o_t * stride_gt + o_k2 * stride_gk, mask=m_tk, other=float("-inf"))  # on its way meanwhile
    kda_rows(q, k, beta, rows, scale, n_t, stride_qt, stride_qk, stride_kt, stride_kk, stride_bt, K, BK, C)
    tl.debug_barrier()  # `rows` was written by other threads
    b_bias = tl.load(dt_bias + o_k, mask=o_k < K, other=0.0).to(tl.float32) * 1.4426950408889634
    b_g = kda_gate_log2_scaled(b_g.to(tl.float32) * 1.4426950408889634 + b_bias[None, :], a_head)
    b_g = tl.reshape(b_g, [R, NG, BK])
    b_sum = tl.sum(b_g, axis=0)
    b_total = tl.sum(b_sum, axis=0)
    m_wild = b_total < -SPAN
    b_h = tl.where(m_wild, 0.0, 0.5 * b_total)
    b_before = tl.cumsum(b_sum, axis=0) - b_sum  # of the groups before
    b_up = tl.cumsum(b_g, axis=0) + (b_before - b_h[None, :])[None, :, :]
    if SUFFIX_SCAN:
        # Summed from the end: total less prefix cancels by up to 1e-4 in wild channels, which only fp32 can see.
        b_after = tl.cumsum(b_sum, axis=0, reverse=True) - b_sum - b_h[None, :]
        b_down = tl.reshape(tl.cumsum(b_g, axis=0, reverse=True) - b_g + b_after[None, :, :], [C, BK])
        b_up = tl.reshape(b_up, [C, BK])
    else:
        b_up = tl.reshape(b_up, [C, BK])
        b_down = tl.where(m_wild, b_total, 0.0)[None, :] - b_up
    b_e = tl.exp2(b_h)[None, :]
    # 2^-SPAN and less is 0 in fp32: the sign of this 0 tells the backward which channels are wild.
    b_decay = tl.exp2(b_total).to(tl.int32, bitcast=True)
    tl.store(decay + o_k, tl.where(m_wild, -2147483648, b_decay).to(tl.float32, bitcast=True))
    b_wild = m_wild.to(tl.int32)
    tl.store(channels + tl.cumsum(b_wild, axis=0) - 1, o_k.to(tl.int16), mask=m_wild)

    # In this order the fewest of these tiles are in registers at once.
    o_tk = o_t * BK + o_k2
    b_k = tl.load(k + o_t * stride_kt + o_k2 * stride_kk, mask=m_tk, other=0.0).to(tl.float32)
    b_k *= tl.load(rows + C + o_x)[:, None]
    b_xg = b_k * tl.exp2(b_down)
    tl.store(xg + o_tk, (b_xg * b_e).to(DTYPE))
    b_xg = kda_in_order((b_xg * tl.where(m_wild, 0.0, 1.0)[None, :]).to(DTYPE), NG)
    b_up = tl.exp2(b_up)
    b_k *= b_up
    tl.store(xk + o_tk, (-b_k * b_e).to(DTYPE))
    b_xk = kda_in_order(b_k.to(DTYPE), NG)
    b_q = tl.load(q + o_t * stride_qt + o_k2 * stride_qk, mask=m_tk, other=0.0).to(tl.float32)
    b_q *= tl.load(rows + o_x)[:, None]
    b_q *= b_up
    tl.store(xq + o_tk, (b_q * b_e).to(DTYPE))
    return kda_in_order(b_q.to(DTYPE), NG), b_xk, b_xg, tl.sum(b_wild, axis=0)
