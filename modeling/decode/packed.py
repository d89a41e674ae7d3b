"""Packed weights in a decode step: what the launches get of a module, and whether they can read it."""

from typing import Any

import torch
from torch import nn

from ...kernels.weights.tiles import Linear, PackedStack, Weight, tile_format
from ..checkpoint.packed_modules import KimiPackedExperts, KimiPackedLinear
from ..placement import device_of_name, layer_spans
from ..plain_adapters import base_of

# Bytes that numbers and scales have to be aligned to.
_ALIGNMENT = 16


def linear_weight(module: Any) -> Linear:
    """The weight of a linear layer (or of a router) as launches take it, adapters around it left aside."""
    module = base_of(module)
    return module.handle() if isinstance(module, KimiPackedLinear) else module.weight


def expert_weight(experts: Any, projection: str) -> torch.Tensor | PackedStack:
    """`gate_up_proj` or `down_proj` of all routed experts as launches take it, adapters around them left aside."""
    experts = base_of(experts)
    return experts.stack(projection) if isinstance(experts, KimiPackedExperts) else getattr(experts, projection)


def is_packed(weight: Weight) -> bool:
    """Whether a weight needs the launches for packed ones."""
    return not isinstance(weight, torch.Tensor)


def packed_reason(model: nn.Module) -> str | None:
    """Why no step reads the packed weights of `model`, in words that follow "layer by layer"; None if one does."""
    packed = {n: x for n, x in model.named_modules() if isinstance(x, KimiPackedLinear | KimiPackedExperts)}
    formats = {y for x in packed.values() for y in (x.formats.values() if hasattr(x, "formats") else (x.format,))}
    unread = sorted(format.name for format in formats if tile_format(format) is None)
    if unread:
        return f"packed weights: no kernels for {' and '.join(unread)} yet"
    spans = layer_spans(model)
    for name, module in packed.items():
        device = device_of_name(f"{name}.", spans)
        for part, x in (*module.named_parameters(), *module.named_buffers()):
            if x.device != device or not x.is_contiguous() or x.data_ptr() % _ALIGNMENT != 0:
                where = f"on {x.device} (its place: {device}), contiguous: {x.is_contiguous()}, at {x.data_ptr():#x}"
                return f"{name}.{part} is {where}"
    if packed and model.config.num_shared_experts > 1:
        return f"packed weights: no kernels for {model.config.num_shared_experts} shared experts"
    return next(filter(None, map(_mixed_shared, model.model.layers)), None)


def _mixed_shared(layer: Any) -> str | None:
    """What keeps a shared expert's gate and up projections out of one launch."""
    shared = getattr(getattr(layer, "block_sparse_moe", None), "shared_experts", None)
    if shared is None:
        return None
    gate, up = linear_weight(shared.gate_proj), linear_weight(shared.up_proj)
    alike = type(gate) is type(up) and (
        not is_packed(gate) or (gate.format, gate.scale.dtype) == (up.format, up.scale.dtype)
    )
    return None if alike else "packed weights: gate and up projections of a shared expert are of different formats"


__all__ = ["expert_weight", "is_packed", "linear_weight", "packed_reason"]
