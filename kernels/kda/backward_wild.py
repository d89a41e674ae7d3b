"""
Gradients through the products of a chunk's wild channels, safe for any gate (device functions of the backward's last
stage; the forward's side is wild, whose blocks and levels these are).

With T_ijd = (dA_ij q_id + dP_ij k_id) k_jd exp2(G_id - G_jd), j < i, what a chunk's pairs contribute is

    dq_id = sum_j dA_ij k_jd exp2(.)
    dk_id = sum_j dP_ij k_jd exp2(.) + sum_i' (dA_i'i q_i'd + dP_i'i k_i'd) exp2(.)
    dg_id = sum over pairs (i', j) with j < i <= i' of T_i'jd

At a level's border r both factors of exp2(G_i' - G_r) exp2(G_r - G_j) are <= 1, and the pairs across the border
contribute to dg by a sum from i to the end of the upper half, or from the start of the lower half to i: no term that
the gate of i doesn't decay enters, so nothing cancels. Inside the blocks of 2^BASE tokens dg is a sum from the end of
terms that belong to an upper and, negated, to a lower token; operands are rounded before, so both are the same to fp32.
"""

from ..gpu.arithmetic import rounded_dot, rounded_operand
from .gate import kda_gate_log2
from .wild import kda_token_sums

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

# As the forward's, but both factors of a block stay within 2^96: gradients of 2^30 fit beside them in fp32.
FLOOR = 24.0


@triton.jit
def kda_block_bwd(
    b_q, b_k, b_hi, b_lo, b_dA, b_dP, o_c,
    BASE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg [C, BKW] of the pairs inside blocks of 2^BASE tokens, about the blocks' midpoints."""
    o_i, o_j = o_c[:, None], o_c[None, :]
    m_n = (o_i >> BASE) == (o_j >> BASE)
    b_G = kda_token_sums(b_hi, b_lo, tl.where(m_n, tl.where(o_j <= o_i, 0.5, -0.5), 0.0))
    b_up, b_down = tl.exp2(b_G), tl.exp2(-b_G)
    b_xq = rounded_operand(b_q * b_up, DTYPE, PRECISION)
    b_xk = rounded_operand(b_k * b_up, DTYPE, PRECISION)
    b_xg = rounded_operand(b_k * b_down, DTYPE, PRECISION)
    b_dA = tl.where(m_n, b_dA, 0.0)
    b_dP = tl.where(m_n, b_dP, 0.0)
    b_aq = rounded_dot(b_dA, b_xg, None, DTYPE, PRECISION, UPCAST)
    b_ak = rounded_dot(b_dP, b_xg, None, DTYPE, PRECISION, UPCAST)
    b_bk = rounded_dot(tl.trans(b_dA), b_xq, None, DTYPE, PRECISION, UPCAST)
    b_bk = rounded_dot(tl.trans(b_dP), b_xk, b_bk, DTYPE, PRECISION, UPCAST)
    b_x = b_xq.to(tl.float32) * b_aq + b_xk.to(tl.float32) * b_ak - b_xg.to(tl.float32) * b_bk
    return b_up * b_aq, b_up * b_ak + b_down * b_bk, tl.cumsum(b_x, axis=0, reverse=True)


@triton.jit
def kda_levels_bwd(
    b_q, b_k, b_g, b_dA, b_dP, o_c,
    BASE: tl.constexpr, NS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, dk (of the normalised rows) and dg [C, BKW], from dA and dP, strictly lower and rounded as operands."""
    o_i, o_j = o_c[:, None], o_c[None, :]
    b_hi = b_g.to(tl.float16)
    b_lo = (b_g - b_hi.to(tl.float32)).to(tl.float16)
    b_dq, b_dk, b_dg = kda_block_bwd(b_q, b_k, b_hi, b_lo, b_dA, b_dP, o_c, BASE, DTYPE, PRECISION, UPCAST)
    for s in range(BASE, NS):
        # Pairs: i in the upper, j in the lower half of a block of 2^(s+1) tokens. Both halves' tokens sum their own.
        m_half = (o_i >> s) == (o_j >> s)
        m_upper = ((o_i >> s) & 1) == 1
        b_between = tl.where(m_half & tl.where(m_upper, o_j <= o_i, o_j > o_i), 1.0, 0.0)
        b_f = tl.exp2(kda_token_sums(b_hi, b_lo, b_between))
        m_pairs = (((o_i ^ o_j) >> s) == 1) & m_upper
        b_xq = rounded_operand(b_q * b_f, DTYPE, PRECISION)
        b_xk = rounded_operand(b_k * b_f, DTYPE, PRECISION)
        b_dA1 = tl.where(m_pairs, b_dA, 0.0)
        b_dP1 = tl.where(m_pairs, b_dP, 0.0)
        b_aq = rounded_dot(b_dA1, b_xk, None, DTYPE, PRECISION, UPCAST)
        b_ak = rounded_dot(b_dP1, b_xk, None, DTYPE, PRECISION, UPCAST)
        b_bk = rounded_dot(tl.trans(b_dA1), b_xq, None, DTYPE, PRECISION, UPCAST)
        b_bk = rounded_dot(tl.trans(b_dP1), b_xk, b_bk, DTYPE, PRECISION, UPCAST)
        b_dq += b_f * b_aq
        b_dk += b_f * (b_ak + b_bk)
        # b_aq, b_ak are 0 in lower halves and b_bk in upper ones.
        b_x = b_xq.to(tl.float32) * b_aq + b_xk.to(tl.float32) * (b_ak + b_bk)
        b_across = tl.where(m_half & tl.where(m_upper, o_j >= o_i, o_j < o_i), 1.0, 0.0)
        b_dg = rounded_dot(b_across, b_x, b_dg, DTYPE, PRECISION, UPCAST)
    return b_dq, b_dk, b_dg


@triton.jit
def kda_wild_slice_bwd(
    q, k, g, dt_bias, a_head, b_rq, b_rk, b_dA, b_dP, dq, dk, dg, o_c, o_k, n_t,
    stride_qt, stride_qk, stride_kt, stride_kk, stride_gt, stride_gk,
    H: tl.constexpr, K: tl.constexpr, FLOOR: tl.constexpr, BASE: tl.constexpr, NS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """
    Gather channels `o_k` of the chunk and write their pairs' part to `dq`, `dk`, `dg` (contiguous [B, T, H, K]).

    `b_rq`, `b_rk` [C] normalise rows; what is written is the gradient of the normalised rows and of the log decays.
    """
    o_t, o_k = o_c[:, None], o_k[None, :]
    m_tk = (o_t < n_t) & (o_k < K)
    b_q = tl.load(q + o_t * stride_qt + o_k * stride_qk, mask=m_tk, other=0.0).to(tl.float32) * b_rq[:, None]
    b_k = tl.load(k + o_t * stride_kt + o_k * stride_kk, mask=m_tk, other=0.0).to(tl.float32) * b_rk[:, None]
    b_g = tl.load(g + o_t * stride_gt + o_k * stride_gk, mask=m_tk, other=float("-inf")).to(tl.float32)
    b_g = kda_gate_log2(b_g + tl.load(dt_bias + o_k, mask=o_k < K, other=0.0).to(tl.float32), a_head)
    b_g = tl.where(b_g < -FLOOR, -FLOOR, b_g)
    b_dq, b_dk, b_dg = kda_levels_bwd(b_q, b_k, b_g, b_dA, b_dP, o_c, BASE, NS, DTYPE, PRECISION, UPCAST)
    o_tk = o_t * (H * K) + o_k
    tl.store(dq + o_tk, b_dq.to(dq.dtype.element_ty), mask=m_tk)
    tl.store(dk + o_tk, b_dk.to(dk.dtype.element_ty), mask=m_tk)
    tl.store(dg + o_tk, b_dg.to(dg.dtype.element_ty), mask=m_tk)
