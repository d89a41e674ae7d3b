"""
KDA forward, stage 2 of 2: the sequential pass over chunks. One program per sequence, head and block of BV value
channels.

With the state S [K, V] (fp32, in registers) and the tiles of stage 1

    R = xk S                            the keys' decayed predictions, negated (xk holds -k)       [C, BV]
    U = M V + M R                       the chunk's writes (the paper's pseudo-values)             [C, BV]
    O = xq S + A U                      outputs
    S = diag(decay) S + xg^T U          state after the chunk

(Kimi Linear, arXiv 2510.26692, eqs. 8-9.) Everything is computed transposed, V first: then state, R and U are the left
operands of all products, which tensor cores take from registers as other products leave them there, and nothing of the
chain from state to state passes through shared memory. M V apart from M R takes V as it lies in shared memory, and
exact. Products take operands in the inputs' dtype and sum in fp32; the state itself is only ever rounded as an operand.
"""

import torch

from ..gpu.arithmetic import rounded_dot
from ..gpu.launching import launch, launch_options
from ..gpu.sizes import alignment
from .configs import KdaInterConfig
from .index import Segment

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit(do_not_specialize=["has_state", "T", "NT", "t_begin", "first", "stride_vb"])
def kda_inter_fwd_kernel(
    xq, xk, xg, decay, A, M, v, o,
    state_in, state_out,
    cu_seqlens, chunk_offsets,
    has_state, T, NT, t_begin, first,
    stride_vb: tl.int64, stride_vt, stride_vh, stride_vv,
    ALIGN: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """
    See the module docstring; o is contiguous [B, T, H, V], states contiguous [N, H, K, V]; without `has_state`
    `state_in` isn't read. With HAS_TABLE `state_in` holds the address of the states, which are read and written there,
    but for those of empty sequences. The chunks are NT of each row from token `t_begin` on. If PACKED they are NT of
    all sequences together, from chunk `t_begin` on: a sequence that began before goes on from `state_out`.
    """
    # One dimension: the others of a grid end at 65,535.
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_nh = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_n, i_h = i_nh // H, i_nh % H
    goes_on = i_n * 0
    if HAS_TABLE:
        if tl.load(cu_seqlens + i_n + 1) <= tl.load(cu_seqlens + i_n):
            return
        state_in = tl.multiple_of(tl.load(state_in).to(tl.pointer_type(tl.float32)), 16)
        state_out = state_in
    if PACKED:
        bos, eos = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
        i_first = tl.load(chunk_offsets + i_n) - t_begin
        begin = tl.maximum(-i_first, 0)  # chunks of this sequence that are done
        goes_on = (begin > 0).to(tl.int32)
        NT = tl.minimum(NT - i_first, ((eos - bos + C - 1) // C).to(tl.int32)) - begin
        bos += begin.to(tl.int64) * C
        n_t = (eos - bos).to(tl.int32)
        i_tile = (first + tl.maximum(i_first, 0)).to(tl.int64) * H + i_h
        v += bos * stride_vt
        o += bos * (H * V)
    else:
        i_tile = (first + i_n.to(tl.int64) * NT) * H + i_h
        n_t = T - t_begin
        v += tl.multiple_of(i_n * stride_vb, ALIGN) + t_begin.to(tl.int64) * stride_vt
        o += (i_n.to(tl.int64) * T + t_begin) * (H * V)
    v += i_h.to(tl.int64) * stride_vh
    o += i_h * V
    xq += i_tile * (C * BK)
    xk += i_tile * (C * BK)
    xg += i_tile * (C * BK)
    decay += i_tile * BK
    A += i_tile * (C * C)
    M += i_tile * (C * C)

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_v = o_v < V
    m_vk = m_v[:, None] & (o_k < K)[None, :]
    o_ck = o_c[:, None] * BK + o_k[None, :]
    o_cc = o_c[:, None] * C + o_c[None, :]
    o_vk = o_k[None, :] * V + o_v[:, None]
    i_state = i_nh.to(tl.int64) * (K * V)
    b_s = tl.load(state_in + i_state + o_vk, mask=tl.where(m_vk, has_state * (1 - goes_on), 0) > 0, other=0.0)
    if PACKED:
        b_s += tl.load(state_out + i_state + o_vk, mask=tl.where(m_vk, goes_on, 0) > 0, other=0.0)

    for i_c in tl.range(0, NT, num_stages=STAGES):
        m_tv = (i_c * C + o_c < n_t)[:, None] & m_v[None, :]
        b_xk = tl.load(xk + o_ck)
        b_v = tl.load(v + o_c[:, None] * stride_vt + o_v[None, :] * stride_vv, mask=m_tv, other=0.0)
        b_M = tl.load(M + o_cc)
        b_xg = tl.load(xg + o_ck)
        b_xq = tl.load(xq + o_ck)
        b_A = tl.load(A + o_cc)
        b_decay = tl.load(decay + o_k)

        b_s1 = b_s.to(DTYPE)
        b_r = rounded_dot(b_s1, tl.trans(b_xk), None, DTYPE, PRECISION, UPCAST)
        b_u = rounded_dot(tl.trans(b_v), tl.trans(b_M), None, DTYPE, PRECISION, UPCAST)
        b_u = rounded_dot(b_r, tl.trans(b_M), b_u, DTYPE, PRECISION, UPCAST).to(DTYPE)
        b_o = rounded_dot(b_s1, tl.trans(b_xq), None, DTYPE, PRECISION, UPCAST)
        b_s = rounded_dot(b_u, b_xg, b_s * b_decay[None, :], DTYPE, PRECISION, UPCAST)
        b_o = rounded_dot(b_u, tl.trans(b_A), b_o, DTYPE, PRECISION, UPCAST)
        p_o = o + o_c[:, None] * (H * V) + o_v[None, :]
        tl.store(p_o, tl.trans(b_o).to(o.dtype.element_ty), mask=m_tv)

        xq += H * C * BK
        xk += H * C * BK
        xg += H * C * BK
        decay += H * BK
        A += H * C * C
        M += H * C * C
        v += C * stride_vt
        o += C * H * V
    tl.store(state_out + i_state + o_vk, b_s, mask=m_vk)


def kda_inter_fwd(
    v: torch.Tensor,
    o: torch.Tensor,
    *,
    state_in: torch.Tensor | None,
    state_out: torch.Tensor | None,
    segment: Segment,
    tiles: tuple[torch.Tensor, ...],
    config: KdaInterConfig,
    upcast: bool,
    compile_only: bool = False,
) -> None:
    """
    Write `o` for the chunks of `segment`, whose `tiles` kda_intra_fwd has filled, and the states after them.

    `state_in` may be `state_out` where nothing is packed. Segments of a pack come in order, each with the same
    `state_in`.

    v [B, T, H, V] by strides, o [B, T, H, V] contiguous, states [N, H, K, V] contiguous fp32. compile_only: launch
    nothing (see `launch`). Without `state_out`, `state_in` is a table in device memory, int64, that begins with the
    address of the states of packed sequences with K = V; they are updated in place, those of empty sequences stay.
    """
    xq, xk, xg, decay, A, M = tiles[:6]
    cu_seqlens, chunk_offsets, _ = segment.index or (None, None, None)
    if state_out is None:
        N, H, K, V = cu_seqlens.shape[0] - 1, *o.shape[2:], o.shape[3]
    else:
        N, H, K, V = state_out.shape
    launch(
        kda_inter_fwd_kernel, (triton.cdiv(V, config.BV) * N * H,), compile_only,
        xq, xk, xg, decay, A, M, v, o,
        state_out if state_in is None else state_in, state_in if state_out is None else state_out,
        cu_seqlens, chunk_offsets,
        int(state_in is not None), v.shape[1], segment.NT, segment.t_begin, segment.first,
        *v.stride(),
        ALIGN=alignment(v), H=H, K=K, V=V,
        BK=xq.shape[-1], BV=config.BV, C=A.shape[-1],
        DTYPE=tl.bfloat16 if xq.dtype == torch.bfloat16 else tl.float32, PRECISION=config.precision,
        PACKED=segment.index is not None, UPCAST=upcast, STAGES=config.num_stages, HAS_TABLE=state_out is None,
        **launch_options(config),
    )  # fmt: skip
