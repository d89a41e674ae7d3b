"""
Which experts the tokens of a packed prompt go to: decode/routing.py's choice, and none for padding.

A padding token (`rows` < 0) chooses expert E, which is none, E times: groupings count it to nobody.
"""

import torch

from ..decode.routing import decode_store_choice, decode_topk
from ..gpu.sizes import power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def packed_route_fwd_kernel(
    logits, bias, rows, chosen, weights, stride_logits, factor,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BK: tl.constexpr,
    BIASED: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token a program: its experts and their weights."""
    i_t, o_k = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    chosen += i_t * TOPK
    weights += i_t * TOPK
    if tl.load(rows + i_t) < 0:
        tl.store(chosen + o_k, o_k * 0 + E, mask=o_k < TOPK)
        tl.store(weights + o_k, o_k * 0.0, mask=o_k < TOPK)
        return
    logits += i_t * stride_logits
    b_chosen = decode_topk(logits, bias, E, BE, TOPK, BK)
    decode_store_choice(logits, bias, b_chosen, chosen, weights, factor, TOPK, BK, BIASED, RENORMALIZE)


def packed_route_fwd(
    logits: torch.Tensor,
    bias: torch.Tensor,
    rows: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    *,
    factor: float,
    biased: bool,
    renormalize: bool,
) -> None:
    """Fill chosen int32 and weights fp32, both [T, TOPK] contiguous, from logits [T, E] fp32 (rows dense), bias [E]."""
    (T, E), TOPK = logits.shape, chosen.shape[1]
    packed_route_fwd_kernel[(T,)](
        logits, bias, rows, chosen, weights, logits.stride(0), factor,
        E=E, BE=power_of_two(E), TOPK=TOPK, BK=power_of_two(TOPK), BIASED=biased, RENORMALIZE=renormalize, num_warps=1,
    )  # fmt: skip


__all__ = ["packed_route_fwd"]
