"""The PyTorch path of KDA as one operator, for compiled and exported graphs.

The loops of `torch_forward` go over chunks and tokens. A tracer would unroll them and so pin the number of tokens. As
an operator with a fake implementation they leave it open: one graph serves every length.
"""

import torch

from ..gpu.compile_threads import run_in_threads
from ..gpu.operator_names import operator_namespace
from .torch_forward import chunk_kda_torch, recurrent_kda_torch

_NAMESPACE = operator_namespace("kda", __name__)
# About where the chunked form begins to beat stepping token by token on a CPU.
CHUNKED_FROM = 16


@torch.library.custom_op(f"{_NAMESPACE}::kda_torch_fwd", mutates_args=())
def kda_torch_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KDA as `chunk_kda_torch` has it, differentiable: (o [B, T, H, V], final state [N, H, K, V])."""
    run = chunk_kda_torch if q.shape[1] >= CHUNKED_FROM else recurrent_kda_torch
    options = {"A_log": A_log, "dt_bias": dt_bias, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return run(q, k, v, g, beta, output_final_state=True, **options)


@kda_torch_fwd.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens):
    B, T, H, K = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(B, T, H, v.shape[-1]), q.new_empty(N, H, K, v.shape[-1], dtype=dtype)


@torch.library.custom_op(f"{_NAMESPACE}::kda_torch_bwd", mutates_args=())
def _kda_torch_bwd(
    do: torch.Tensor,
    dstate: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, g, beta, A_log, dt_bias and, where given, initial_state; the forward is run again."""
    learned = [q, k, v, g, beta, A_log, dt_bias, *(() if initial_state is None else (initial_state,))]
    gradients: list[torch.Tensor] = []
    stream = torch.cuda.current_stream(q.device) if q.is_cuda else None

    def run_again() -> None:
        with torch.cuda.stream(stream), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in learned]
            options = {"A_log": inputs[5], "dt_bias": inputs[6], "cu_seqlens": cu_seqlens, "output_final_state": True}
            run = chunk_kda_torch if q.shape[1] >= CHUNKED_FROM else recurrent_kda_torch
            outputs = run(*inputs[:5], initial_state=inputs[7] if len(inputs) > 7 else None, **options)
            found = torch.autograd.grad(outputs, inputs, (do, dstate), allow_unused=True, materialize_grads=True)
        gradients.extend(x.contiguous().clone() for x in found)

    # The body of an operator cannot record gradients; another thread can.
    run_in_threads(q.device, run_again)
    return gradients


@_kda_torch_bwd.register_fake
def _(do, dstate, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens):
    inputs = (q, k, v, g, beta, A_log, dt_bias, *(() if initial_state is None else (initial_state,)))
    return [x.new_empty(x.shape) for x in inputs]


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, do, dstate):
    inputs = ctx.saved_tensors
    gradients = list(_kda_torch_bwd(do, dstate, *inputs))
    return *gradients[:7], gradients[7] if inputs[7] is not None else None, None


kda_torch_fwd.register_autograd(_backward, setup_context=_save)

__all__ = ["CHUNKED_FROM", "kda_torch_fwd"]
