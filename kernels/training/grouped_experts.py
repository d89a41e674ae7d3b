"""
The routed experts with gradients: grouped matrix products between fused kernels, in bf16 on GPUs.

Rows r are the (token, slot) pairs in the order of their experts; w_r is a row's weight, e its expert:

    h_r = gate_up_e x_r        a_r = silu(gate) * up        y_n = sum over n's rows of w_r down_e a_r

The forward keeps h and where the rows stand, nothing else of [M k, .]. With p_r = down_e^T dy_r:

    dw_r = p_r . a_r     ddown_e = sum_r dy_r (w_r a_r)^T     dh = (silu_mul) (w_r p_r)
    dgate_up_e = sum_r dh_r x_r^T                             dx_n = sum over n's rows of gate_up_e^T dh_r

so the outputs of the experts are not needed again. Gradients of the stacked weights are one product each, written once
in the layout of the weights: nothing is cast, gathered or filled with zeros. An expert without rows gets zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..gpu.operator_names import operator_namespace
from ..prompt.expert_rows import combine_rows_fwd, scatter_rows_fwd, silu_mul_fwd
from ..prompt.grouped_experts import expert_order
from .silu_mul import weighted_silu_mul_bwd

_NAMESPACE = operator_namespace("kimi", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::grouped_experts_fwd", mutates_args=())
def _grouped_experts_fwd(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [M, D], and for the backward h [M k, 2 I], position [M, k] and ends [E] of the experts' rows (int32)."""
    position, offsets = expert_order(experts, gate_up.shape[0])
    hidden = F.grouped_mm(scatter_rows_fwd(x, position), gate_up.transpose(1, 2), offs=offsets)
    activated = silu_mul_fwd(*hidden.chunk(2, dim=-1))
    outputs = F.grouped_mm(activated, down.transpose(1, 2), offs=offsets)
    del activated
    return combine_rows_fwd(outputs, position, weights, shared), hidden, position, offsets


@_grouped_experts_fwd.register_fake
def _(x, experts, weights, gate_up, down, shared):
    rows, (E, width) = experts.numel(), gate_up.shape[:2]
    position, offsets = experts.new_empty(experts.shape, dtype=torch.int32), experts.new_empty(E, dtype=torch.int32)
    return x.new_empty(x.shape), x.new_empty(rows, width), position, offsets


@torch.library.custom_op(f"{_NAMESPACE}::grouped_experts_bwd", mutates_args=())
def _grouped_experts_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    hidden: torch.Tensor,
    position: torch.Tensor,
    offsets: torch.Tensor,
    of_gate_up: bool,
    of_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weights, gate_up and down; of the last two an empty tensor where it is not wanted."""
    dgate_up, ddown = gate_up.new_empty(0), down.new_empty(0)
    slots = position.flatten().long()
    row_weights = torch.empty_like(weights.flatten()).scatter_(0, slots, weights.flatten())
    drows = scatter_rows_fwd(dy, position)  # [M k, D]
    dactivated = F.grouped_mm(drows, down, offs=offsets)  # [M k, I], not weighted
    dhidden, activated, dweights = weighted_silu_mul_bwd(hidden, dactivated, row_weights)
    del dactivated
    if of_down:
        ddown = F.grouped_mm(drows.t(), activated, offs=offsets)
    del drows, activated
    if of_gate_up:
        dgate_up = F.grouped_mm(dhidden.t(), scatter_rows_fwd(x, position), offs=offsets)
    drows = F.grouped_mm(dhidden, gate_up, offs=offsets)
    del dhidden
    dx = combine_rows_fwd(drows, position, torch.ones_like(weights), None)
    return dx, dweights[slots].view(weights.shape), dgate_up, ddown


@_grouped_experts_bwd.register_fake
def _(dy, x, weights, gate_up, down, hidden, position, offsets, of_gate_up, of_down):
    dgate_up = gate_up.new_empty(gate_up.shape if of_gate_up else 0)
    ddown = down.new_empty(down.shape if of_down else 0)
    return x.new_empty(x.shape), weights.new_empty(weights.shape), dgate_up, ddown


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, _, weights, gate_up, down, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weights, gate_up, down, *output[1:])


def _backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    of_gate_up, of_down = ctx.needs_input_grad[3:5]
    dx, dweights, dgate_up, ddown = _grouped_experts_bwd(dy, *ctx.saved_tensors, of_gate_up, of_down)
    shared = dy if ctx.needs_input_grad[5] else None
    return dx, None, dweights, dgate_up if of_gate_up else None, ddown if of_down else None, shared


_grouped_experts_fwd.register_autograd(_backward, setup_context=_setup_context)


def grouped_experts_with_gradients(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: torch.Tensor | None,
) -> torch.Tensor:
    """As `grouped_experts` of kernels/prompt/grouped_experts.py, and differentiable once in all but `experts`.

    Args:
        x: [M, D] bf16.
        experts: [M, k] int64, each in [0, E).
        weights: [M, k] fp32.
        gate_up: [E, 2 I, D], rows of gate before those of up, contiguous.
        down: [E, D, I], contiguous.
        shared: [M, D] to add, rounded after the routed sum is, or None.

    Returns:
        [M, D] bf16. Nothing is read back from the GPU.
    """
    return _grouped_experts_fwd(x, experts, weights, gate_up, down, shared)[0]


__all__ = ["grouped_experts_with_gradients"]
