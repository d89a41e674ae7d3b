"""
Decode step: the projections of a layer that share an input, as one launch over all their weights.

    y = [W_0; W_1; ...] x̂        x̂ = x                                      plain
                                 x̂ = weight x / sqrt(mean(x^2) + eps)       with a norm's weight
                                 x̂ = silu(x[:K]) x[K:]                      gated, behind gate and up projections
    y += residual                                                           where given; y may be the residual

The norm's factor 1 / sqrt(.) is applied to the sums, so that one pass over x serves both. Sums are fp32 and rounded
once, to y's dtype. Each weight [M_s, K] is read once and in place: nothing is packed or copied. With `x_columns` each
weight reads its own K columns of x.

One token takes a matrix-vector kernel (bound by the bytes of the weights); up to 64 take tensor cores, which read the
weights once for all of them.

With PDL (programmatic dependent launch, sm_90 on) a launch starts while the one before it drains: what depends on no
other launch, here the first columns of the weights, is on its way before `gdc_wait` returns. Every kernel of the decode
step waits, so that a launch that has returned from its wait knows all launches before it to be complete.
"""

import torch

from .decode_configs import GemvConfig, SkinnyConfig, overlap_options
from .kda_triton_math import kda_dot, kda_sigmoid

try:
    import triton
    import triton.language as tl
except ImportError:
    from .kda_triton_absent import tl, triton

MAX_WEIGHTS = 6


@triton.jit
def decode_segment(
    i_tile, w0, w1, w2, w3, w4, w5,
    M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr, M4: tl.constexpr, M5: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, X4: tl.constexpr, X5: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Which weight tile `i_tile` belongs to: (weight, first row, rows, first column of x, first column of y)."""
    w, i_row, n_rows, x_col, y_col = w0, i_tile * BN, i_tile * 0 + M0, i_tile * 0 + X0, i_tile * 0
    T1: tl.constexpr = (M0 + BN - 1) // BN
    T2: tl.constexpr = T1 + (M1 + BN - 1) // BN
    T3: tl.constexpr = T2 + (M2 + BN - 1) // BN
    T4: tl.constexpr = T3 + (M3 + BN - 1) // BN
    T5: tl.constexpr = T4 + (M4 + BN - 1) // BN
    if M1 > 0:
        if i_tile >= T1:
            w, i_row, n_rows, x_col, y_col = w1, (i_tile - T1) * BN, i_tile * 0 + M1, i_tile * 0 + X1, i_tile * 0 + M0
    if M2 > 0:
        if i_tile >= T2:
            w, i_row, n_rows, x_col = w2, (i_tile - T2) * BN, i_tile * 0 + M2, i_tile * 0 + X2
            y_col = i_tile * 0 + (M0 + M1)
    if M3 > 0:
        if i_tile >= T3:
            w, i_row, n_rows, x_col = w3, (i_tile - T3) * BN, i_tile * 0 + M3, i_tile * 0 + X3
            y_col = i_tile * 0 + (M0 + M1 + M2)
    if M4 > 0:
        if i_tile >= T4:
            w, i_row, n_rows, x_col = w4, (i_tile - T4) * BN, i_tile * 0 + M4, i_tile * 0 + X4
            y_col = i_tile * 0 + (M0 + M1 + M2 + M3)
    if M5 > 0:
        if i_tile >= T5:
            w, i_row, n_rows, x_col = w5, (i_tile - T5) * BN, i_tile * 0 + M5, i_tile * 0 + X5
            y_col = i_tile * 0 + (M0 + M1 + M2 + M3 + M4)
    return w, i_row, n_rows, x_col, y_col


@triton.jit
def decode_block(p_w, o_k, m_n, K: tl.constexpr):
    """Columns `o_k` of the rows at `p_w`."""
    return tl.load(p_w + o_k, mask=m_n[:, None] & (o_k < K), other=0.0)


@triton.jit
def decode_input(x, norm_weight, o_k, K: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr):
    """
    Columns `o_k` of x̂ without the norm's factor, and their squares, fp32.

    `o_k` has the shape of the weights' tile, one copy of the columns for each row: each thread then loads what it
    multiplies. Columns alone would be handed around through shared memory, with barriers that hold up the loads of
    weights behind them.
    """
    b_x = tl.load(x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    if GATED:
        b_x *= kda_sigmoid(b_x) * tl.load(x + K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_xx = b_x * b_x
    if HAS_NORM:
        b_x *= tl.load(norm_weight + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    return b_x, b_xx


@triton.jit
def decode_gemv_kernel(
    x, norm_weight, residual, y, w0, w1, w2, w3, w4, w5, eps,
    M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr, M4: tl.constexpr, M5: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, X4: tl.constexpr, X5: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: see the module docstring. Four blocks of columns go ahead, the others UNROLL at a time."""
    w, i_row, n_rows, x_col, y_col = decode_segment(
        tl.program_id(0), w0, w1, w2, w3, w4, w5, M0, M1, M2, M3, M4, M5, X0, X1, X2, X3, X4, X5, BN
    )
    o_n = i_row + tl.arange(0, BN)
    m_n = o_n < n_rows
    p_w = w + o_n.to(tl.int64)[:, None] * K
    o_k = tl.arange(0, BK)[None, :] + o_n[:, None] * 0
    b_w0 = decode_block(p_w, o_k, m_n, K)
    b_w1 = decode_block(p_w, o_k + BK, m_n, K)
    b_w2 = decode_block(p_w, o_k + 2 * BK, m_n, K)
    b_w3 = decode_block(p_w, o_k + 3 * BK, m_n, K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x += x_col
    b_x, b_ss = decode_input(x, norm_weight, o_k, K, HAS_NORM, GATED)
    b_y = b_w0.to(tl.float32) * b_x
    b_x, b_xx = decode_input(x, norm_weight, o_k + BK, K, HAS_NORM, GATED)
    b_y += b_w1.to(tl.float32) * b_x
    b_ss += b_xx
    b_x, b_xx = decode_input(x, norm_weight, o_k + 2 * BK, K, HAS_NORM, GATED)
    b_y += b_w2.to(tl.float32) * b_x
    b_ss += b_xx
    b_x, b_xx = decode_input(x, norm_weight, o_k + 3 * BK, K, HAS_NORM, GATED)
    b_y += b_w3.to(tl.float32) * b_x
    b_ss += b_xx
    for i_k in range(4 * BK, K, BK * UNROLL):
        for u in tl.static_range(UNROLL):
            b_w = decode_block(p_w, i_k + u * BK + o_k, m_n, K)
            b_x, b_xx = decode_input(x, norm_weight, i_k + u * BK + o_k, K, HAS_NORM, GATED)
            b_y += b_w.to(tl.float32) * b_x
            b_ss += b_xx
    b_out = tl.sum(b_y, axis=1)
    if HAS_NORM:
        b_out *= tl.rsqrt(tl.sum(b_ss, axis=1) / K + eps)
    if HAS_RESIDUAL:
        b_out += tl.load(residual + y_col + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(y + y_col + o_n, b_out.to(y.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["N"])
def decode_skinny_kernel(
    x, residual, y, w0, w1, w2, w3, w4, w5, N, stride_x, stride_y,
    M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr, M4: tl.constexpr, M5: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, X4: tl.constexpr, X5: tl.constexpr,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """N tokens, rows of x and y: see the module docstring. x is normed already."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    w, i_row, n_rows, x_col, y_col = decode_segment(
        tl.program_id(0), w0, w1, w2, w3, w4, w5, M0, M1, M2, M3, M4, M5, X0, X1, X2, X3, X4, X5, BN
    )
    o_n = i_row + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_n, m_m = o_n < n_rows, o_m < N
    p_w = w + o_n.to(tl.int64)[:, None] * K
    p_x = x + o_m.to(tl.int64)[:, None] * stride_x + x_col
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        m_x = m_m[:, None] & m_k[None, :]
        b_w = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x + o_k[None, :], mask=m_x, other=0.0)
        if GATED:
            b_x = b_x.to(tl.float32)
            b_x *= kda_sigmoid(b_x) * tl.load(p_x + K + o_k[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_y = kda_dot(b_x, tl.trans(b_w), b_y, w.dtype.element_ty, "ieee", UPCAST)
    o_y = o_m.to(tl.int64)[:, None] * stride_y + (y_col + o_n)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if HAS_RESIDUAL:
        b_y += tl.load(residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_y)


def decode_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    y: torch.Tensor,
    config: GemvConfig | SkinnyConfig,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    x_columns: tuple[int, ...] | None = None,
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Write y [N, sum of M_s] (see the module docstring).

    Args:
        x: [N, columns], rows dense; K of the columns are read, twice K if `gated`.
        weights: one to six contiguous [M_s, K].
        y: [N, sum of M_s], rows dense.
        config: a GemvConfig where N is 1, else a SkinnyConfig.
        norm_weight: [K] of an RMSNorm in front, with its `eps`; or None. One token only.
        residual: laid out as y, added before rounding; may be y.
        gated: whether x holds gate and up activations.
        x_columns: first column of x for each weight; 0 for all if None.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see the module docstring).
    """
    K, missing = weights[0].shape[1], MAX_WEIGHTS - len(weights)
    sizes = [w.shape[0] for w in weights]
    tiles = sum(triton.cdiv(size, config.BN) for size in sizes)
    common = {f"M{i}": size for i, size in enumerate(sizes + [0] * missing)}
    common |= {f"X{i}": column for i, column in enumerate([*(x_columns or [0] * len(weights)), *[0] * missing])}
    common |= {"K": K, "HAS_RESIDUAL": residual is not None, "GATED": gated, "PDL": pdl, **overlap_options(pdl)}
    weights = [*weights, *[weights[0]] * missing]
    if isinstance(config, GemvConfig):
        decode_gemv_kernel[(tiles,)](
            x, norm_weight, residual, y, *weights, eps, **common, HAS_NORM=norm_weight is not None,
            BN=config.BN, BK=config.BK, UNROLL=config.UNROLL, num_warps=config.num_warps,
        )  # fmt: skip
        return
    if norm_weight is not None:
        raise ValueError("a norm in front is part of the one-token kernel only; norm x beforehand")
    N = x.shape[0]
    decode_skinny_kernel[(tiles, triton.cdiv(N, config.BM))](
        x, residual, y, *weights, N, x.stride(0), y.stride(0), **common,
        BM=config.BM, BN=config.BN, BK=config.BK, STAGES=config.num_stages, UPCAST=upcast,
        num_warps=config.num_warps,
    )  # fmt: skip


__all__ = ["MAX_WEIGHTS", "decode_gemv_kernel", "decode_linear", "decode_skinny_kernel"]
