"""
KDA backward, stage 2 of 4: the two passes over chunks, which don't depend on each other, as two halves of one grid. One
program per sequence, head, block of BV value channels, and half.

With the tiles of stage 1 (tiles, intra; `xk` holds -k), S the state before a chunk, dO the
gradient of its outputs and dS' that of the state after it,

    half 0, forwards        R = xk S        U = M V + M R        S' = diag(decay) S + xg^T U
    half 1, backwards       dU = A^T dO + xg dS'        dV = M^T dU        (dR = dV)
                            dS = diag(decay) dS' + xq^T dO + xk^T dV

Half 0 is the forward's stage 2 without its outputs; it keeps S of every chunk and U. Half 1 is linear in dO and dS' and
never asks for S; it keeps dS' of every chunk, and dV is the gradient of the values as it stands. Everything is computed
transposed, V first, as in inter. Products take operands in the tiles' dtype and sum in fp32; the running
state and its gradient are only rounded as operands and where they are kept.

No exponent is formed here: every factor of the tiles is an exp2 of a sum of log decays, at most 1.
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


@triton.jit
def kda_states_half(
    xk, xg, decay, M, v, states, u, b_s, o_v, n_t, NT,
    stride_vt, stride_vv,
    H: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Half 0 from the state `b_s` [BV, BK] on: writes `states` [BK, V] and `u` [C, V] of NT chunks."""
    o_k, o_c = tl.arange(0, BK), tl.arange(0, C)
    o_ck = o_c[:, None] * BK + o_k[None, :]
    o_cc = o_c[:, None] * C + o_c[None, :]
    for i_c in tl.range(0, NT, num_stages=STAGES):
        m_tv = (i_c * C + o_c < n_t)[:, None] & (o_v < V)[None, :]
        b_xk = tl.load(xk + o_ck)
        b_v = tl.load(v + o_c[:, None] * stride_vt + o_v[None, :] * stride_vv, mask=m_tv, other=0.0)
        b_M = tl.load(M + o_cc)
        b_xg = tl.load(xg + o_ck)
        b_decay = tl.load(decay + o_k)

        b_s1 = b_s.to(DTYPE)
        b_r = rounded_dot(b_s1, tl.trans(b_xk), None, DTYPE, PRECISION, UPCAST)
        b_u = rounded_dot(tl.trans(b_v), tl.trans(b_M), None, DTYPE, PRECISION, UPCAST)
        b_u = rounded_dot(b_r, tl.trans(b_M), b_u, DTYPE, PRECISION, UPCAST).to(DTYPE)
        b_s = rounded_dot(b_u, b_xg, b_s * b_decay[None, :], DTYPE, PRECISION, UPCAST)
        tl.store(states + o_k[None, :] * VP + o_v[:, None], b_s1)
        tl.store(u + o_c[None, :] * VP + o_v[:, None], b_u)

        xk += H * C * BK
        xg += H * C * BK
        decay += H * BK
        M += H * C * C
        v += C * stride_vt
        states += H * VP * BK
        u += H * VP * C


@triton.jit
def kda_gradients_half(
    xq, xk, xg, decay, A, M, do, dv, dstates, b_ds, o_v, n_t, NT,
    H: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    Half 1 from the gradient `b_ds` [BV, BK] of the last state back: writes `dv` and `dstates` [BK, V] of NT chunks.

    Pointers are at the first chunk. Returns the gradient of the state before it.
    """
    o_k, o_c = tl.arange(0, BK), tl.arange(0, C)
    o_ck = o_c[:, None] * BK + o_k[None, :]
    o_cc = o_c[:, None] * C + o_c[None, :]
    i_last = (NT - 1).to(tl.int64)
    xq += i_last * (H * C * BK)
    xk += i_last * (H * C * BK)
    xg += i_last * (H * C * BK)
    decay += i_last * (H * BK)
    A += i_last * (H * C * C)
    M += i_last * (H * C * C)
    do += i_last * (C * H * V)
    dv += i_last * (C * H * V)
    dstates += i_last * (H * VP * BK)
    for i in tl.range(0, NT, num_stages=STAGES):
        m_tv = ((NT - 1 - i) * C + o_c < n_t)[:, None] & (o_v < V)[None, :]
        o_tv = o_c[:, None] * (H * V) + o_v[None, :]
        b_xg = tl.load(xg + o_ck)
        b_do = tl.load(do + o_tv, mask=m_tv, other=0.0)
        b_A = tl.load(A + o_cc)
        b_M = tl.load(M + o_cc)
        b_xq = tl.load(xq + o_ck)
        b_xk = tl.load(xk + o_ck)
        b_decay = tl.load(decay + o_k)

        b_ds1 = b_ds.to(DTYPE)
        b_du = rounded_dot(tl.trans(b_do), b_A, None, DTYPE, PRECISION, UPCAST)
        b_du = rounded_dot(b_ds1, tl.trans(b_xg), b_du, DTYPE, PRECISION, UPCAST).to(DTYPE)
        b_dv = rounded_dot(b_du, b_M, None, DTYPE, PRECISION, UPCAST).to(DTYPE)
        b_ds = rounded_dot(tl.trans(b_do), b_xq, b_ds * b_decay[None, :], DTYPE, PRECISION, UPCAST)
        b_ds = rounded_dot(b_dv, b_xk, b_ds, DTYPE, PRECISION, UPCAST)
        tl.store(dstates + o_k[None, :] * VP + o_v[:, None], b_ds1)
        tl.store(dv + o_tv, tl.trans(b_dv), mask=m_tv)

        xq -= H * C * BK
        xk -= H * C * BK
        xg -= H * C * BK
        decay -= H * BK
        A -= H * C * C
        M -= H * C * C
        do -= C * H * V
        dv -= C * H * V
        dstates -= H * VP * BK
    return b_ds


@triton.jit(do_not_specialize=["has_state", "has_gradient", "T", "NT", "t_begin", "first", "stride_vb"])
def kda_scan_bwd_kernel(
    xq, xk, xg, decay, A, M, v, do, dv,
    states, dstates, u,
    state_in, dstate_out, dstate_in,
    cu_seqlens, chunk_offsets,
    has_state, has_gradient, T, NT, t_begin, first,
    stride_vb: tl.int64, stride_vt, stride_vh, stride_vv,
    ALIGN: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    See the module docstring. do and dv are contiguous [B, T, H, V], states and their gradients outside chunks
    contiguous [N, H, K, V]: dstate_out goes into the last chunk's state, dstate_in comes out of the first one's.
    Without `has_state` / `has_gradient`, state_in / dstate_out isn't read.
    """
    # One dimension: the others of a grid end at 65,535.
    NV: tl.constexpr = VP // BV
    half, i_v, i_nh = tl.program_id(0) % 2, tl.program_id(0) // 2 % NV, tl.program_id(0) // (2 * NV)
    i_n, i_h = i_nh // H, i_nh % H
    if PACKED:
        bos, eos = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
        i_tile = tl.load(chunk_offsets + i_n).to(tl.int64) * H + i_h
        n_t = (eos - bos).to(tl.int32)
        NT = (n_t + C - 1) // C
        v += bos * stride_vt
        t0 = bos
    else:
        i_tile = (first + i_n.to(tl.int64) * NT) * H + i_h
        n_t = T - t_begin
        v += tl.multiple_of(i_n * stride_vb, ALIGN) + t_begin.to(tl.int64) * stride_vt
        t0 = i_n.to(tl.int64) * T + t_begin
    v += i_h.to(tl.int64) * stride_vh
    do += t0 * (H * V) + i_h * V
    dv += t0 * (H * V) + i_h * V
    xq += i_tile * (C * BK)
    xk += i_tile * (C * BK)
    xg += i_tile * (C * BK)
    decay += i_tile * BK
    A += i_tile * (C * C)
    M += i_tile * (C * C)
    states += i_tile * (VP * BK)
    dstates += i_tile * (VP * BK)
    u += i_tile * (VP * C)

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_vk = (o_v < V)[:, None] & (o_k < K)[None, :]
    o_vk = i_nh.to(tl.int64) * (K * V) + o_k[None, :] * V + o_v[:, None]
    if half == 0:
        b_s = tl.load(state_in + o_vk, mask=tl.where(m_vk, has_state, 0) > 0, other=0.0)
        kda_states_half(
            xk, xg, decay, M, v, states, u, b_s, o_v, n_t, NT, stride_vt, stride_vv,
            H, V, BK, VP, C, DTYPE, PRECISION, UPCAST, STAGES,
        )  # fmt: skip
    else:
        b_ds = tl.load(dstate_out + o_vk, mask=tl.where(m_vk, has_gradient, 0) > 0, other=0.0)
        b_ds = kda_gradients_half(
            xq, xk, xg, decay, A, M, do, dv, dstates, b_ds, o_v, n_t, NT,
            H, V, BK, VP, C, DTYPE, PRECISION, UPCAST, STAGES,
        )  # fmt: skip
        tl.store(dstate_in + o_vk, b_ds, mask=m_vk)


def kda_scan_bwd(
    v: torch.Tensor,
    do: torch.Tensor,
    dv: torch.Tensor,
    *,
    state_in: torch.Tensor | None,
    dstate_out: torch.Tensor | None,
    dstate_in: torch.Tensor,
    segment: Segment,
    tiles: tuple[torch.Tensor, ...],
    borders: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    config: KdaInterConfig,
    upcast: bool,
    compile_only: bool = False,
) -> None:
    """
    Fill states, dstates [NC, H, BK, VP] and u [NC, H, C, VP] of `borders` = states, dstates, u, radial, and write dv
    and dstate_in.

    Segment and tiles as in kda_inter_fwd; v [B, T, H, V] by strides; do and dv (in the tiles' dtype) contiguous
    [B, T, H, V]; states [N, H, K, V] contiguous fp32. compile_only: launch nothing (see `launch`).
    """
    (xq, xk, xg, decay, A, M), (N, H, K, V) = tiles[:6], dstate_in.shape
    cu_seqlens, chunk_offsets, _ = segment.index or (None, None, None)
    launch(
        kda_scan_bwd_kernel, (2 * (borders[0].shape[3] // config.BV) * N * H,), compile_only,
        xq, xk, xg, decay, A, M, v, do, dv,
        *borders[:3],
        dstate_in if state_in is None else state_in, dstate_in if dstate_out is None else dstate_out, dstate_in,
        cu_seqlens, chunk_offsets,
        int(state_in is not None), int(dstate_out is not None), v.shape[1],
        segment.NT, segment.t_begin, segment.first,
        *v.stride(),
        ALIGN=alignment(v), H=H, K=K, V=V,
        BK=xq.shape[-1], BV=config.BV, VP=borders[0].shape[3], C=A.shape[-1],
        DTYPE=tl.bfloat16 if xq.dtype == torch.bfloat16 else tl.float32, PRECISION=config.precision,
        PACKED=segment.index is not None, UPCAST=upcast, STAGES=config.num_stages,
        **launch_options(config),
    )  # fmt: skip
