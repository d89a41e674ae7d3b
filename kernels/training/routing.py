"""
Gradients of the router: of its logits, and of the weights of the chosen experts (forward: kernels/prompt).

With s = sigmoid(logit) of a chosen expert, v = s (+ its bias, where weights are biased), S = sum of v + 1e-20:

    renormalised   dv_i = scaling (dw_i - sum_j dw_j v_j / S) / S        else   dv_i = scaling dw_i
    dlogit = dv s (1 - s) at the chosen experts, 0 at the others

The choice itself has no gradient. Logits are products of half-precision numbers kept in fp32; their gradient is rounded
to that precision before its own products, as the gradient of any layer's output is.
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


@triton.jit(do_not_specialize=["M"])
def route_bwd_kernel(
    dw, logits, bias, experts, dlogits, scaling, M,
    E: tl.constexpr, KS: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
    RENORMALIZE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """BM tokens a program. dw fp32 and experts int64 [M, KS], logits and dlogits [M, E] fp32, all contiguous."""
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    m_n, m_e = o_n < M, o_e < E
    p_l = o_n[:, None] * E + o_e[None, :]
    b_l = tl.load(logits + p_l, mask=m_n[:, None] & m_e[None, :], other=0.0)
    b_s = tl.sigmoid(b_l)
    b_v = b_s
    if BIASED:
        b_v += tl.load(bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_dv = tl.zeros([BM, BE], tl.float32)
    b_sum, b_dot = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    m_chosen = tl.zeros([BM, BE], tl.int32) > 0
    for i in tl.static_range(0, KS):
        b_e = tl.load(experts + o_n * KS + i, mask=m_n, other=0)
        b_dw = tl.load(dw + o_n * KS + i, mask=m_n, other=0.0)
        m_i = o_e[None, :] == b_e[:, None]
        m_chosen = m_chosen | m_i
        b_dv = tl.where(m_i, b_dw[:, None], b_dv)
        b_x = tl.sum(tl.where(m_i, b_v, 0.0), axis=1)
        b_sum += b_x
        b_dot += b_dw * b_x
    if RENORMALIZE:
        b_sum += 1e-20
        b_dv = (b_dv - (b_dot / b_sum)[:, None]) / b_sum[:, None]
    b_dl = tl.where(m_chosen, scaling * b_dv * b_s * tl.sigmoid(-b_l), 0.0)  # 1 - s cancels near 1
    tl.store(dlogits + p_l, b_dl, mask=m_n[:, None] & m_e[None, :])


@torch.library.custom_op(f"{_NAMESPACE}::route_bwd", mutates_args=())
@launches_beside_first_argument
def route_bwd(
    dw: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor,
    experts: torch.Tensor,
    renormalize: bool,
    scaling: float,
    biased: bool,
) -> torch.Tensor:
    """dlogits [M, E] fp32 of dw and experts [M, k]; arguments as those of `route_fwd`."""
    (M, E), KS = logits.shape, experts.shape[1]
    dlogits = torch.empty(M, E, dtype=torch.float32, device=logits.device)
    if M > 0:
        BE = padded(E)
        BM = max(1, 2048 // BE)
        route_bwd_kernel[(triton.cdiv(M, BM),)](
            dw.contiguous(), logits.contiguous(), bias.contiguous(), experts.contiguous(), dlogits, scaling, M,
            E=E, KS=KS, BM=BM, BE=BE, RENORMALIZE=renormalize, BIASED=biased, num_warps=4,
        )  # fmt: skip
    return dlogits


@route_bwd.register_fake
def _(dw, logits, bias, experts, renormalize, scaling, biased):
    return logits.new_empty(logits.shape)


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, bias, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, bias, output[1])


def _backward_route(ctx: Any, dw: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return route_bwd(dw, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def differentiate_route(route_fwd: Any) -> None:
    """Give the forward's operator its backward."""
    route_fwd.register_autograd(_backward_route, setup_context=_setup_route)


@torch.library.custom_op(f"{_NAMESPACE}::router_logits", mutates_args=())
def router_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[M, E] fp32 of hidden [M, D] and weight [E, D], both bf16 or fp16; differentiable once."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden.float(), weight.float().t())


@router_logits.register_fake
def _(hidden, weight):
    return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)


def _setup_logits(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_logits(ctx: Any, dlogits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    hidden, weight = ctx.saved_tensors
    dlogits = dlogits.to(hidden.dtype)
    dhidden = torch.mm(dlogits, weight) if ctx.needs_input_grad[0] else None
    return dhidden, torch.mm(dlogits.t(), hidden) if ctx.needs_input_grad[1] else None


router_logits.register_autograd(_backward_logits, setup_context=_setup_logits)


__all__ = ["differentiate_route", "route_bwd", "router_logits"]
