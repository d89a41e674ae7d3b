"""The routed experts as two grouped matrix products between fused kernels, for inference in bf16 on GPUs."""

import torch
import torch.nn.functional as F

from ..gpu.availability import fused_path_serves
from .expert_rows import combine_rows_fwd, scatter_rows_fwd, silu_mul_fwd


def grouped_experts_serve(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether `grouped_experts`, or its form with gradients, takes these: bf16, as the product wants, 16-byte rows."""
    if not fused_path_serves(x, gate_up, down, differentiable=True) or x.dtype != torch.bfloat16:
        return False
    fits = all(w.dtype == torch.bfloat16 and w.is_contiguous() and w.shape[-1] % 8 == 0 for w in (gate_up, down))
    return fits and gate_up.shape[2] == down.shape[1] == x.shape[1] and gate_up.shape[1] == 2 * down.shape[2]


def grouped_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: torch.Tensor | None,
) -> torch.Tensor:
    """sum_i weights[n, i] * down_e (silu(gate_e x_n) * up_e x_n) + shared_n with e = experts[n, i].

    Args:
        x: [M, D] bf16.
        experts: [M, k] int64, each in [0, E).
        weights: [M, k] fp32.
        gate_up: [E, 2 I, D], rows of gate before those of up.
        down: [E, D, I].
        shared: [M, D] to add, rounded after the routed sum is, or None.

    Returns:
        [M, D] bf16. Nothing is read back from the GPU.
    """
    position, offsets = expert_order(experts, gate_up.shape[0])
    rows = scatter_rows_fwd(x, position)  # [M k, D]
    hidden = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets)  # [M k, 2 I]
    del rows
    gate, up = hidden.chunk(2, dim=-1)
    activated = silu_mul_fwd(gate, up)  # [M k, I]
    del hidden, gate, up
    outputs = F.grouped_mm(activated, down.transpose(1, 2), offs=offsets)  # [M k, D]
    del activated
    return combine_rows_fwd(outputs, position, weights, shared)


def expert_order(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(position [M, k] int32 of each token's rows when sorted by expert, ends [E] int32 of the experts' rows)."""
    flat = experts.flatten()
    dtype = torch.uint8 if num_experts <= 256 else torch.int32  # the sort takes a pass for each byte
    ordered, order = flat.to(dtype).sort(stable=True)
    ranks = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    position = torch.empty_like(ranks).scatter_(0, order, ranks)
    numbers = torch.arange(num_experts, device=flat.device, dtype=torch.int32)
    offsets = torch.searchsorted(ordered.to(torch.int32), numbers, right=True, out_int32=True)
    return position.view(experts.shape), offsets


__all__ = ["expert_order", "grouped_experts", "grouped_experts_serve"]
