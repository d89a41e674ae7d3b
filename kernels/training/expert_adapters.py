"""
Routed experts with low-rank adapters on their stacked weights, trained without ever making an adapted weight.

    W_e + scale B_e A_e        for gate_up and down: y = W_e x + scale B_e (A_e x), three grouped products

Gradients of the frozen W are not computed; those of A [E, r, in] and B [E, out, r] are grouped products too. Around the
products stand the passes of kernels/prompt with their backwards. PEFT by itself adds scale B A to every expert's weight
in memory, and multiplies the gradient of all of that weight back.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..gpu.availability import fused_path_serves
from ..gpu.operator_names import operator_namespace
from ..prompt.expert_rows import combine_rows_fwd, scatter_rows_fwd, silu_mul_fwd
from ..prompt.grouped_experts import expert_order
from .silu_mul import stacked_silu_mul_bwd

_NAMESPACE = operator_namespace("kimi", __name__)


class LowRank(NamedTuple):
    """`down` A [E, r, in], `up` B [E, out, r], and the factor of their product."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def expert_adapters_serve(x: torch.Tensor, *adapters: LowRank | None) -> bool:
    """Whether `adapted_experts` takes these beside stacked weights that `grouped_experts_serve` takes."""
    held = [adapter for adapter in adapters if adapter is not None]
    # The grouped product wants rows of a multiple of 16 bytes.
    fits = all(a.down.shape[1] % 8 == 0 and a.down.shape[2] % 8 == 0 for a in held)
    return fits and fused_path_serves(x, *(t for a in held for t in (a.down, a.up)), differentiable=True)


@torch.library.custom_op(f"{_NAMESPACE}::stacked_silu_mul_fwd", mutates_args=())
def stacked_silu_mul_fwd(hidden: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [M, I] of hidden [M, 2 I], gate before up; differentiable once."""
    return silu_mul_fwd(*hidden.chunk(2, dim=-1))


@stacked_silu_mul_fwd.register_fake
def _(hidden):
    return hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    return stacked_silu_mul_bwd(*ctx.saved_tensors, dy)


stacked_silu_mul_fwd.register_autograd(_backward, setup_context=_setup_context)


def adapted_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: torch.Tensor | None,
    gate_up_adapter: LowRank | None,
    down_adapter: LowRank | None,
) -> torch.Tensor:
    """As `grouped_experts` of kernels/prompt, with adapters; differentiable once in all but `experts`.

    Args:
        x: [M, D] bf16.
        experts: [M, k] int64, each in [0, E).
        weights: [M, k] fp32.
        gate_up: [E, 2 I, D].
        down: [E, D, I].
        shared: [M, D] or None.
        gate_up_adapter, down_adapter: factors in any floating dtype, rounded to that of x; or None.
    """
    position, offsets = expert_order(experts, gate_up.shape[0])
    hidden = _adapted_product(scatter_rows_fwd(x, position), gate_up, gate_up_adapter, offsets)  # [M k, 2 I]
    outputs = _adapted_product(stacked_silu_mul_fwd(hidden), down, down_adapter, offsets)  # [M k, D]
    return combine_rows_fwd(outputs, position, weights, shared)


def _adapted_product(
    rows: torch.Tensor, weight: torch.Tensor, adapter: LowRank | None, offsets: torch.Tensor
) -> torch.Tensor:
    """Rows [M k, in] times their expert's weight [E, out, in] and adapter."""
    y = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    if adapter is None:
        return y
    down, up = (t.to(rows.dtype).contiguous() for t in (adapter.down, adapter.up * adapter.scale))
    low = F.grouped_mm(rows, down.transpose(1, 2), offs=offsets)  # [M k, r]
    return y + F.grouped_mm(low, up.transpose(1, 2), offs=offsets)


__all__ = ["LowRank", "adapted_experts", "expert_adapters_serve"]
