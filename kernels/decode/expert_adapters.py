"""
Decode step: low-rank adapters of stacked experts, for the experts that tokens have chosen only.

    t_p    = scale A_e x_p             [P, R]       pair p = (token, choice), e its expert; A [E, R, D] contiguous
    W_e x_p + B_e t_p                               B [E, O, R] in any layout: PEFT keeps experts side by side

The first line is a launch before that of the weights, which adds the second line to its sums (`decode_delta`,
`decode_delta_rows`): the deltas B_e A_e are formed for no expert. x_p is the token's normed input for the up
projections, and the pair's hidden activations for the down projections. Sums are fp32.
"""

from typing import NamedTuple

import torch

from ..gpu.arithmetic import rounded_dot
from ..gpu.launching import overlap_options
from ..gpu.sizes import padded, power_of_two
from .adapters import decode_adapter_row
from .routing import decode_topk

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


class ExpertFactors(NamedTuple):
    """Of one stacked projection: `down` A [E, R, D] contiguous, `up` B [E, O, R] strided, of one dtype; `scale`."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@triton.jit
def decode_delta(t, factor, o_n, m_n, stride_n, stride_r, RANK: tl.constexpr, BR: tl.constexpr):
    """B t for the rows `o_n` of the B at `factor` and one t: fp32 [BN]."""
    o_r = tl.arange(0, BR)
    m_r = o_r < RANK
    p_b = factor + o_n.to(tl.int64)[:, None] * stride_n + o_r[None, :] * stride_r
    b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32)
    return tl.sum(b_b * tl.load(t + o_r, mask=m_r, other=0.0)[None, :], axis=1)


@triton.jit
def decode_delta_rows(
    b_y, t, factor, b_row, m_m, o_n, m_n, stride_n, stride_r, RANK: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """`b_y` [BM, BN] plus B t for the rows `b_row` of t."""
    for i_r in tl.static_range(0, RANK, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < RANK
        p_b = factor + o_n.to(tl.int64)[:, None] * stride_n + o_r[None, :] * stride_r
        b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)
        b_t = tl.load(t + b_row[:, None] * RANK + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_y = rounded_dot(b_t, tl.trans(b_b), b_y, tl.float32, "ieee", False)
    return b_y


@triton.jit
def decode_expert_adapter_kernel(
    x, norm_weight, logits, bias, chosen, down, t, scale, eps,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BT: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, CHOOSES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, program (row of A, choice). CHOOSES: by the router's logits, and x is one token's, to be normed."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_r, i_slot = tl.program_id(0), tl.program_id(1)
    if CHOOSES:
        b_chosen = decode_topk(logits, bias, E, BE, TOPK, BT)
        expert = tl.sum(tl.where(tl.arange(0, BT) == i_slot, b_chosen, 0), axis=0)
    else:
        expert = tl.load(chosen + i_slot)
        x += i_slot * D
    a = down + (expert.to(tl.int64) * R + i_r) * D
    total = decode_adapter_row(a, x, norm_weight, scale, eps, D, BK, CHOOSES, False)
    tl.store(t + i_slot * R + i_r, total)


@triton.jit
def decode_grouped_adapter_kernel(
    x, pairs, experts, n_blocks, down, t, scale, stride_x,
    TOPK: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens, program (block of pairs of one expert, tile of rows of A); x has a row for TOPK pairs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_block = tl.program_id(0)
    if i_block >= tl.load(n_blocks):
        return
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    b_row = tl.load(pairs + i_block * BM + tl.arange(0, BM)).to(tl.int64)
    m_m, m_r = b_row >= 0, o_r < R
    expert = tl.load(experts + i_block).to(tl.int64)
    DTYPE: tl.constexpr = x.dtype.element_ty if x.dtype == down.dtype else tl.float32
    p_a = down + (expert * R + o_r)[:, None] * D
    p_x = x + (b_row // TOPK)[:, None] * stride_x
    b_t = tl.zeros([BM, BR], tl.float32)
    for i_k in range(0, D, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < D
        b_a = tl.load(p_a + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_t = rounded_dot(b_x, tl.trans(b_a), b_t, DTYPE, "ieee", UPCAST)
    tl.store(t + b_row[:, None] * R + o_r[None, :], b_t * scale, mask=m_m[:, None] & m_r[None, :])


def decode_expert_adapter(
    x: torch.Tensor,
    factors: ExpertFactors,
    t: torch.Tensor,
    chosen: torch.Tensor,
    *,
    logits: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> None:
    """
    Fill t [TOPK, R] fp32, contiguous, of one token.

    Args:
        x: [1, D], the residual stream, where `logits` are given; else [at least TOPK, D] contiguous, a row a choice.
        factors: of the projection.
        chosen: [TOPK] int32; read only without `logits`.
        logits, bias, norm_weight, eps: of the router and of the norm before it, as for `decode_expert_up`.
        pdl: launch programmatically dependent (see decode_linear).
    """
    (E, R, D), TOPK = factors.down.shape, chosen.numel()
    decode_expert_adapter_kernel[(R, TOPK)](
        x, norm_weight, logits, bias, chosen, factors.down, t, factors.scale, eps,
        E=E, BE=power_of_two(E), TOPK=TOPK, BT=power_of_two(TOPK), R=R, D=D, BK=min(4096, padded(D)),
        CHOOSES=logits is not None, PDL=pdl, num_warps=4, **overlap_options(pdl),
    )  # fmt: skip


def decode_grouped_adapter(
    x: torch.Tensor,
    factors: ExpertFactors,
    t: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    topk: int,
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Fill t [P, R] fp32, contiguous, of several tokens.

    Args:
        x: rows dense, one for every `topk` pairs: [M, D] normed inputs with TOPK, [P, D] hidden activations with 1.
        factors: of the projection.
        groups: (pairs, experts, n_blocks) of decode/routing.py.
        topk: see x.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see decode_linear).
    """
    (pairs, experts, n_blocks), (_, R, D) = groups, factors.down.shape
    blocks = experts.numel()
    decode_grouped_adapter_kernel[(blocks, triton.cdiv(R, 16))](
        x, pairs, experts, n_blocks, factors.down, t, factors.scale, x.stride(0),
        TOPK=topk, R=R, D=D, BM=pairs.numel() // blocks, BR=16, BK=min(128, padded(D)), UPCAST=upcast, PDL=pdl,
        num_warps=2, **overlap_options(pdl),
    )  # fmt: skip


__all__ = [
    "ExpertFactors",
    "decode_delta",
    "decode_delta_rows",
    "decode_expert_adapter",
    "decode_expert_adapter_kernel",
    "decode_grouped_adapter",
    "decode_grouped_adapter_kernel",
]
