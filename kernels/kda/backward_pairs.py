"""
KDA backward, stage 3 of 4: the gradients of the products inside a chunk, and all that wild channels contribute through
them. One program per chunk and head.

    dA = dO U^T   (j <= i)        dP = -dV U^T   (j < i)        with P_ij = sum_d k_id k_jd exp(G_id - G_jd)
    dbeta_logit_i = (1 - beta_i) / beta_i sum_v dV_i U_i        since U = beta (error of the prediction)

    q_i dq_i = o_i dO_i        k_i dk_i = 2 dbeta_logit_i / (1 - beta_i) - v_i dV_i

(since o is linear in q, and the prediction and what is written are in k: the parts along q and k, which l2norm takes
out again; they go to `radial`, q's over scale^2.)

dA without its diagonal and dP take the places of A and M, which nobody reads again. dA's diagonal, which no gate
decays, takes that of scale q.k in `rows`. What the pairs of a wild channel (see tiles) contribute to dq, dk and dg is
left in these for stage 4 (see backward_wild); other channels' places stay as they were.
"""

import torch

from ..gpu.arithmetic import rounded_dot, rounded_operand
from ..gpu.launching import launch, launch_options
from ..gpu.sizes import alignment
from .backward_wild import FLOOR, kda_wild_slice_bwd
from .configs import KdaPairsConfig
from .index import Segment, kda_chunk_place
from .wild import BASE

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit(do_not_specialize=["T", "NT", "t_begin", "first", "stride_qb", "stride_kb", "stride_vb", "stride_gb"])
def kda_pairs_bwd_kernel(
    q, k, v, g, o, do, dv,
    u, radial, decay, A, M, channels, rows, A_log, dt_bias,
    dq, dk, dg, dbeta,
    cu_seqlens, chunk_offsets, chunk_seq,
    inverse_scale2, T, NT, t_begin, first,
    stride_qb: tl.int64, stride_qt, stride_qh, stride_qk,
    stride_kb: tl.int64, stride_kt, stride_kh, stride_kk,
    stride_vb: tl.int64, stride_vt, stride_vh, stride_vv,
    stride_gb: tl.int64, stride_gt, stride_gh, stride_gk,
    ALIGN: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, BKW: tl.constexpr, C: tl.constexpr, NS: tl.constexpr,
    FLOOR: tl.constexpr, BASE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """See the module docstring. o, do, dv, dq, dk, dg, dbeta are contiguous [B, T, H, ...]."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_b, t0, n_t = kda_chunk_place(cu_seqlens, chunk_offsets, chunk_seq, i_c, T, NT, t_begin, C, PACKED)
    if n_t <= 0:
        return
    i_tile = (first + i_c).to(tl.int64) * H + i_h
    i_t = (i_b * T + t0) * H + i_h
    i_h64 = i_h.to(tl.int64)  # heads may lie T K elements apart
    v += tl.multiple_of(i_b * stride_vb, ALIGN) + t0 * stride_vt + i_h64 * stride_vh
    o += i_t * V
    do += i_t * V
    dv += i_t * V
    u += i_tile * (VP * C)
    rows += i_tile * (4 * C)
    radial += i_tile * (2 * C)
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    b_wild = tl.load(decay + i_tile * BK + o_k).to(tl.int32, bitcast=True)
    n_wild = tl.sum((b_wild < 0).to(tl.int32), axis=0)
    b_dA = tl.zeros([C, C], tl.float32)
    b_dP = tl.zeros([C, C], tl.float32)
    b_qq = tl.zeros([C], tl.float32)
    b_vv = tl.zeros([C], tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        m_tv = (o_c < n_t)[:, None] & (o_v < V)[None, :]
        o_tv = o_c[:, None] * (H * V) + o_v[None, :]
        b_u = tl.trans(tl.load(u + o_c[:, None] * VP + o_v[None, :]))
        b_do = tl.load(do + o_tv, mask=m_tv, other=0.0)
        b_dv = tl.load(dv + o_tv, mask=m_tv, other=0.0)
        b_dA = rounded_dot(b_do, b_u, b_dA, DTYPE, PRECISION, UPCAST)
        b_dP = rounded_dot(b_dv, b_u, b_dP, DTYPE, PRECISION, UPCAST)
        b_qq += tl.sum(b_do.to(tl.float32) * tl.load(o + o_tv, mask=m_tv, other=0.0).to(tl.float32), axis=1)
        b_v = tl.load(v + o_c[:, None] * stride_vt + o_v[None, :] * stride_vv, mask=m_tv, other=0.0)
        b_vv += tl.sum(b_dv.to(tl.float32) * b_v.to(tl.float32), axis=1)
    m_diagonal = o_c[:, None] == o_c[None, :]
    b_beta = tl.load(rows + 3 * C + o_c)
    b_error = tl.sum(tl.where(m_diagonal, b_dP, 0.0), axis=1) / tl.where(b_beta > 0.0, b_beta, 1.0)
    b_error = tl.where(b_beta > 0.0, b_error, 0.0)
    tl.store(dbeta + i_t + o_c * H, b_error * (1.0 - b_beta), mask=o_c < n_t)
    tl.store(radial + o_c, b_qq * inverse_scale2)
    tl.store(radial + C + o_c, 2.0 * b_error - b_vv)
    tl.store(rows + 2 * C + o_c, tl.sum(tl.where(m_diagonal, b_dA, 0.0), axis=1))
    m_lower = o_c[:, None] > o_c[None, :]
    b_dA = rounded_operand(tl.where(m_lower, b_dA, 0.0), DTYPE, PRECISION)
    b_dP = rounded_operand(tl.where(m_lower, -b_dP, 0.0), DTYPE, PRECISION)
    o_cc = i_tile * (C * C) + o_c[:, None] * C + o_c[None, :]
    tl.store(A + o_cc, b_dA)
    tl.store(M + o_cc, b_dP)
    if n_wild > 0:
        q += tl.multiple_of(i_b * stride_qb, ALIGN) + t0 * stride_qt + i_h64 * stride_qh
        k += tl.multiple_of(i_b * stride_kb, ALIGN) + t0 * stride_kt + i_h64 * stride_kh
        g += tl.multiple_of(i_b * stride_gb, ALIGN) + t0 * stride_gt + i_h64 * stride_gh
        channels += i_tile * BK
        a_head = tl.exp(tl.load(A_log + i_h).to(tl.float32))
        b_rq, b_rk = tl.load(rows + o_c), tl.load(rows + C + o_c)
        for i_k in tl.range(0, n_wild, BKW, num_stages=1):
            o_w = i_k + tl.arange(0, BKW)
            o_kw = tl.load(channels + o_w, mask=o_w < n_wild, other=K).to(tl.int32)
            kda_wild_slice_bwd(
                q, k, g, dt_bias + i_h * K, a_head, b_rq, b_rk, b_dA, b_dP,
                dq + i_t * K, dk + i_t * K, dg + i_t * K, o_c, o_kw, n_t,
                stride_qt, stride_qk, stride_kt, stride_kk, stride_gt, stride_gk,
                H, K, FLOOR, BASE, NS, DTYPE, PRECISION, UPCAST,
            )  # fmt: skip


def kda_pairs_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    o: torch.Tensor,
    do: torch.Tensor,
    *,
    gradients: tuple[torch.Tensor, ...],
    scale: float,
    segment: Segment,
    tiles: tuple[torch.Tensor, ...],
    borders: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    config: KdaPairsConfig,
    upcast: bool,
    compile_only: bool = False,
) -> None:
    """
    Write dbeta and the wild channels' part of dq, dk, dg of `gradients` = dq, dk, dv, dg, dbeta (contiguous [B, T, H,
    ...] in the tiles' dtype, dbeta fp32; dv is read), the places of A, M and scale q.k in `tiles`, and `radial` of
    `borders`. o and do are contiguous [B, T, H, V].

    Segment and tiles as in kda_intra_fwd, borders as in kda_scan_bwd. compile_only: launch nothing (see
    `launch`).
    """
    (B, T, H, K), V, (C, BK) = q.shape, do.shape[-1], tiles[0].shape[2:]
    dq, dk, dv, dg, dbeta = gradients
    _, _, u, radial = borders
    NT, index, NS = segment.NT, segment.index, C.bit_length() - 1
    launch(
        kda_pairs_bwd_kernel, (B * NT if index is None else index[-1].numel(), H), compile_only,
        q, k, v, g, o, do, dv,
        u, radial, *tiles[3:], A_log, dt_bias,
        dq, dk, dg, dbeta,
        *(index or (None, None, None)),
        scale**-2 if scale else 0.0, T, NT, segment.t_begin, segment.first,
        *q.stride(), *k.stride(), *v.stride(), *g.stride(),
        ALIGN=alignment(q, k, v, g), H=H, K=K, V=V,
        BK=BK, BV=min(config.BV, u.shape[3]), VP=u.shape[3], BKW=config.BKW, C=C, NS=NS,
        FLOOR=FLOOR, BASE=min(BASE, NS),
        DTYPE=tl.bfloat16 if u.dtype == torch.bfloat16 else tl.float32, PRECISION=config.precision,
        PACKED=index is not None, UPCAST=upcast, STAGES=config.num_stages,
        **launch_options(config),
    )  # fmt: skip
