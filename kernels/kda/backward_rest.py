"""
KDA backward, stage 4 of 4: everything else that a chunk can do alone once the states at its borders and their
gradients are known. One program per chunk, head and block of BK key channels: nothing here mixes channels.

S is the state before the chunk, dS' the gradient of the state after it, U and dV the chunk's writes and their gradients
(backward_scan), dO that of the outputs, dA and dP those of the products (backward_pairs); q, k normalised, q
scaled; G_i the cumulative log decay. Then

    dq_i = exp(G_i) (dO S^T)_i                              + sum_j dA_ij k_j exp(G_i - G_j)
    dk_i = exp(G_C - G_i) (U dS'^T)_i - exp(G_i) (dV S^T)_i + sum_j dP_ij k_j exp(G_i - G_j)
                                                            + sum_j (dA_ji q_j + dP_ji k_j) exp(G_j - G_i)
    dg_i = all that the decay of token i shrinks: sum over i' >= i of exp(G_i') (q_i' dO S^T - k_i' dV S^T)
           + sum over j < i of exp(G_C - G_j) k_j U dS'^T + exp(G_C) sum_v S dS' + pairs i' >= i > j (dA, dP)

and through l2norm, softplus and exp(A_log) to the inputs. The pairs of tame channels are products of tiles about one
reference, as in tiles; there the pairs before and after a token cancel in dg, which is exact to fp32 because operands
are rounded before they are used on either side. Wild channels' pairs are in dq, dk and dg already. A gate at its floor
(2^-48, see kda_gate_log2) has gradient 0.

Sums over all tokens (dA_log, ddt_bias) leave as one entry per chunk; the caller adds these up in a fixed order.
"""

import torch

from ..gpu.arithmetic import rounded_dot, rounded_operand
from ..gpu.launching import launch, launch_options
from ..gpu.sizes import alignment
from .configs import KdaRestConfig
from .gate import kda_gate_log2_scaled
from .index import Segment, kda_chunk_place

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def kda_value_products(
    do, dv, u, states, dstates, o_c, o_k, n_t,
    H: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S dO^T, S dV^T, dS' U^T [BK, C] and sum_v S dS' [BK], fp32."""
    b_q = tl.zeros([BK, C], tl.float32)
    b_k = tl.zeros([BK, C], tl.float32)
    b_g = tl.zeros([BK, C], tl.float32)
    b_kept = tl.zeros([BK], tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        m_tv = (o_c < n_t)[:, None] & (o_v < V)[None, :]
        o_tv = o_c[:, None] * (H * V) + o_v[None, :]
        o_kv = o_k[:, None] * VP + o_v[None, :]
        b_s = tl.load(states + o_kv)
        b_ds = tl.load(dstates + o_kv)
        b_do = tl.trans(tl.load(do + o_tv, mask=m_tv, other=0.0))
        b_dv = tl.trans(tl.load(dv + o_tv, mask=m_tv, other=0.0))
        b_u = tl.trans(tl.load(u + o_c[:, None] * VP + o_v[None, :]))
        b_q = rounded_dot(b_s, b_do, b_q, DTYPE, PRECISION, UPCAST)
        b_k = rounded_dot(b_s, b_dv, b_k, DTYPE, PRECISION, UPCAST)
        b_g = rounded_dot(b_ds, b_u, b_g, DTYPE, PRECISION, UPCAST)
        b_kept += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
    return b_q, b_k, b_g, b_kept


@triton.jit
def kda_load_chunk(x, stride_t, stride_k, n_t, o_c, o_k, K: tl.constexpr):
    """A chunk's rows [C, BK] as they are in memory; 0 outside."""
    m_tk = (o_c < n_t)[:, None] & (o_k < K)[None, :]
    return tl.load(x + o_c[:, None] * stride_t + o_k[None, :] * stride_k, mask=m_tk, other=0.0)


@triton.jit
def kda_columns(b_x, o_c, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """
    The transpose of `b_x` [C, BK] in fp32; bf16 must be finite.

    The product with 1 leaves bf16 as it is and brings it to where the other products' results are (registers of
    tensor cores), so that all that follows is computed there. Its operands come out of shared memory as they lie:
    loaded transposed instead, Triton 3.6 reads past the tile's end (sm_90, 64 channels, 4 warps).
    """
    if tl.bfloat16 == DTYPE:
        b_one = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)
        return rounded_dot(tl.trans(b_x), b_one, None, DTYPE, "tf32", UPCAST)
    return tl.trans(b_x.to(tl.float32))


@triton.jit
def kda_logits(b_g, dt_bias, n_t, o_c, o_k, K: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Biased gate logits of a chunk over ln 2, [BK, C] in fp32, from the logits as loaded; -inf outside."""
    # An infinite logit is as good as 1e30, and 0 times that is 0.
    b_g = tl.minimum(tl.maximum(b_g.to(tl.float32), -1e30), 1e30).to(DTYPE)
    b_bias = tl.load(dt_bias + o_k, mask=o_k < K, other=0.0).to(tl.float32) * 1.4426950408889634
    b_y = kda_columns(b_g, o_c, DTYPE, UPCAST) * 1.4426950408889634 + b_bias[:, None]
    return tl.where((o_k < K)[:, None] & (o_c < n_t)[None, :], b_y, float("-inf"))


@triton.jit(do_not_specialize=["T", "NT", "t_begin", "first", "first_sum", "stride_qb", "stride_kb", "stride_gb"])
def kda_rest_bwd_kernel(
    q, k, g, do, dv,
    states, dstates, u, radial, decay, dA, dP, rows, A_log, dt_bias,
    dq, dk, dg, dA_log, ddt_bias,
    cu_seqlens, chunk_offsets, chunk_seq,
    T, NT, t_begin, first, first_sum,
    stride_qb: tl.int64, stride_qt, stride_qh, stride_qk,
    stride_kb: tl.int64, stride_kt, stride_kh, stride_kk,
    stride_gb: tl.int64, stride_gt, stride_gh, stride_gk,
    ALIGN: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, SUFFIX_SCAN: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    See the module docstring. do, dv, dq, dk, dg are contiguous [B, T, H, ...]; dA_log [., H, blocks] and ddt_bias
    [., H, K] take entries from `first_sum` on.
    """
    NB: tl.constexpr = KP // BK
    i_k, i_c, i_h = tl.program_id(0) % NB, tl.program_id(0) // NB, tl.program_id(1)
    i_b, t0, n_t = kda_chunk_place(cu_seqlens, chunk_offsets, chunk_seq, i_c, T, NT, t_begin, C, PACKED)
    o_c, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    i_sum = (first_sum + i_c).to(tl.int64) * H + i_h
    if n_t <= 0:  # of a pack's index, an entry after the last chunk
        tl.store(dA_log + i_sum * NB + i_k, 0.0)
        tl.store(ddt_bias + i_sum * K + o_k, tl.zeros([BK], tl.float32), mask=o_k < K)
        return
    i_tile = (first + i_c).to(tl.int64) * H + i_h
    i_t = (i_b * T + t0) * H + i_h
    i_h64 = i_h.to(tl.int64)  # heads may lie T K elements apart
    q += tl.multiple_of(i_b * stride_qb, ALIGN) + t0 * stride_qt + i_h64 * stride_qh
    k += tl.multiple_of(i_b * stride_kb, ALIGN) + t0 * stride_kt + i_h64 * stride_kh
    g += tl.multiple_of(i_b * stride_gb, ALIGN) + t0 * stride_gt + i_h64 * stride_gh
    do += i_t * V
    dv += i_t * V
    dq += i_t * K
    dk += i_t * K
    dg += i_t * K
    states += i_tile * (VP * KP)
    dstates += i_tile * (VP * KP)
    u += i_tile * (VP * C)
    rows += i_tile * (4 * C)
    radial += i_tile * (2 * C)
    dt_bias += i_h * K
    a_head = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    m_kt = (o_k < K)[:, None] & (o_c < n_t)[None, :]
    o_kt = o_c[None, :] * (H * K) + o_k[:, None]

    # On their way during the products with the states.
    b_g = kda_load_chunk(g, stride_gt, stride_gk, n_t, o_c, o_k, K)
    b_k = kda_load_chunk(k, stride_kt, stride_kk, n_t, o_c, o_k, K)
    b_q = kda_load_chunk(q, stride_qt, stride_qk, n_t, o_c, o_k, K)
    b_dq, b_dk, b_x, b_kept = kda_value_products(
        do, dv, u, states, dstates, o_c, o_k, n_t, H, V, BK, VP, BV, C, DTYPE, PRECISION, UPCAST, STAGES
    )
    b_gate = kda_gate_log2_scaled(kda_logits(b_g, dt_bias, n_t, o_c, o_k, K, DTYPE, UPCAST), a_head)
    b_total = tl.sum(b_gate, axis=1)
    b_wild = tl.load(decay + i_tile * KP + o_k).to(tl.int32, bitcast=True)  # its sign, see tiles
    m_wild = b_wild < 0
    n_wild = tl.sum(m_wild.to(tl.int32), axis=0)
    # Factors about h, half of the chunk's decay, as in tiles.
    b_h = tl.where(m_wild, 0.0, 0.5 * b_total)
    b_up = tl.cumsum(b_gate, axis=1) - b_h[:, None]
    if SUFFIX_SCAN:
        # Summed from the end: total less prefix cancels by up to 1e-4 in wild channels, which only fp32 can see.
        b_down = tl.cumsum(b_gate, axis=1, reverse=True) - b_gate - b_h[:, None]
    else:
        b_down = tl.where(m_wild, b_total, 0.0)[:, None] - b_up
    o_cc = i_tile * (C * C) + o_c[:, None] * C + o_c[None, :]
    b_dA, b_dP = tl.load(dA + o_cc), tl.load(dP + o_cc)
    b_e = tl.exp2(b_h)[:, None]  # from h to the borders
    b_kept *= tl.exp2(b_total)
    m_tame = (b_wild >= 0)[:, None]
    b_k = kda_columns(b_k, o_c, DTYPE, UPCAST) * tl.load(rows + C + o_c)[None, :]
    b_xg = rounded_operand(b_k * tl.exp2(b_down), DTYPE, PRECISION)
    b_x *= b_e
    b_before = b_xg.to(tl.float32) * b_x
    b_tame = tl.where(m_tame, b_xg, 0.0)
    b_dq = rounded_dot(b_tame, tl.trans(b_dA), b_dq * b_e, DTYPE, PRECISION, UPCAST)
    b_dk = rounded_dot(b_tame, tl.trans(b_dP), b_dk * -b_e, DTYPE, PRECISION, UPCAST)
    if SUFFIX_SCAN:
        b_dg = b_before
    else:
        b_kept += tl.sum(b_before, axis=1)
    b_xk = rounded_operand(b_k * tl.exp2(b_up), DTYPE, PRECISION)
    b_pairs = b_xk.to(tl.float32) * b_dk
    b_x = rounded_dot(tl.where(m_tame, b_xk, 0.0), b_dP, b_x, DTYPE, PRECISION, UPCAST)
    b_q = kda_columns(b_q, o_c, DTYPE, UPCAST) * tl.load(rows + o_c)[None, :]
    b_xq = rounded_operand(b_q * tl.exp2(b_up), DTYPE, PRECISION)
    b_pairs += b_xq.to(tl.float32) * b_dq
    b_x = rounded_dot(tl.where(m_tame, b_xq, 0.0), b_dA, b_x, DTYPE, PRECISION, UPCAST)
    if SUFFIX_SCAN:
        b_pairs -= b_xg.to(tl.float32) * b_x
        b_dg = tl.cumsum(b_pairs + b_dg, axis=1, reverse=True) + tl.cumsum(b_dg, axis=1) - b_dg + b_kept[:, None]
    else:
        # exp2(b_down) and b_xg, written so that the compiler forms them again instead of keeping registers busy.
        b_again = tl.exp2(-(b_up - tl.where(m_wild, b_total, 0.0)[:, None]))
        b_pairs -= rounded_operand(b_k * b_again, DTYPE, PRECISION).to(tl.float32) * b_x
        b_dg = (tl.sum(b_pairs, axis=1) + b_kept)[:, None] - (tl.cumsum(b_pairs, axis=1) - b_pairs)
    m_wkt = m_kt & m_wild[:, None]
    if n_wild > 0:
        b_dg += tl.load(dg + o_kt, mask=m_wkt, other=0.0).to(tl.float32)
        tl.debug_barrier()  # read before other threads write over it
    # Logits, q and k are loaded again, not kept: registers are what this kernel lacks.
    b_g = kda_load_chunk(g, stride_gt, stride_gk, n_t, o_c, o_k, K)
    b_y = kda_logits(b_g, dt_bias, n_t, o_c, o_k, K, DTYPE, UPCAST)
    b_k1 = kda_load_chunk(k, stride_kt, stride_kk, n_t, o_c, o_k, K)
    b_q1 = kda_load_chunk(q, stride_qt, stride_qk, n_t, o_c, o_k, K)
    b_gate = kda_gate_log2_scaled(b_y, a_head)
    b_dg = tl.where(b_gate <= -48.0, 0.0, b_dg)
    tl.store(dA_log + i_sum * NB + i_k, tl.sum(tl.sum(b_dg * b_gate, axis=1), axis=0) * 0.6931471805599453)
    b_r = tl.rsqrt(1.0 + tl.exp2(-b_y))  # its square is the sigmoid, without a division's many instructions
    b_dg *= -a_head * (b_r * b_r)
    tl.store(dg + o_kt, b_dg.to(dg.dtype.element_ty), mask=m_kt)
    tl.store(ddt_bias + i_sum * K + o_k, tl.sum(b_dg, axis=1), mask=o_k < K)

    b_diagonal = tl.load(rows + 2 * C + o_c)[None, :]
    b_rq, b_rk = tl.load(rows + o_c)[None, :], tl.load(rows + C + o_c)[None, :]
    b_k = kda_columns(b_k1, o_c, DTYPE, UPCAST) * b_rk
    b_q = kda_columns(b_q1, o_c, DTYPE, UPCAST) * b_rq
    b_dq = tl.exp2(b_up) * b_dq + b_diagonal * b_k
    b_dk = tl.exp2(b_up) * b_dk + tl.exp2(b_down) * b_x + b_diagonal * b_q
    if n_wild > 0:
        b_dq += tl.load(dq + o_kt, mask=m_wkt, other=0.0).to(tl.float32)
        b_dk += tl.load(dk + o_kt, mask=m_wkt, other=0.0).to(tl.float32)
        tl.debug_barrier()  # as above
    b_dq = b_rq * (b_dq - b_q * tl.load(radial + o_c)[None, :])
    tl.store(dq + o_kt, b_dq.to(dq.dtype.element_ty), mask=m_kt)
    b_dk = b_rk * (b_dk - b_k * tl.load(radial + C + o_c)[None, :])
    tl.store(dk + o_kt, b_dk.to(dk.dtype.element_ty), mask=m_kt)


def kda_rest_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    do: torch.Tensor,
    *,
    gradients: tuple[torch.Tensor, ...],
    sums: tuple[torch.Tensor, torch.Tensor],
    first_sum: int,
    segment: Segment,
    tiles: tuple[torch.Tensor, ...],
    borders: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    config: KdaRestConfig,
    upcast: bool,
    compile_only: bool = False,
) -> None:
    """
    Write dq, dk, dg of `gradients` = dq, dk, dv, dg, dbeta (contiguous [B, T, H, ...] in the tiles' dtype; dv is read)
    and the entries from `first_sum` on of `sums` = dA_log [., H, KP / BK], ddt_bias [., H, K], fp32.

    Segment and tiles as in kda_intra_fwd, borders as in kda_scan_bwd, all as stage 3 left them. compile_only:
    launch nothing (see `launch`).
    """
    (B, T, H, K), V, (C, KP) = q.shape, do.shape[-1], tiles[0].shape[2:]
    dq, dk, dv, dg, _ = gradients
    _, _, _, decay, dA, dP, _, rows = tiles
    NT, index = segment.NT, segment.index
    NC = B * NT if index is None else index[-1].numel()
    launch(
        kda_rest_bwd_kernel, (NC * (KP // config.BK), H), compile_only,
        q, k, g, do, dv,
        *borders, decay, dA, dP, rows, A_log, dt_bias,
        dq, dk, dg, *sums,
        *(index or (None, None, None)),
        T, NT, segment.t_begin, segment.first, first_sum,
        *q.stride(), *k.stride(), *g.stride(),
        ALIGN=alignment(q, k, g), H=H, K=K, V=V,
        KP=KP, BK=config.BK, BV=config.BV, VP=borders[0].shape[3], C=C,
        DTYPE=tl.bfloat16 if tiles[0].dtype == torch.bfloat16 else tl.float32,
        PRECISION=config.precision, SUFFIX_SCAN=q.dtype == torch.float32,
        PACKED=index is not None, UPCAST=upcast, STAGES=config.num_stages,
        **launch_options(config),
    )  # fmt: skip
