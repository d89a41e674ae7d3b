"""
Decode step: which experts the tokens go to (docs/checkpoint.md, "Experts"; arXiv 2408.15664).

    s = sigmoid(logits), c = s + bias       the TOPK experts of largest c, NaN first, ties to the lower index
    w = s or c of the chosen, divided by their sum + 1e-20 (if renormalised), times the scaling factor

Several tokens are grouped by expert, so that each expert's weights are read once: the pairs (token, choice), numbered
token * TOPK + choice, are laid out expert by expert in blocks of BM, each block of one expert.

    pairs [NB * BM]      pair of each slot, -1 where the block is not full     int32
    experts [NB]         expert of each block                                 int32
    n_blocks [1]         blocks in use; the entries after them are unwritten
"""

import torch

from ..gpu.arithmetic import sigmoid
from ..gpu.launching import overlap_options
from ..gpu.sizes import padded, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def decode_topk(p_logits, bias, E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BT: tl.constexpr):
    """Experts of the TOPK choices, int32 [BT], best first; 0 after them."""
    o_e, o_t = tl.arange(0, BE), tl.arange(0, BT)
    b_c = sigmoid(tl.load(p_logits + o_e, mask=o_e < E, other=0.0))
    b_c += tl.load(bias + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    # The bits of a float, the lower ones flipped for negative ones, compare like the float; maxima of 32-bit integers
    # are one instruction a warp. A choice is the largest score, then the lowest expert that has it.
    b_bits = b_c.to(tl.int32, bitcast=True)
    b_bits = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_bits = tl.where(b_c == b_c, b_bits, 0x7FFFFFFF)  # NaN above all numbers, as torch.topk has it
    b_bits = tl.where(o_e < E, b_bits, -(1 << 31))
    b_chosen = tl.zeros([BT], tl.int32)
    for j in tl.static_range(TOPK):
        best = tl.max(b_bits, axis=0)
        chosen = tl.min(tl.where(b_bits == best, o_e, BE), axis=0)
        b_chosen = tl.where(o_t == j, chosen, b_chosen)
        b_bits = tl.where(o_e == chosen, -(1 << 31), b_bits)
    return b_chosen


@triton.jit
def decode_store_choice(
    p_logits, bias, b_chosen, p_chosen, p_weights, factor,
    TOPK: tl.constexpr, BT: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Store the chosen experts and their weights."""
    o_t = tl.arange(0, BT)
    b_w = sigmoid(tl.load(p_logits + b_chosen))
    if BIASED:
        b_w += tl.load(bias + b_chosen).to(tl.float32)
    b_w = tl.where(o_t < TOPK, b_w, 0.0)
    if RENORMALIZE:
        b_w /= tl.sum(b_w, axis=0) + 1e-20
    tl.store(p_chosen + o_t, b_chosen, mask=o_t < TOPK)
    tl.store(p_weights + o_t, b_w * factor, mask=o_t < TOPK)


@triton.jit
def decode_route_kernel(
    logits, bias, chosen, weights, stride_logits, factor,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BT: tl.constexpr,
    BIASED: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: its experts and their weights."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_n = tl.program_id(0).to(tl.int64)
    logits += i_n * stride_logits
    b_chosen = decode_topk(logits, bias, E, BE, TOPK, BT)
    p_chosen, p_weights = chosen + i_n * TOPK, weights + i_n * TOPK
    decode_store_choice(logits, bias, b_chosen, p_chosen, p_weights, factor, TOPK, BT, BIASED, RENORMALIZE)


@triton.jit(do_not_specialize=["P"])
def decode_group_kernel(
    chosen, pairs, experts, n_blocks, P,
    E: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One expert a program: see the module docstring. Each counts the pairs of all experts to find its first block."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_e = tl.program_id(0)
    o_p, o_e, o_m = tl.arange(0, BP), tl.arange(0, BE), tl.arange(0, BM)
    b_chosen = tl.load(chosen + o_p, mask=o_p < P, other=E)  # bin E counts what is no pair
    b_count = tl.where(o_e < E, tl.histogram(b_chosen, BE), 0)
    b_blocks = (b_count + BM - 1) // BM
    first = tl.sum(tl.where(o_e < i_e, b_blocks, 0), axis=0)
    count = tl.sum(tl.where(o_e == i_e, b_count, 0), axis=0)
    if i_e == 0:
        tl.store(n_blocks, tl.sum(b_blocks, axis=0))
    m_mine = b_chosen == i_e
    b_rank = tl.cumsum(m_mine.to(tl.int32), axis=0) - 1
    tl.store(pairs + first * BM + b_rank, o_p, mask=m_mine)
    for i_m in range(0, count, BM):
        tl.store(experts + first + i_m // BM, i_e)
        tl.store(pairs + first * BM + i_m + o_m, o_m * 0 - 1, mask=i_m + o_m >= count)


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
    Fill chosen int32 and weights fp32, both [M, TOPK] contiguous, from logits [M, E] fp32 (rows dense), bias [E].

    pdl: launch programmatically dependent (see decode_linear).
    """
    (M, E), TOPK = logits.shape, chosen.shape[1]
    decode_route_kernel[(M,)](
        logits, bias, chosen, weights, logits.stride(0), factor,
        E=E, BE=power_of_two(E), TOPK=TOPK, BT=power_of_two(TOPK),
        BIASED=biased, RENORMALIZE=renormalize, PDL=pdl, num_warps=1, **overlap_options(pdl),
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
    """Group chosen [M, TOPK] by expert into pairs [NB * BM], experts [NB] and n_blocks [1], all int32; pdl as above."""
    P, BM = chosen.numel(), pairs.numel() // experts.numel()
    decode_group_kernel[(num_experts,)](
        chosen, pairs, experts, n_blocks, P,
        E=num_experts, BE=power_of_two(num_experts + 1), BP=padded(P), BM=BM, PDL=pdl,
        num_warps=4, **overlap_options(pdl),
    )  # fmt: skip


__all__ = [
    "decode_group",
    "decode_group_kernel",
    "decode_route",
    "decode_route_kernel",
    "decode_store_choice",
    "decode_topk",
    "most_blocks",
]
