"""
Decode step: low-rank adapters (LoRA, arXiv 2106.09685) beside the weights they belong to, which stay unmerged.

    t_s    = scale_s A_s x̂_s          [N, r_s]      x̂ as in decode/linear.py, A_s [r_s, COLUMNS]
    y_s   += B_s t_s                   [N, O_s]      B_s [O_s, r_s]; y holds the weights' own product

The adapters of projections that share an input are two launches for all of them. Both factors are read where they lie,
by addresses in device memory: an optimiser that changes them in place needs no new graph. A row of the table is

    [address of A, address of B, r_s, O_s, first column of x, of t, of y]                      int64 [7]

t is fp32 [SPLITS, N, at least the sum of r_s]: several tokens cut COLUMNS into SPLITS parts, since few rows of A make
few programs, and the second launch adds the parts up in their order. Nothing is rounded but y.

Experts have a pair of factors each (see expert_adapters.py).
"""

import torch

from ..gpu.arithmetic import rounded_dot
from ..gpu.launching import overlap_options
from ..gpu.sizes import padded
from .linear import decode_input, decode_prefetch_vector

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

ENTRY = 7  # int64 of a row of the table
_MOST_SPLITS = 8


def adapter_splits(tokens: int, columns: int) -> int:
    """Parts that COLUMNS are cut into."""
    return 1 if tokens == 1 else max(1, min(_MOST_SPLITS, columns // 256))


@triton.jit
def decode_adapter_entry(table, i_s):
    """(address of A, address of B, rank, rows of B, first column of x, of t, of y) of adapter `i_s`."""
    entry = table + i_s * 7
    return (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3),
        tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6),
    )  # fmt: skip


@triton.jit
def decode_adapter_row(
    a, x, norm_weight, scale, eps,
    COLUMNS: tl.constexpr, BK: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """`scale` times the product of the row of A at `a` and one token's x̂ (see `decode_input`), fp32."""
    b_t = tl.zeros([BK], tl.float32)
    b_ss = tl.zeros([BK], tl.float32)
    for i_k in range(0, COLUMNS, BK):
        o_k = i_k + tl.arange(0, BK)
        b_a = tl.load(a + o_k, mask=o_k < COLUMNS, other=0.0).to(tl.float32)
        b_x, b_xx = decode_input(x, norm_weight, o_k, COLUMNS, HAS_NORM, GATED)
        b_t += b_a * b_x
        b_ss += b_xx
    total = tl.sum(b_t, axis=0) * scale
    if HAS_NORM:
        total *= tl.rsqrt(tl.sum(b_ss, axis=0) / COLUMNS + eps)
    return total


@triton.jit
def decode_adapter_down_kernel(
    x, norm_weight, factors, table, scales, t, eps,
    COLUMNS: tl.constexpr, BK: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, program (row of A, adapter). `factors` has the factors' dtype; nothing is read from it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_r, i_s = tl.program_id(0), tl.program_id(1)
    address, _, rank, _, x_col, t_col, _ = decode_adapter_entry(table, i_s)
    scale = tl.load(scales + i_s)
    a = address.to(tl.pointer_type(factors.dtype.element_ty)) + i_r * COLUMNS
    if PDL:
        if i_r < rank:
            decode_prefetch_vector(a, COLUMNS)
        tl.extra.cuda.gdc_wait()
    if i_r >= rank:
        return
    x += x_col
    total = decode_adapter_row(a, x, norm_weight, scale, eps, COLUMNS, BK, HAS_NORM, GATED)
    tl.store(t + t_col + i_r, total)


@triton.jit(do_not_specialize=["M"])
def decode_adapter_down_rows_kernel(
    x, factors, table, scales, t, M, stride_x, stride_t, stride_split,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    TILES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens, program (BM tokens, adapter and tile of BR rows of A, part of the columns)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_s, i_split = tl.program_id(1) // TILES, tl.program_id(2)
    address, _, rank, _, x_col, t_col, _ = decode_adapter_entry(table, i_s)
    scale = tl.load(scales + i_s)
    if PDL:
        tl.extra.cuda.gdc_wait()
    o_r = tl.program_id(1) % TILES * BR + tl.arange(0, BR)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_r, m_m = o_r < rank, o_m < M
    DTYPE: tl.constexpr = x.dtype.element_ty if x.dtype == factors.dtype else tl.float32
    PART: tl.constexpr = ((COLUMNS + SPLITS - 1) // SPLITS + BK - 1) // BK * BK
    p_a = address.to(tl.pointer_type(factors.dtype.element_ty)) + o_r.to(tl.int64)[:, None] * COLUMNS
    p_x = x + o_m.to(tl.int64)[:, None] * stride_x + x_col
    b_t = tl.zeros([BM, BR], tl.float32)
    for i_k in range(0, PART, BK):
        o_k = i_split * PART + i_k + tl.arange(0, BK)
        m_k = o_k < COLUMNS
        b_a = tl.load(p_a + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_t = rounded_dot(b_x, tl.trans(b_a), b_t, DTYPE, "ieee", UPCAST)
    p_t = t + i_split * stride_split + o_m.to(tl.int64)[:, None] * stride_t + (t_col + o_r)[None, :]
    tl.store(p_t, b_t * scale, mask=m_m[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["M"])
def decode_adapter_up_kernel(
    t, factors, table, y, M, stride_t, stride_split, stride_y,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN rows of B, adapter, BM tokens); one token where BM is 1."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_s = tl.program_id(1)
    _, address, rank, n_rows, _, t_col, y_col = decode_adapter_entry(table, i_s)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_r = tl.arange(0, BR)
    m_n, m_m = o_n < n_rows, o_m < M
    p_b = address.to(tl.pointer_type(factors.dtype.element_ty)) + o_n.to(tl.int64)[:, None] * rank + o_r[None, :]
    b_b = tl.load(p_b, mask=m_n[:, None] & (o_r < rank)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if tl.program_id(0) * BN >= n_rows:
        return
    p_t = t + o_m.to(tl.int64)[:, None] * stride_t + (t_col + o_r)[None, :]
    p_y = y + o_m.to(tl.int64)[:, None] * stride_y + (y_col + o_n)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    b_y = tl.load(p_y, mask=m_y, other=0.0).to(tl.float32)
    for i_r in range(0, rank, BR):
        m_r = i_r + o_r < rank
        if i_r > 0:
            b_b = tl.load(p_b + i_r, mask=m_n[:, None] & m_r[None, :], other=0.0)
        b_t = tl.zeros([BM, BR], tl.float32)
        for i_split in tl.static_range(SPLITS):
            b_t += tl.load(p_t + i_r + i_split * stride_split, mask=m_m[:, None] & m_r[None, :], other=0.0)
        if BM == 1:
            b_y += tl.sum(b_b.to(tl.float32) * b_t, axis=1)[None, :]
        else:
            b_y = rounded_dot(b_t, tl.trans(b_b), b_y, tl.float32, "ieee", False)
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)


def decode_adapters(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    factors: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    t: torch.Tensor,
    columns: int,
    most_rank: int,
    most_rows: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Add the adapters' products to y (see the module docstring).

    Args:
        x: [N, at least COLUMNS], rows dense.
        y: [N, columns that the table names], rows dense.
        factors: any one of the factors, all of which have its dtype and are contiguous.
        table: [adapters, 7] int64, see the module docstring.
        scales: [adapters] fp32.
        t: workspace fp32, at least adapter_splits(N, columns) * N * (sum of ranks) elements, contiguous.
        columns: COLUMNS, of every A.
        most_rank: the largest rank.
        most_rows: the largest O_s.
        norm_weight: [COLUMNS] of an RMSNorm of x, with its `eps`; or None. One token only.
        gated: whether x holds gate and up activations. One token only.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see decode_linear).
    """
    (N, count), splits = (x.shape[0], table.shape[0]), adapter_splits(x.shape[0], columns)
    t = t.view(-1)[: t.numel() // (splits * N) * (splits * N)].view(splits, N, -1)
    common = {"PDL": pdl, **overlap_options(pdl)}
    if N == 1:
        BK = min(4096, padded(columns))
        decode_adapter_down_kernel[(most_rank, count)](
            x, norm_weight, factors, table, scales, t, eps,
            COLUMNS=columns, BK=BK, HAS_NORM=norm_weight is not None, GATED=gated, num_warps=max(1, min(4, BK // 512)),
            **common,
        )  # fmt: skip
        BM, BN, BR = 1, 32, min(64, padded(most_rank))
    else:
        if norm_weight is not None or gated:
            raise ValueError("a norm or a gate is part of the one-token kernel only; norm or gate x beforehand")
        BM, BN, BR = min(32, padded(N)), 32, min(64, padded(most_rank))
        tiles = triton.cdiv(most_rank, 16)
        decode_adapter_down_rows_kernel[(triton.cdiv(N, BM), count * tiles, splits)](
            x, factors, table, scales, t, N, x.stride(0), t.stride(1), t.stride(0),
            COLUMNS=columns, SPLITS=splits, BM=BM, BR=16, BK=min(64, padded(columns)), TILES=tiles, UPCAST=upcast,
            num_warps=4, **common,
        )  # fmt: skip
    decode_adapter_up_kernel[(triton.cdiv(most_rows, BN), count, triton.cdiv(N, BM))](
        t, factors, table, y, N, t.stride(1), t.stride(0), y.stride(0),
        SPLITS=splits, BM=BM, BN=BN, BR=BR, num_warps=1 if N == 1 else 4, **common,
    )  # fmt: skip


__all__ = [
    "ENTRY",
    "adapter_splits",
    "decode_adapter_down_kernel",
    "decode_adapter_down_rows_kernel",
    "decode_adapter_row",
    "decode_adapter_up_kernel",
    "decode_adapters",
]
