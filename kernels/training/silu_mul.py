"""
Gradients of silu(gate) * up, for MLPs and for the rows of experts, whose outputs are weighted.

With s = sigmoid(gate), a = gate s up and p the gradient of a before it is weighted by w (1 for MLPs):

    dgate = w p up s (1 + gate (1 - s))        dup = w p gate s        dw = sum over I of p a        weighted = w a

in fp32, each rounded once. `weighted` is what the gradient of the product after it multiplies, and the forward needn't
keep it. The forward is `silu_mul_fwd` of kernels/prompt/expert_rows.py.
"""

from typing import Any

import torch

from ..gpu.launching import dense_rows, launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)


@triton.jit(do_not_specialize=["M"])
def silu_mul_bwd_kernel(
    gate, up, dy, weights, dgate, dup, weighted, dweights, stride_g, stride_u, stride_y, stride_dg, stride_du, M,
    I: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """BM rows a program, BI columns at a time. All of [M, I] with dense rows, weighted contiguous; weights [M] fp32."""
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_n = o_n < M
    b_w = tl.full([BM], 1.0, tl.float32)
    b_dw = tl.zeros([BM], tl.float32)
    if WEIGHTED:
        b_w = tl.load(weights + o_n, mask=m_n, other=0.0)
    for i_d in range(0, I, BI):
        o_d = i_d + tl.arange(0, BI)
        m_nd = m_n[:, None] & (o_d < I)[None, :]
        b_g = tl.load(gate + o_n[:, None] * stride_g + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        b_u = tl.load(up + o_n[:, None] * stride_u + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        b_p = tl.load(dy + o_n[:, None] * stride_y + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        b_s = tl.sigmoid(b_g)
        b_a = b_g * b_s
        if WEIGHTED:
            b_dw += tl.sum(b_p * b_a * b_u, axis=1)
            b_y = b_w[:, None] * b_a * b_u
            tl.store(weighted + o_n[:, None] * I + o_d[None, :], b_y.to(weighted.dtype.element_ty), mask=m_nd)
            b_p *= b_w[:, None]
        b_dg = b_p * b_u * b_s * (1.0 + b_g * (1.0 - b_s))
        tl.store(dgate + o_n[:, None] * stride_dg + o_d[None, :], b_dg.to(dgate.dtype.element_ty), mask=m_nd)
        tl.store(dup + o_n[:, None] * stride_du + o_d[None, :], (b_p * b_a).to(dup.dtype.element_ty), mask=m_nd)
    if WEIGHTED:
        tl.store(dweights + o_n, b_dw, mask=m_n)


def _launch(
    gate: torch.Tensor,
    up: torch.Tensor,
    dy: torch.Tensor,
    weights: torch.Tensor | None,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    weighted: torch.Tensor | None,
    dweights: torch.Tensor | None,
) -> None:
    M, I = gate.shape
    if gate.numel() == 0:
        return
    BI = min(1024, padded(I))
    BM = max(1, 2048 // BI)
    silu_mul_bwd_kernel[(triton.cdiv(M, BM),)](
        gate, up, dy, weights, dgate, dup, weighted, dweights,
        gate.stride(0), up.stride(0), dy.stride(0), dgate.stride(0), dup.stride(0), M,
        I=I, BM=BM, BI=BI, WEIGHTED=weights is not None, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op(f"{_NAMESPACE}::silu_mul_bwd", mutates_args=())
@launches_beside_first_argument
def silu_mul_bwd(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) for [..., I] tensors of one dtype; fresh and contiguous."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _launch(
        *map(dense_rows, (gate, up, dy)), None, dgate.view(-1, gate.shape[-1]), dup.view(-1, up.shape[-1]), None, None
    )
    return dgate, dup


@silu_mul_bwd.register_fake
def _(gate, up, dy):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@torch.library.custom_op(f"{_NAMESPACE}::stacked_silu_mul_bwd", mutates_args=())
@launches_beside_first_argument
def stacked_silu_mul_bwd(hidden: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """dhidden [M, 2 I] for hidden [M, 2 I], gate before up, and dy [M, I]; fresh and contiguous."""
    hidden, dy = dense_rows(hidden), dense_rows(dy)
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    halves, dhalves = (x.split(dy.shape[1], dim=1) for x in (hidden, dhidden))
    _launch(*halves, dy, None, *dhalves, None, None)
    return dhidden


@stacked_silu_mul_bwd.register_fake
def _(hidden, dy):
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op(f"{_NAMESPACE}::weighted_silu_mul_bwd", mutates_args=())
@launches_beside_first_argument
def weighted_silu_mul_bwd(
    hidden: torch.Tensor, dy: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dhidden [M, 2 I], weighted [M, I], dweights [M] fp32), all fresh and contiguous.

    Args:
        hidden: [M, 2 I], gate before up.
        dy: [M, I], gradient of silu(gate) * up times a row's weight, before that weight is multiplied.
        weights: [M] fp32.
    """
    (M, I), hidden, dy = dy.shape, dense_rows(hidden), dense_rows(dy)
    dhidden, weighted = (torch.empty(x.shape, dtype=hidden.dtype, device=hidden.device) for x in (hidden, dy))
    dweights = torch.empty(M, dtype=torch.float32, device=hidden.device)
    halves, dhalves = hidden.split(I, dim=1), dhidden.split(I, dim=1)
    _launch(*halves, dy, weights.contiguous(), *dhalves, weighted, dweights)
    return dhidden, weighted, dweights


@weighted_silu_mul_bwd.register_fake
def _(hidden, dy, weights):
    return hidden.new_empty(hidden.shape), hidden.new_empty(dy.shape), weights.new_empty(dy.shape[0])


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return silu_mul_bwd(*ctx.saved_tensors, dy)


def differentiate_silu_mul(silu_mul_fwd: Any) -> None:
    """Give the forward's operator its backward."""
    silu_mul_fwd.register_autograd(_backward, setup_context=_setup_context)


__all__ = ["differentiate_silu_mul", "silu_mul_bwd", "stacked_silu_mul_bwd", "weighted_silu_mul_bwd"]
