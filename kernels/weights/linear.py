"""The product of activations and a packed weight, which is dequantised for it, with a gradient to the activations."""

from typing import Any

import torch
import torch.nn.functional as F

from ..decode.dequantize import decode_dequantize
from ..gpu.availability import fused_path_serves
from ..gpu.classes import gpu_of
from ..gpu.launching import launching_on
from .handle import WeightHandle
from .tiles import tile_format


def packed_linear(x: torch.Tensor, weight: WeightHandle) -> torch.Tensor:
    """x @ weight^T in the dtype of `x` (of autocast, where that is on). Gradients reach x, not the weight.

    Args:
        x: [..., columns].
        weight: [rows, columns].

    Returns:
        [..., rows].
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedLinear.apply(x, weight)
    return F.linear(x, dense_weight(weight, dtype))


def dense_weight(weight: WeightHandle, dtype: torch.dtype) -> torch.Tensor:
    """`weight.dequantize(dtype)`, by one kernel where there is one for the format and the device."""
    fits = weight.data.is_contiguous() and weight.scale.is_contiguous() and tile_format(weight.format) is not None
    if not fits or dtype == torch.float64 or not fused_path_serves(weight.scale):
        return weight.dequantize(dtype)
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    with launching_on(dense.device):
        decode_dequantize(weight, dense, gpu=gpu_of(dense.device))
    return dense


class _PackedLinear(torch.autograd.Function):
    """Keeps the packed weight for the backward, which dequantises it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: WeightHandle) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, dense_weight(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.matmul(grad, dense_weight(ctx.weight, grad.dtype)), None


__all__ = ["dense_weight", "packed_linear"]
