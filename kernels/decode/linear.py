"""
Decode step: the projections of a layer that share an input, as one launch over all their weights.

    y = [W_0; W_1; ...] x̂        x̂ = x                                      plain
                                 x̂ = weight x / sqrt(mean(x^2) + eps)       with a norm's weight
                                 x̂ = silu(x[:COLUMNS]) x[COLUMNS:]          gated, after gate and up projections
    y += residual                                                           where given; y may be the residual

The norm's factor 1 / sqrt(.) is applied to the sums, so that one pass over x serves both. Sums are fp32 and rounded
once, to y's dtype. Each weight [O_s, COLUMNS] is read once and in place: nothing is packed or copied. With
`x_columns` each weight reads columns of x of its own.

One token takes a matrix-vector kernel (bound by the bytes of the weights); up to 64 take tensor cores, which read the
weights once for all of them.

With PDL (programmatic dependent launch, sm_90 on) each launch of the step lets the next one start at once. Loads that
depend on no other launch, here those of the first columns of the weights, start before `gdc_wait`; the wait ends when
the previous launch is complete. No program ends before it has waited, so all earlier launches are complete too.
"""

from itertools import groupby

import torch

from ..gpu.arithmetic import rounded_dot, sigmoid
from ..gpu.launching import overlap_options
from ..gpu.sizes import padded
from ..weights.handle import WeightHandle
from ..weights.tiles import numbers_of, scales_of, tiles_of
from .configs import GemvConfig, SkinnyConfig
from .tiles import (
    DENSE,
    INT4,
    row_scales,
    tile_input,
    tile_matrix,
    tile_numbers,
    tile_pointer,
    tile_rows,
    tile_scale_rows,
    tile_scales,
    tile_sums,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

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
def decode_prefetch(b_address):
    """Ask the L2 for the lines at these addresses, int64."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [b_address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def decode_prefetch_vector(p_x, SIZE: tl.constexpr):
    """The same for SIZE elements from `p_x` on: the first access to memory takes as long for few bytes as for many."""
    LINE: tl.constexpr = 128 * 8 // p_x.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((SIZE + LINE - 1) // LINE)
    decode_prefetch((p_x + tl.minimum(tl.arange(0, LINES) * LINE, SIZE - 1)).to(tl.int64))


@triton.jit
def decode_input(x, norm_weight, o_k, COLUMNS: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr):
    """
    Columns `o_k` of x̂ without the norm's factor, and their squares, fp32.

    One for all rows of the weights: where a warp takes 256 columns of 2 bytes (or 128 of 4), each thread loads the
    columns that it multiplies. Otherwise they would be handed around through shared memory, with barriers that hold up
    the loads of weights after them.
    """
    b_x = tl.load(x + o_k, mask=o_k < COLUMNS, other=0.0).to(tl.float32)
    if GATED:
        b_x *= sigmoid(b_x) * tl.load(x + COLUMNS + o_k, mask=o_k < COLUMNS, other=0.0).to(tl.float32)
    b_xx = b_x * b_x
    if HAS_NORM:
        b_x *= tl.load(norm_weight + o_k, mask=o_k < COLUMNS, other=0.0).to(tl.float32)
    return b_x, b_xx


@triton.jit
def decode_gemv_kernel(
    x, norm_weight, residual, y, w0, w1, w2, w3, w4, w5, s0, s1, s2, s3, s4, s5, eps,
    M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr, M4: tl.constexpr, M5: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, X4: tl.constexpr, X5: tl.constexpr,
    COLUMNS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: see the module docstring. Four blocks of columns go ahead, the others UNROLL at a time."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, i_row, n_rows, x_col, y_col = decode_segment(
        tl.program_id(0), w0, w1, w2, w3, w4, w5, M0, M1, M2, M3, M4, M5, X0, X1, X2, X3, X4, X5, BN
    )
    o_n = i_row + tl.arange(0, BN)
    m_n = o_n < n_rows
    p_w = tile_rows(tile_pointer(w, COLUMNS, FORMAT), o_n, COLUMNS, FORMAT)
    o_k = tl.arange(0, BK)
    b_w0 = tile_numbers(p_w, 0, m_n, COLUMNS, BK, FORMAT)
    b_w1 = tile_numbers(p_w, BK, m_n, COLUMNS, BK, FORMAT)
    b_w2 = tile_numbers(p_w, 2 * BK, m_n, COLUMNS, BK, FORMAT)
    b_w3 = tile_numbers(p_w, 3 * BK, m_n, COLUMNS, BK, FORMAT)
    p_s = p_w
    if FORMAT != DENSE:
        s, _, _, _, _ = decode_segment(
            tl.program_id(0), s0, s1, s2, s3, s4, s5, M0, M1, M2, M3, M4, M5, X0, X1, X2, X3, X4, X5, BN
        )
        p_s = tile_scale_rows(s, o_n, COLUMNS, SCALE_ROWS, SCALE_COLUMNS)
    b_s0 = tile_scales(p_s, 0, m_n, COLUMNS, BK, SCALE_COLUMNS, FORMAT)
    b_s1 = tile_scales(p_s, BK, m_n, COLUMNS, BK, SCALE_COLUMNS, FORMAT)
    b_s2 = tile_scales(p_s, 2 * BK, m_n, COLUMNS, BK, SCALE_COLUMNS, FORMAT)
    b_s3 = tile_scales(p_s, 3 * BK, m_n, COLUMNS, BK, SCALE_COLUMNS, FORMAT)
    if PDL:
        if HAS_NORM:
            if tl.program_id(0) < 8:
                decode_prefetch_vector(norm_weight, COLUMNS)
        tl.extra.cuda.gdc_wait()
    if HAS_RESIDUAL:
        b_out = tl.load(residual + y_col + o_n, mask=m_n, other=0.0).to(tl.float32)
    else:
        b_out = tl.zeros([BN], tl.float32)
    x += x_col
    b_x, b_ss = decode_input(x, norm_weight, o_k, COLUMNS, HAS_NORM, GATED)
    b_y = tile_sums(b_w0, b_s0, tile_input(b_x, FORMAT), FORMAT)
    b_x, b_xx = decode_input(x, norm_weight, o_k + BK, COLUMNS, HAS_NORM, GATED)
    b_y += tile_sums(b_w1, b_s1, tile_input(b_x, FORMAT), FORMAT)
    b_ss += b_xx
    b_x, b_xx = decode_input(x, norm_weight, o_k + 2 * BK, COLUMNS, HAS_NORM, GATED)
    b_y += tile_sums(b_w2, b_s2, tile_input(b_x, FORMAT), FORMAT)
    b_ss += b_xx
    b_x, b_xx = decode_input(x, norm_weight, o_k + 3 * BK, COLUMNS, HAS_NORM, GATED)
    b_y += tile_sums(b_w3, b_s3, tile_input(b_x, FORMAT), FORMAT)
    b_ss += b_xx
    for i_k in range(4 * BK, COLUMNS, BK * UNROLL):
        for u in tl.static_range(UNROLL):
            b_w = tile_numbers(p_w, i_k + u * BK, m_n, COLUMNS, BK, FORMAT)
            b_s = tile_scales(p_s, i_k + u * BK, m_n, COLUMNS, BK, SCALE_COLUMNS, FORMAT)
            b_x, b_xx = decode_input(x, norm_weight, i_k + u * BK + o_k, COLUMNS, HAS_NORM, GATED)
            b_y += tile_sums(b_w, b_s, tile_input(b_x, FORMAT), FORMAT)
            b_ss += b_xx
    b_sum = tl.sum(b_y, axis=1)
    if FORMAT != DENSE:
        b_sum *= row_scales(p_s, m_n, COLUMNS, SCALE_COLUMNS, FORMAT)
    if HAS_NORM:
        b_sum *= tl.rsqrt(tl.sum(b_ss, axis=0) / COLUMNS + eps)
    b_out += b_sum
    tl.store(y + y_col + o_n, b_out.to(y.dtype.element_ty), mask=m_n)


@triton.jit
def decode_norm_kernel(x, weight, y, eps, D: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):
    """RMSNorm of one token a program, x and y [M, D] contiguous, rounded before the weight as released."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    o_d += tl.program_id(0) * D
    b_x = tl.load(x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    tl.store(y + o_d, (b_w * b_x.to(y.dtype.element_ty).to(tl.float32)).to(y.dtype.element_ty), mask=m_d)


@triton.jit
def decode_gate_kernel(x, stride_x, COLUMNS: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """Program (token, BK columns): silu(gate) up into the place of the gate."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x += tl.program_id(0).to(tl.int64) * stride_x
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    b_x, _ = decode_input(x, x, o_k, COLUMNS, False, True)
    tl.store(x + o_k, b_x.to(x.dtype.element_ty), mask=o_k < COLUMNS)


@triton.jit(do_not_specialize=["M"])
def decode_skinny_kernel(
    x, residual, y, w0, w1, w2, w3, w4, w5, s0, s1, s2, s3, s4, s5, M, stride_x, stride_y,
    M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr, M4: tl.constexpr, M5: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, X4: tl.constexpr, X5: tl.constexpr,
    COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, UPCAST: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """M tokens, rows of x and y: see the module docstring. x is normed already."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, i_row, n_rows, x_col, y_col = decode_segment(
        tl.program_id(0), w0, w1, w2, w3, w4, w5, M0, M1, M2, M3, M4, M5, X0, X1, X2, X3, X4, X5, BN
    )
    o_n = i_row + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_n, m_m = o_n < n_rows, o_m < M
    DTYPE: tl.constexpr = w.dtype.element_ty if FORMAT == DENSE else x.dtype.element_ty
    p_w = tile_rows(w, o_n, COLUMNS, FORMAT)
    p_s = p_w
    if FORMAT != DENSE:
        s, _, _, _, _ = decode_segment(
            tl.program_id(0), s0, s1, s2, s3, s4, s5, M0, M1, M2, M3, M4, M5, X0, X1, X2, X3, X4, X5, BN
        )
        p_s = tile_scale_rows(s, o_n, COLUMNS, SCALE_ROWS, SCALE_COLUMNS)
    if PDL:
        # Loads of the loop can't go ahead of the wait; their first lines can go to the L2.
        WIDTH: tl.constexpr = (COLUMNS + 7) // 8 if FORMAT == INT4 else COLUMNS
        LINE: tl.constexpr = 128 * 8 // w.dtype.element_ty.primitive_bitwidth
        LAST: tl.constexpr = WIDTH - LINE if WIDTH > LINE else 0
        AHEAD: tl.constexpr = triton.next_power_of_2((4 * BK * WIDTH // COLUMNS + LINE - 1) // LINE)
        o_line = tl.minimum(tl.arange(0, AHEAD) * LINE, LAST)
        decode_prefetch((w + tl.minimum(o_n, n_rows - 1).to(tl.int64)[:, None] * WIDTH + o_line[None, :]).to(tl.int64))
        tl.extra.cuda.gdc_wait()
    p_x = x + o_m.to(tl.int64)[:, None] * stride_x + x_col
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_k in tl.range(0, COLUMNS, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < COLUMNS
        m_x = m_m[:, None] & m_k[None, :]
        if FORMAT == DENSE:
            b_w = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        else:
            b_w = tile_matrix(p_w, p_s, i_k, m_n, COLUMNS, BK, FORMAT, SCALE_COLUMNS, DTYPE)
        b_x = tl.load(p_x + o_k[None, :], mask=m_x, other=0.0)
        b_y = rounded_dot(b_x, tl.trans(b_w), b_y, DTYPE, "ieee", UPCAST)
    if FORMAT != DENSE:
        b_y *= row_scales(p_s, m_n, COLUMNS, SCALE_COLUMNS, FORMAT)[None, :]
    o_y = o_m.to(tl.int64)[:, None] * stride_y + (y_col + o_n)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if HAS_RESIDUAL:
        b_y += tl.load(residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_y)


def decode_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor | WeightHandle],
    y: torch.Tensor,
    config: GemvConfig | SkinnyConfig,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    x_columns: tuple[int, ...] | None = None,
    upcast: bool = False,
    gpu: str = "sm_90",
    pdl: bool = False,
) -> None:
    """
    Write y [M, sum of O_s] (see the module docstring): one launch for each run of weights of one format.

    Args:
        x: [M, at least COLUMNS], rows dense; COLUMNS of them are read, twice as many if `gated`.
        weights: one to six [O_s, COLUMNS], contiguous, or packed in a format that has tiles (weights/tiles.py).
        y: [M, sum of O_s], rows dense.
        config: a GemvConfig where M is 1, else a SkinnyConfig.
        norm_weight: [COLUMNS] of an RMSNorm of x, with its `eps`; or None. One token only.
        residual: laid out as y, added before rounding; may be y.
        gated: whether x holds gate and up activations. One token only.
        x_columns: first column of x for each weight; 0 for all if None.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        gpu: class of the GPU, which says how packed weights are read.
        pdl: launch programmatically dependent (see the module docstring).
    """
    if isinstance(config, SkinnyConfig) and (norm_weight is not None or gated):
        raise ValueError("a norm or a gate is part of the one-token kernel only; norm or gate x beforehand")
    begin = 0
    columns = x_columns or (0,) * len(weights)
    for tiles, run in groupby(zip(weights, columns), key=lambda pair: tiles_of(pair[0], gpu)):
        held, first = zip(*run)
        end = begin + sum(weight.shape[0] for weight in held)
        part = None if residual is None else residual[:, begin:end]
        common = {**_launch_sizes(held, first), **tiles._asdict(), **overlap_options(pdl)}
        common |= {"HAS_RESIDUAL": part is not None, "BN": config.BN, "BK": config.BK, "PDL": pdl}
        spare = (held[0],) * (MAX_WEIGHTS - len(held))
        numbers = [numbers_of(weight, tiles) for weight in held + spare]
        scales = [scales_of(weight) for weight in held + spare]
        count = sum(triton.cdiv(weight.shape[0], config.BN) for weight in held)
        if isinstance(config, GemvConfig):
            decode_gemv_kernel[(count,)](
                x, norm_weight, part, y[:, begin:end], *numbers, *scales, eps, **common,
                HAS_NORM=norm_weight is not None, GATED=gated, UNROLL=config.UNROLL, num_warps=config.num_warps,
            )  # fmt: skip
        else:
            decode_skinny_kernel[(count, triton.cdiv(x.shape[0], config.BM))](
                x, part, y[:, begin:end], *numbers, *scales, x.shape[0], x.stride(0), y.stride(0), **common,
                BM=config.BM, STAGES=config.num_stages, UPCAST=upcast, num_warps=config.num_warps,
            )  # fmt: skip
        begin = end


def _launch_sizes(weights: tuple[torch.Tensor | WeightHandle, ...], first: tuple[int, ...]) -> dict[str, int]:
    """Compile-time sizes: rows of the weights, first columns of x for each, columns."""
    missing = [0] * (MAX_WEIGHTS - len(weights))
    sizes = {f"M{i}": size for i, size in enumerate([*(weight.shape[0] for weight in weights), *missing])}
    sizes |= {f"X{i}": column for i, column in enumerate([*first, *missing])}
    return {**sizes, "COLUMNS": weights[0].shape[1]}


def decode_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, pdl: bool = False) -> None:
    """
    y = RMSNorm of x, both [M, D] contiguous, D at most 16384; pdl as in `decode_linear`.

    That is what prompt/norms.py does for prompts; here it is one more launch that the step starts ahead.
    """
    M, D = x.shape
    decode_norm_kernel[(M,)](x, weight, y, eps, D=D, BD=padded(D), PDL=pdl, num_warps=4, **overlap_options(pdl))


def decode_gate(x: torch.Tensor, pdl: bool = False) -> None:
    """x[:, :COLUMNS] = silu(x[:, :COLUMNS]) x[:, COLUMNS:] of x [M, 2 COLUMNS], rows dense; pdl: `decode_linear`."""
    COLUMNS = x.shape[1] // 2
    BK = min(1024, padded(COLUMNS))
    decode_gate_kernel[(x.shape[0], triton.cdiv(COLUMNS, BK))](
        x, x.stride(0), COLUMNS=COLUMNS, BK=BK, PDL=pdl, num_warps=4, **overlap_options(pdl)
    )


__all__ = ["MAX_WEIGHTS", "decode_gate", "decode_gemv_kernel", "decode_linear", "decode_norm", "decode_skinny_kernel"]
