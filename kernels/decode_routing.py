"""
Decode step: which experts the tokens go to (reference section 3.4; arXiv 2408.15664).

    s = sigmoid(logits), c = s + bias       the TOPK experts of largest c, ties to the lower index
    w = s or c of the chosen, divided by their sum + 1e-20 (if renormalised), times the scaling factor

Several tokens are grouped by expert, so that each expert's weights are read once: the pairs (token, choice), numbered
token * TOPK + choice, are laid out expert by expert in blocks of BM, each block of one expert.

    pairs [NB * BM]      pair of each slot, -1 where the block is not full     int32
    experts [NB]         expert of each block                                 int32
    n_blocks [1]         blocks in use; the entries behind them are unwritten
"""

import torch

from .decode_configs import launch_options, padded
from .kda_triton_math import kda_sigmoid

try:
    import triton
    import triton.language as tl
except ImportError:
    from .kda_triton_absent import tl, triton


@triton.jit
def decode_topk(
    p_logits, bias, i_slot,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Expert of choice `i_slot` and its weight before scaling."""
    o_e = tl.arange(0, BE)
    b_s = kda_sigmoid(tl.load(p_logits + o_e, mask=o_e < E, other=0.0))
    b_c = b_s + tl.load(bias + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    if BIASED:
        b_s = b_c
    b_c = tl.where(o_e < E, b_c, float("-inf"))
    expert, weight, total = i_slot * 0, 0.0, 1e-20
    for j in tl.static_range(TOPK):
        best = tl.argmax(b_c, axis=0)
        score = tl.sum(tl.where(o_e == best, b_s, 0.0), axis=0)
        total += score
        expert = tl.where(i_slot == j, best, expert)
        weight = tl.where(i_slot == j, score, weight)
        b_c = tl.where(o_e == best, float("-inf"), b_c)
    if RENORMALIZE:
        weight /= total
    return expert, weight


@triton.jit
def decode_route_kernel(
    logits, bias, chosen, weights, stride_logits, factor,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, choice): its expert and weight."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_n, i_slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    expert, weight = decode_topk(logits + i_n * stride_logits, bias, i_slot, E, BE, TOPK, BIASED, RENORMALIZE)
    tl.store(chosen + i_n * TOPK + i_slot, expert)
    tl.store(weights + i_n * TOPK + i_slot, weight * factor)


@triton.jit(do_not_specialize=["P"])
def decode_group_kernel(
    chosen, pairs, experts, n_blocks, P,
    E: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program for all P pairs: see the module docstring. BLOCKS: most blocks of one expert, ceil(N / BM)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    o_e = tl.arange(0, BE)
    b_count = tl.zeros([BE], tl.int32)
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP)
        b_chosen = tl.load(chosen + o_p, mask=o_p < P, other=-1)
        b_count += tl.sum((b_chosen[:, None] == o_e[None, :]).to(tl.int32), axis=0)
    b_blocks = (b_count + BM - 1) // BM
    b_end = tl.cumsum(b_blocks, axis=0)
    b_first = b_end - b_blocks
    tl.store(n_blocks, tl.sum(b_blocks, axis=0))
    o_m = tl.arange(0, BM)
    for j in tl.static_range(BLOCKS):
        m_e = (j < b_blocks) & (o_e < E)
        tl.store(experts + b_first + j, o_e, mask=m_e)
        o_slot = (b_first + j)[:, None] * BM + o_m[None, :]
        tl.store(pairs + o_slot, o_slot * 0 - 1, mask=m_e[:, None] & (j * BM + o_m[None, :] >= b_count[:, None]))
    # The rank of a pair among those of its expert, in blocks of BP against all before and inside.
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP)
        b_chosen = tl.load(chosen + o_p, mask=o_p < P, other=-1)
        b_rank = tl.zeros([BP], tl.int32)
        for i_r in range(0, i_p + BP, BP):
            o_r = i_r + tl.arange(0, BP)
            b_other = tl.load(chosen + o_r, mask=o_r < P, other=-2)
            m_before = (b_other[None, :] == b_chosen[:, None]) & (o_r[None, :] < o_p[:, None])
            b_rank += tl.sum(m_before.to(tl.int32), axis=1)
        m_mine = (b_chosen[:, None] == o_e[None, :]).to(tl.int32)
        b_base = tl.sum(m_mine * b_first[None, :], axis=1)
        tl.store(pairs + b_base * BM + b_rank, o_p, mask=o_p < P)


def decode_route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    *,
    factor: float,
    biased: bool,
    renormalize: bool,
    pdl: bool = False,
) -> None:
    """
    Fill chosen int32 and weights fp32, both [N, TOPK] contiguous, from logits [N, E] fp32 (rows dense), bias [E].

    pdl: launch programmatically dependent (see decode_linear).
    """
    (N, E), TOPK = logits.shape, chosen.shape[1]
    decode_route_kernel[(N, TOPK)](
        logits, bias, chosen, weights, logits.stride(0), factor,
        E=E, BE=triton.next_power_of_2(E), TOPK=TOPK, BIASED=biased, RENORMALIZE=renormalize, PDL=pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip


def most_blocks(tokens: int, topk: int, num_experts: int, BM: int) -> int:
    """Blocks that `tokens` tokens can need at most."""
    pairs = tokens * topk
    return min(pairs, num_experts * -(-tokens // BM), num_experts + pairs // BM)


def decode_group(
    chosen: torch.Tensor,
    pairs: torch.Tensor,
    experts: torch.Tensor,
    n_blocks: torch.Tensor,
    num_experts: int,
    pdl: bool = False,
) -> None:
    """Group chosen [N, TOPK] by expert into pairs [NB * BM], experts [NB] and n_blocks [1], all int32; pdl as above."""
    (N, _), P = chosen.shape, chosen.numel()
    BM = pairs.numel() // experts.numel()
    decode_group_kernel[(1,)](
        chosen, pairs, experts, n_blocks, P,
        E=num_experts, BE=triton.next_power_of_2(num_experts), BP=min(64, padded(P)), BM=BM,
        BLOCKS=triton.cdiv(N, BM), PDL=pdl, num_warps=8, **launch_options(pdl),
    )  # fmt: skip


__all__ = ["decode_group", "decode_group_kernel", "decode_route", "decode_route_kernel", "decode_topk", "most_blocks"]
