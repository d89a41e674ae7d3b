"""
KDA forward, stage 1 of 2: all that a chunk can know without the state. One program per chunk and head.

Besides the tiles of kda/tiles.py it writes, with G_i the cumulative log2 decay from the chunk's start to token i,

    A_ij = scale sum_d q_id k_jd exp2(G_id - G_jd)          j <= i                 [C, C]
    L_ij = beta_i sum_d k_id k_jd exp2(G_id - G_jd)         j <  i
    M    = (I + L)^-1 diag(beta)                                                   [C, C]

(Kimi Linear, arXiv 2510.26692, eqs. 6-9: M K exp2(G) is the paper's W and M V its U. They are not formed: stage 2
applies M to what the state leaves of V, one small product more there in exchange for V, W and U not passing through
memory here.)

A and L are products of tiles of kda/tiles.py; above the diagonal these may overflow and are dropped. Wild channels
are left out of these products and added by kda/wild.py.

Inverse. With M_s the inverse of the diagonal blocks of size 2^s and L_s the entries of L between the halves of blocks
of size 2^(s+1), M_{s+1} = M_s - M_s L_s M_s; L_s M_s is L M_s at the places of L_s. fp16 operands suffice beside bf16
tiles (11 bits; the entries of M and L lie within [-1, 1] as |k| = 1, beta <= 1).
"""

import torch

from ..gpu.arithmetic import rounded_dot
from ..gpu.launching import launch, launch_options
from ..gpu.sizes import alignment, padded
from .configs import KdaIntraConfig
from .index import Segment, kda_chunk_place
from .tiles import SPAN, kda_tiles
from .wild import BASE, FLOOR, kda_wild_slice

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def kda_level_places(o_c, s: tl.constexpr):
    """
    1.0 where the row's token is in the upper and the column's in the lower half of a block of 2^(s+1) tokens, else 0.0.

    Said with a token's high and low bits (three low ones), the masks of many elements are equal and computed once.
    """
    o_n, o_r = o_c >> 3, o_c & 7
    if s < 3:
        i_x, j_x, shift = o_r[:, None], o_r[None, :], s
    else:
        i_x, j_x, shift = o_n[:, None], o_n[None, :], s - 3
    b_places = tl.where((((i_x ^ j_x) >> shift) == 1) & (((i_x >> shift) & 1) == 1), 1.0, 0.0)
    if s < 3:
        b_places *= tl.where(o_n[:, None] == o_n[None, :], 1.0, 0.0)
    return b_places


@triton.jit
def kda_invert(b_L, o_c, NS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 for strictly lower L [C, C]; NS = log2(C) levels."""
    b_N = (-b_L).to(DTYPE)
    b_M = tl.where(o_c[:, None] == o_c[None, :], 1.0, -b_L * kda_level_places(o_c, 0))
    for s in tl.static_range(1, NS):
        # A product with 0 or 1: the compiler would round the sides of a select one by one.
        b_Y = rounded_dot(b_N, b_M, None, DTYPE, PRECISION, False) * kda_level_places(o_c, s)
        b_M = rounded_dot(b_M, b_Y, b_M, DTYPE, PRECISION, False)
    return b_M


@triton.jit(do_not_specialize=["T", "NT", "t_begin", "first", "stride_qb", "stride_kb", "stride_gb", "stride_bb"])
def kda_intra_fwd_kernel(
    q, k, g, beta, A_log, dt_bias,
    xq, xk, xg, decay, A, M, channels, rows,
    cu_seqlens, chunk_offsets, chunk_seq,
    scale, T, NT, t_begin, first,
    stride_qb: tl.int64, stride_qt, stride_qh, stride_qk,
    stride_kb: tl.int64, stride_kt, stride_kh, stride_kk,
    stride_gb: tl.int64, stride_gt, stride_gh, stride_gk,
    stride_bb: tl.int64, stride_bt, stride_bh,
    ALIGN: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BKW: tl.constexpr,
    C: tl.constexpr, NG: tl.constexpr, NS: tl.constexpr,
    SPAN: tl.constexpr, FLOOR: tl.constexpr, BASE: tl.constexpr,
    DTYPE: tl.constexpr, INVERSE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, SUFFIX_SCAN: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """
    See the module docstring; `channels` [NC, H, BK] and `rows` [NC, H, 4, C] are scratch.

    The strides between batch rows grow with T, so no version may be compiled for a kind of them; ALIGN says what they
    are multiples of.
    """
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_place = i_c + t_begin if PACKED else i_c
    i_b, t0, n_t = kda_chunk_place(cu_seqlens, chunk_offsets, chunk_seq, i_place, T, NT, t_begin, C, PACKED)
    if n_t <= 0:
        return
    i_tile = (first + i_c).to(tl.int64) * H + i_h
    i_h64 = i_h.to(tl.int64)  # heads may lie T K elements apart
    q += tl.multiple_of(i_b * stride_qb, ALIGN) + t0 * stride_qt + i_h64 * stride_qh
    k += tl.multiple_of(i_b * stride_kb, ALIGN) + t0 * stride_kt + i_h64 * stride_kh
    g += tl.multiple_of(i_b * stride_gb, ALIGN) + t0 * stride_gt + i_h64 * stride_gh
    beta += i_b * stride_bb + t0 * stride_bt + i_h64 * stride_bh
    dt_bias += i_h * K
    xq += i_tile * (C * BK)
    xk += i_tile * (C * BK)
    xg += i_tile * (C * BK)
    decay += i_tile * BK
    channels += i_tile * BK
    rows += i_tile * (4 * C)
    a_head = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    b_xq, b_xk, b_xg, n_wild = kda_tiles(
        q, k, g, beta, dt_bias, a_head, scale, n_t, rows, xq, xk, xg, decay, channels,
        stride_qt, stride_qk, stride_kt, stride_kk, stride_gt, stride_gk, stride_bt,
        K, BK, C, NG, SPAN, SUFFIX_SCAN, DTYPE,
    )  # fmt: skip
    b_xg = tl.trans(b_xg)
    b_L = rounded_dot(b_xk, b_xg, None, DTYPE, PRECISION, UPCAST)
    b_A = rounded_dot(b_xq, b_xg, None, DTYPE, PRECISION, UPCAST)
    o_c = tl.arange(0, C)
    m_lower = o_c[:, None] > o_c[None, :]
    b_L = tl.where(m_lower, b_L, 0.0)
    b_A = tl.where(m_lower, b_A, 0.0)
    if n_wild > 0:
        tl.debug_barrier()  # `channels` was written by other threads
        b_rq, b_rk = tl.load(rows + o_c), tl.load(rows + C + o_c)
        for i_k in tl.range(0, n_wild, BKW, num_stages=1):
            o_w = i_k + tl.arange(0, BKW)
            o_k = tl.load(channels + o_w, mask=o_w < n_wild, other=K).to(tl.int32)
            b_L, b_A = kda_wild_slice(
                q, k, g, dt_bias, a_head, b_rq, b_rk, b_L, b_A, o_c, o_k, n_t,
                stride_qt, stride_qk, stride_kt, stride_kk, stride_gt, stride_gk,
                K, FLOOR, BASE, NS, DTYPE, PRECISION, UPCAST,
            )  # fmt: skip

    # The diagonal needs no decay: in fp32 it spares the outputs two roundings of their largest term.
    o_cc = i_tile * (C * C) + (o_c[:, None] * C + o_c[None, :])
    tl.store(A + o_cc, tl.where(o_c[:, None] == o_c[None, :], tl.load(rows + 2 * C + o_c)[:, None], b_A).to(DTYPE))
    b_beta = tl.load(rows + 3 * C + o_c)
    b_M = kda_invert(b_L * b_beta[:, None], o_c, NS, INVERSE_DTYPE, PRECISION) * b_beta[None, :]
    tl.store(M + o_cc, b_M.to(DTYPE))


def intra_tiles(q: torch.Tensor, NC: int, C: int) -> tuple[torch.Tensor, ...]:
    """What passes between the stages for NC chunks: xq, xk, xg, decay, A, M; and stage 1's scratch: channels, rows."""
    H, BK = q.shape[2], padded(q.shape[3])
    # fp16 lacks the exponents that the factors need.
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    xq, xk, xg = (torch.empty(NC, H, C, BK, dtype=dtype, device=q.device) for _ in range(3))
    A, M = (torch.empty(NC, H, C, C, dtype=dtype, device=q.device) for _ in range(2))
    decay = torch.empty(NC, H, BK, dtype=torch.float32, device=q.device)
    channels = torch.empty(NC, H, BK, dtype=torch.int16, device=q.device)
    rows = torch.empty(NC, H, 4, C, dtype=torch.float32, device=q.device)
    return xq, xk, xg, decay, A, M, channels, rows


def kda_intra_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    scale: float,
    segment: Segment,
    tiles: tuple[torch.Tensor, ...],
    config: KdaIntraConfig,
    upcast: bool,
    compile_only: bool = False,
) -> None:
    """
    Fill `tiles` = xq, xk, xg [NC, H, C, BK], decay [NC, H, BK], A, M [NC, H, C, C], channels [NC, H, BK], rows
    [NC, H, 4, C] for the chunks of `segment`, from its first entry on.

    compile_only: launch nothing (see `launch`).
    """
    (B, T, H, K), (C, BK) = q.shape, tiles[0].shape[2:]
    NT, index = segment.NT, segment.index
    NC = B * NT if index is None else NT
    bf16 = tiles[0].dtype == torch.bfloat16
    NS = C.bit_length() - 1
    launch(
        kda_intra_fwd_kernel, (NC, H), compile_only,
        q, k, g, beta, A_log, dt_bias,
        *tiles,
        *(index or (None, None, None)),
        scale, T, NT, segment.t_begin, segment.first,
        *q.stride(), *k.stride(), *g.stride(), *beta.stride(),
        ALIGN=alignment(q, k, g), H=H, K=K, BK=BK, BKW=config.BKW,
        C=C, NG=config.NG, NS=NS,
        SPAN=SPAN, FLOOR=FLOOR, BASE=min(BASE, NS),
        DTYPE=tl.bfloat16 if bf16 else tl.float32, INVERSE_DTYPE=tl.float16 if bf16 else tl.float32,
        PRECISION=config.precision, SUFFIX_SCAN=q.dtype == torch.float32,
        PACKED=index is not None, UPCAST=upcast,
        **launch_options(config),
    )  # fmt: skip
