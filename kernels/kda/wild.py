"""
The part of a chunk's products that comes from wild channels, safe for any gate (device functions of stage 1).

    A_ij = scale sum_d q_id k_jd exp2(G_id - G_jd)      L_ij = sum_d k_id k_jd exp2(G_id - G_jd)      j < i

A channel is wild where its decay over the chunk is too strong for one reference per chunk (kda/intra.py). Wild
channels are gathered from q, k and the gate, BKW at a time: blocks of 2^BASE tokens about their midpoints and then,
for s = BASE, BASE + 1, ..., the pairs (i, j) whose highest differing token bit is s: j in the lower half and i in the
upper half of a block of 2^(s+1). With r the last token of the lower half

    exp2(G_i - G_j) = exp2(G_i - G_r) exp2(G_r - G_j)        both factors <= 1

and each token has one factor per level, so a level is one C x C product on tensor cores whose other entries are
dropped. The sums in the exponents run over just the tokens between (products with a 0/1 matrix), so nothing cancels.
"""

from ..gpu.arithmetic import rounded_dot
from .gate import kda_gate_log2

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

# In the products of wild channels one step's decay counts for at least 2^-30, far below the rounding of the sums it
# enters, so that blocks of 2^3 tokens span no more than 2^240, about whose midpoint both factors fit fp32 and bf16.
FLOOR = 30.0
BASE = 3


@triton.jit
def kda_token_sums(b_hi, b_lo, b_weights):
    """Sums over tokens: `b_weights` [C, C] chooses, `b_hi + b_lo` [C, BKW] are the log2 decays (fp16 pair: 22 bits)."""
    b_w = b_weights.to(tl.float16)
    return tl.dot(b_w, b_hi, acc=tl.dot(b_w, b_lo))


@triton.jit
def kda_levels(
    b_q, b_k, b_g, b_L, b_A, o_c,
    BASE: tl.constexpr, NS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """
    Add the channels' part of L and A: blocks of 2^BASE tokens about their midpoints, then level by level.

    Masks are said with a token's block n and its place r there: then many elements' are equal, and the compiler forms
    the weights of all levels once, before the loop over slices.
    """
    o_i, o_j = o_c[:, None], o_c[None, :]
    n_i, n_j, r_i, r_j = o_i >> BASE, o_j >> BASE, o_i & ((1 << BASE) - 1), o_j & ((1 << BASE) - 1)
    m_n = n_i == n_j
    b_hi = b_g.to(tl.float16)
    b_lo = (b_g - b_hi.to(tl.float32)).to(tl.float16)
    b_w = tl.where(m_n, tl.where(r_j <= r_i, 0.5, -0.5), 0.0)
    b_G = kda_token_sums(b_hi, b_lo, b_w)  # up to the token, less half of the block
    b_kt = tl.trans((b_k * tl.exp2(-b_G)).to(DTYPE))
    b_G = tl.exp2(b_G)
    m_s = m_n & (r_i > r_j)
    b_L += tl.where(m_s, rounded_dot(b_k * b_G, b_kt, None, DTYPE, PRECISION, UPCAST), 0.0)
    b_A += tl.where(m_s, rounded_dot(b_q * b_G, b_kt, None, DTYPE, PRECISION, UPCAST), 0.0)
    for s in range(BASE, NS):  # unrolled it ends in a trap: Triton 3.9, sm_100
        # Tokens between the token and the reference: up to it in an upper half, after it in a lower one.
        m_upper = ((n_i >> (s - BASE)) & 1) == 1
        b_r = tl.where(m_upper, tl.where(r_j <= r_i, 1.0, 0.0), tl.where(r_j > r_i, 1.0, 0.0))
        b_n = tl.where(((n_i >> (s - BASE)) == (n_j >> (s - BASE))) & tl.where(m_upper, n_j < n_i, n_j > n_i), 1.0, 0.0)
        b_between = tl.where(m_n, b_r, b_n)
        b_f = tl.exp2(kda_token_sums(b_hi, b_lo, b_between))
        b_kt = tl.trans((b_k * b_f).to(DTYPE))
        m_s = (((n_i ^ n_j) >> (s - BASE)) == 1) & m_upper
        b_L += tl.where(m_s, rounded_dot(b_k * b_f, b_kt, None, DTYPE, PRECISION, UPCAST), 0.0)
        b_A += tl.where(m_s, rounded_dot(b_q * b_f, b_kt, None, DTYPE, PRECISION, UPCAST), 0.0)
    return b_L, b_A


@triton.jit
def kda_wild_slice(
    q, k, g, dt_bias, a_head, b_rq, b_rk, b_L, b_A, o_c, o_k, n_t,
    stride_qt, stride_qk, stride_kt, stride_kk, stride_gt, stride_gk,
    K: tl.constexpr, FLOOR: tl.constexpr, BASE: tl.constexpr, NS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gather channels `o_k` of the chunk and add their part of L and A, any gate; `b_rq`, `b_rk` [C] normalise rows."""
    o_t, o_k = o_c[:, None], o_k[None, :]
    m_tk = (o_t < n_t) & (o_k < K)
    b_q = tl.load(q + o_t * stride_qt + o_k * stride_qk, mask=m_tk, other=0.0).to(tl.float32) * b_rq[:, None]
    b_k = tl.load(k + o_t * stride_kt + o_k * stride_kk, mask=m_tk, other=0.0).to(tl.float32) * b_rk[:, None]
    b_g = tl.load(g + o_t * stride_gt + o_k * stride_gk, mask=m_tk, other=float("-inf")).to(tl.float32)
    b_g = kda_gate_log2(b_g + tl.load(dt_bias + o_k, mask=o_k < K, other=0.0).to(tl.float32), a_head)
    b_g = tl.where(b_g < -FLOOR, -FLOOR, b_g)
    return kda_levels(b_q, b_k, b_g, b_L, b_A, o_c, BASE, NS, DTYPE, PRECISION, UPCAST)
