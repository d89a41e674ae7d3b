"""
Gradients of the passes around the products of experts, where each stands for itself (forwards: kernels/prompt).

    scatter    rows[position[n, i]] = x[n]                     dx[n] = sum_i drows[position[n, i]]
    combine    y[n] = sum_i w[n, i] rows[position[n, i]]       drows[position[n, i]] = w[n, i] dy[n]
               (+ shared[n])                                   dw[n, i] = dy[n] . rows[position[n, i]], dshared = dy

Sums in fp32, each result rounded once to the dtype of the rows; dw stays in fp32.
"""

from typing import Any

import torch

from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)


@triton.jit
def combine_rows_bwd_kernel(
    dy, rows, position, weights, drows, dweights, stride_y, D: tl.constexpr, KS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """One token a program. dy [M, D] with dense rows; rows, drows [M KS, D] contiguous; weights, dweights [M, KS]."""
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BD)
    m_h = o_h < D
    b_y = tl.load(dy + i_n * stride_y + o_h, mask=m_h, other=0.0).to(tl.float32)
    for i in tl.static_range(0, KS):
        i_r = tl.load(position + i_n * KS + i).to(tl.int64)
        b_w = tl.load(weights + i_n * KS + i)
        b_x = tl.load(rows + i_r * D + o_h, mask=m_h, other=0.0).to(tl.float32)
        tl.store(dweights + i_n * KS + i, tl.sum(b_x * b_y, axis=0))
        tl.store(drows + i_r * D + o_h, (b_w * b_y).to(drows.dtype.element_ty), mask=m_h)


@torch.library.custom_op(f"{_NAMESPACE}::combine_rows_bwd", mutates_args=())
@launches_beside_first_argument
def combine_rows_bwd(
    dy: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(drows [M k, D] in the dtype of rows, dweights [M, k] fp32) of dy [M, D]; position and weights [M, k]."""
    (M, KS), D = position.shape, rows.shape[1]
    drows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    dweights = torch.empty(M, KS, dtype=torch.float32, device=rows.device)
    if rows.numel() > 0:
        dy, BD = dy if dy.stride(-1) == 1 else dy.contiguous(), padded(D)
        combine_rows_bwd_kernel[(M,)](
            dy, rows.contiguous(), position.contiguous(), weights.contiguous(), drows, dweights, dy.stride(0),
            D=D, KS=KS, BD=BD, num_warps=min(8, max(1, BD // 1024)),
        )  # fmt: skip
    return drows, dweights


@combine_rows_bwd.register_fake
def _(dy, rows, position, weights):
    return rows.new_empty(rows.shape), weights.new_empty(position.shape)


def differentiate_rows(scatter_rows_fwd: Any, combine_rows_fwd: Any) -> None:
    """Give the forwards' operators their backwards."""

    def setup_scatter(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    def backward_scatter(ctx: Any, drows: torch.Tensor) -> tuple[torch.Tensor, None]:
        (position,) = ctx.saved_tensors
        ones = torch.ones(position.shape, dtype=torch.float32, device=position.device)
        return combine_rows_fwd(drows.contiguous(), position, ones, None), None

    def setup_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    def backward_combine(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, position, weights = ctx.saved_tensors
        drows, dweights = combine_rows_bwd(dy, rows, position, weights)
        return drows, None, dweights, dy if ctx.needs_input_grad[3] else None

    scatter_rows_fwd.register_autograd(backward_scatter, setup_context=setup_scatter)
    combine_rows_fwd.register_autograd(backward_combine, setup_context=setup_combine)


__all__ = ["combine_rows_bwd", "differentiate_rows"]
