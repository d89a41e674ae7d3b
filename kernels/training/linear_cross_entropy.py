"""
Cross entropy of a linear head without the matrix of all logits, and its gradients.

    z_n = weight h_n      loss = sum over n of logsumexp(z_n) - z_n[label_n]      dz_n = softmax(z_n) - onehot(label_n)

Tokens go in chunks whose logits fit `_CHUNK_BYTES`. The forward computes a chunk's logits once and turns them into dz
in place, and from dz at once the chunk's part of both gradients: dh = dz weight, dweight = sum of dz h^T in fp32. The
backward only scales them by the gradient of the loss, so a step multiplies three times, as with all logits at once, and
rounds logits and dz to the head's dtype, as that does. Held until the backward are dh and dweight in fp32 (float64 for
float64 inputs). Tokens labelled `ignore_index` give no loss and no gradient.
"""

from typing import Any

import torch

from ..gpu.availability import device_serves, gradients_wanted
from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)
# Of a chunk's logits: 2,048 tokens of the released vocabulary in bf16. Each chunk reads and writes dweight once.
_CHUNK_BYTES = 640 << 20


@triton.jit
def cross_entropy_kernel(logits, labels, losses, ignore_index, V: tl.constexpr, BV: tl.constexpr):
    """One token a program. logits [N, V] contiguous, replaced by their gradient; labels [N]; losses [N] fp32."""
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    logits += i_n * V
    label = tl.load(labels + i_n)
    is_counted = label != ignore_index
    b_max = tl.full([BV], float("-inf"), tl.float32)
    b_sum = tl.zeros([BV], tl.float32)
    for i_v in range(0, V, BV):
        b_z = tl.load(logits + i_v + o_v, mask=i_v + o_v < V, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(b_max, b_z)
        # Where nothing but -inf has come yet there is nothing to scale.
        b_old = tl.where(b_max == b_new, 1.0, tl.exp(b_max - b_new))
        b_sum = b_sum * b_old + tl.where(b_z == float("-inf"), 0.0, tl.exp(b_z - b_new))
        b_max = b_new
    top = tl.max(b_max, axis=0)
    total = tl.sum(tl.where(b_max == float("-inf"), 0.0, b_sum * tl.exp(b_max - top)), axis=0)
    lse = top + tl.log(total)
    chosen = tl.load(logits + label, mask=is_counted, other=0.0).to(tl.float32)
    tl.store(losses + i_n, tl.where(is_counted, lse - chosen, 0.0))
    tl.debug_barrier()  # the label's logit is read before it is replaced
    for i_v in range(0, V, BV):
        m_v = i_v + o_v < V
        b_z = tl.load(logits + i_v + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        b_dz = tl.exp(b_z - lse) - tl.where(i_v + o_v == label, 1.0, 0.0)
        b_dz = tl.where(is_counted, b_dz, 0.0)
        tl.store(logits + i_v + o_v, b_dz.to(logits.dtype.element_ty), mask=m_v)


@torch.library.custom_op(f"{_NAMESPACE}::cross_entropy_in_place", mutates_args=("logits",))
@launches_beside_first_argument
def cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Losses [N] fp32 of contiguous logits [N, V], which are replaced by their gradients; labels [N] integers."""
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    if N > 0:
        cross_entropy_kernel[(N,)](logits, labels.contiguous(), losses, ignore_index, V=V, BV=4096, num_warps=8)
    return losses


@cross_entropy_in_place.register_fake
def _(logits, labels, ignore_index):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _cross_entropy_torch(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> tuple[Any, Any]:
    """(losses [N], gradients of the logits in their dtype)."""
    counted = labels != ignore_index
    chosen = torch.where(counted, labels, 0)[:, None].long()
    z = logits.to(_exact(logits.dtype))
    lse = z.logsumexp(dim=1, keepdim=True)
    losses = torch.where(counted, (lse - z.gather(1, chosen))[:, 0], 0.0)
    dz = (z - lse).exp_()
    dz.scatter_add_(1, chosen, -torch.ones_like(dz[:, :1]))
    return losses, torch.where(counted[:, None], dz, 0.0).to(logits.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y, accumulated and kept in fp32 (float64)."""
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x, y).to(_exact(x.dtype))


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """total + x y, in place where the library can."""
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.addmm(total, x, y, out_dtype=torch.float32, out=total)
    return total.add_(_product(x, y))


@torch.library.custom_op(f"{_NAMESPACE}::linear_cross_entropy_fwd", mutates_args=())
def _linear_cross_entropy_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    chunk: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses, and its gradients by hidden and weight; an empty tensor for one that is not wanted."""
    exact = _exact(hidden.dtype)
    loss = torch.zeros((), dtype=exact, device=hidden.device)
    parts, dweight = [], None
    fused = device_serves(hidden.device) and hidden.dtype != torch.float64
    for h, label in zip(hidden.split(chunk), labels.split(chunk)):
        logits = torch.mm(h, weight.t())
        if fused:
            losses, dz = cross_entropy_in_place(logits, label, ignore_index), logits
        else:
            losses, dz = _cross_entropy_torch(logits, label, ignore_index)
        del logits
        loss += losses.sum()
        if of_hidden:
            parts.append(_product(dz, weight))
        if of_weight:
            dweight = _product(dz.t(), h) if dweight is None else _add_product(dweight, dz.t(), h)
    return loss, torch.cat(parts) if parts else loss.new_empty(0), loss.new_empty(0) if dweight is None else dweight


@_linear_cross_entropy_fwd.register_fake
def _(hidden, weight, labels, ignore_index, chunk, of_hidden, of_weight):
    exact = _exact(hidden.dtype)
    dhidden = hidden.new_empty(hidden.shape if of_hidden else 0, dtype=exact)
    return hidden.new_empty((), dtype=exact), dhidden, weight.new_empty(weight.shape if of_weight else 0, dtype=exact)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.wanted = inputs[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    labels, ignore_index = inputs[2], inputs[3]
    ctx.save_for_backward(*output[1:], (labels != ignore_index).any())


def _scaled(gradient: torch.Tensor, dloss: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient times dloss, rounded once to dtype; a fresh tensor."""
    return torch.mul(gradient, dloss, out=torch.empty(gradient.shape, dtype=dtype, device=gradient.device))


def _backward(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    found: list[torch.Tensor | None] = [None, None]
    if dloss is not None:
        *gradients, counts = ctx.saved_tensors
        # A mean over no token hands over 1 / 0; the gradients are zero all the same, as PyTorch's are.
        dloss = torch.where(counts, dloss, 0.0)
        for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes)):
            if ctx.wanted[i]:
                found[i] = _scaled(gradient, dloss, dtype)
    return *found, None, None, None, None, None


_linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """The sum over tokens of the cross entropy of logits `hidden @ weight.T`, differentiable once in both.

    Args:
        hidden: [N, D].
        weight: [V, D], of the same dtype and device.
        labels: [N] integers in [0, V), or `ignore_index`.
        ignore_index: labels tokens that don't count.

    Returns:
        A scalar in fp32 (float64 for float64 inputs).
    """
    chunk = max(1, _CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))
    if chunk > 64:
        chunk -= chunk % 64
    wanted = gradients_wanted(hidden), gradients_wanted(weight)
    return _linear_cross_entropy_fwd(hidden, weight, labels, ignore_index, chunk, *wanted)[0]


__all__ = ["linear_cross_entropy_sum"]
