"""
The routed experts of a packed prompt around their two grouped matrix products, without sorting.

    route      chosen [T, k], their weights, and each pair's rank among the pairs of its expert
    ends       where each expert's rows end: the running sum of the counts
    scatter    x [T, D] -> rows [T k, D], expert by expert; position = end of the expert before + rank
    combine    y_t += sum_i weights[t, i] rows[position[t, i]]           fp32, rounded once

Ranks are counted with atomics: the order of rows within an expert differs from run to run, the results don't, because
no row's product depends on its place. Padding tokens (`token_rows` < 0) have no pairs.
"""

import torch

from ..decode.routing import decode_store_choice, decode_topk
from ..gpu.sizes import padded, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def packed_route_rank_fwd_kernel(
    logits, bias, token_rows, chosen, weights, ranks, counts, stride_logits, factor,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BK: tl.constexpr,
    BIASED: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token a program: its experts, their weights and ranks."""
    i_t, o_k = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    if tl.load(token_rows + i_t) < 0:
        return
    chosen += i_t * TOPK
    logits += i_t * stride_logits
    b_chosen = decode_topk(logits, bias, E, BE, TOPK, BK)
    decode_store_choice(logits, bias, b_chosen, chosen, weights + i_t * TOPK, factor, TOPK, BK, BIASED, RENORMALIZE)
    b_rank = tl.atomic_add(counts + b_chosen, 1, mask=o_k < TOPK, sem="relaxed")
    tl.store(ranks + i_t * TOPK + o_k, b_rank, mask=o_k < TOPK)


@triton.jit
def packed_ends_fwd_kernel(counts, ends, E: tl.constexpr, BE: tl.constexpr):
    """One program: ends [E] from counts [E], which are zero again afterwards, for the next layer."""
    o_e = tl.arange(0, BE)
    b_count = tl.load(counts + o_e, mask=o_e < E, other=0)
    tl.store(ends + o_e, tl.cumsum(b_count, axis=0), mask=o_e < E)
    tl.store(counts + o_e, o_e * 0, mask=o_e < E)


@triton.jit
def packed_scatter_fwd_kernel(
    x, token_rows, chosen, ranks, ends, rows, positions, stride_x,
    D: tl.constexpr, KS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token a program. x [T, D] with dense rows."""
    i_t = tl.program_id(0).to(tl.int64)
    if tl.load(token_rows + i_t) < 0:
        return
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0)
    for i in tl.static_range(0, KS):
        expert = tl.load(chosen + i_t * KS + i)
        position = tl.load(ranks + i_t * KS + i) + tl.load(ends + expert - 1, mask=expert > 0, other=0)
        tl.store(rows + position.to(tl.int64) * D + o_d, b_x, mask=m_d)
        tl.store(positions + i_t * KS + i, position)


@triton.jit
def packed_combine_fwd_kernel(
    rows, token_rows, positions, weights, y, D: tl.constexpr, KS: tl.constexpr, BD: tl.constexpr
):
    """One token a program. rows [T KS, D] and y [T, D] contiguous."""
    i_t = tl.program_id(0).to(tl.int64)
    if tl.load(token_rows + i_t) < 0:
        return
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_y = tl.load(y + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i in tl.static_range(0, KS):
        position = tl.load(positions + i_t * KS + i).to(tl.int64)
        b_w = tl.load(weights + i_t * KS + i)
        b_y += b_w * tl.load(rows + position * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


def packed_route_rank_fwd(
    logits: torch.Tensor,
    bias: torch.Tensor,
    token_rows: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    ranks: torch.Tensor,
    counts: torch.Tensor,
    *,
    factor: float,
    biased: bool,
    renormalize: bool,
) -> None:
    """Fill chosen and ranks int32 and weights fp32, all [T, TOPK] contiguous, and add to counts [E] int32.

    logits [T, E] fp32 (rows dense), bias [E], token_rows [T] int32; what padding tokens have stays unwritten.
    """
    (T, E), TOPK = logits.shape, chosen.shape[1]
    packed_route_rank_fwd_kernel[(T,)](
        logits, bias, token_rows, chosen, weights, ranks, counts, logits.stride(0), factor,
        E=E, BE=power_of_two(E), TOPK=TOPK, BK=power_of_two(TOPK), BIASED=biased, RENORMALIZE=renormalize, num_warps=1,
    )  # fmt: skip


def packed_ends_fwd(counts: torch.Tensor, ends: torch.Tensor) -> None:
    """ends [E] int32 from counts [E] int32, which become zero."""
    E = counts.shape[0]
    packed_ends_fwd_kernel[(1,)](counts, ends, E=E, BE=power_of_two(E), num_warps=4)


def packed_scatter_fwd(
    x: torch.Tensor,
    token_rows: torch.Tensor,
    chosen: torch.Tensor,
    ranks: torch.Tensor,
    ends: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Fill rows [T k, D] contiguous and positions [T, k] int32 from x [T, D], rows dense; but for padding."""
    (T, D), BD = x.shape, padded(x.shape[1])
    packed_scatter_fwd_kernel[(T,)](
        x, token_rows, chosen, ranks, ends, rows, positions, x.stride(0),
        D=D, KS=chosen.shape[1], BD=BD, num_warps=_warps(BD),
    )  # fmt: skip


def packed_combine_fwd(
    rows: torch.Tensor, token_rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor, y: torch.Tensor
) -> None:
    """Add to y [T, D] contiguous; shapes as in the module docstring."""
    (T, D), BD = y.shape, padded(y.shape[1])
    packed_combine_fwd_kernel[(T,)](
        rows, token_rows, positions, weights, y, D=D, KS=positions.shape[1], BD=BD, num_warps=_warps(BD)
    )


def _warps(elements: int) -> int:
    """Warps of a program: 32 elements a thread, which leaves room for many rows at once on a multiprocessor."""
    return min(8, max(1, elements // 1024))


__all__ = ["packed_combine_fwd", "packed_ends_fwd", "packed_route_rank_fwd", "packed_scatter_fwd"]
