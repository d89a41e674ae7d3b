"""`dequantize=True` at loading: packed modules become dense ones once their tensors are there, layer by layer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers.moe import KimiExperts
from .packed_modules import KimiPackedExperts, KimiPackedLinear


# transformers' FP8 quantizer sets `dequantize` by itself where no GPU can do FP8, so the field says nothing.
class _Asked(threading.local):
    value = False


_asked = _Asked()


@contextmanager
def asking(options: dict[str, Any]) -> Iterator[None]:
    """For the time of a `from_pretrained`: whether the caller asks for dense weights.

    Args:
        options: its keyword arguments; `quantization_config` may have `dequantize=True` or `run_compressed=False`.
    """
    given = options.get("quantization_config")
    read = given.get if isinstance(given, dict) else lambda name, default: getattr(given, name, default)
    before, _asked.value = _asked.value, bool(read("dequantize", False)) or read("run_compressed", None) is False
    try:
        yield
    finally:
        _asked.value = before


def settle_dequantisation(model: Any, quantizer: Any) -> None:
    """Unpack the model if the caller asked for it; say to the quantizer what was done.

    Where it takes the model for dequantised it removes `quantization_config`, so that saving writes a dense checkpoint.

    Raises:
        NotImplementedError: if some weights are offloaded to disk.
    """
    fields = quantizer.quantization_config
    fields.dequantize = _asked.value or getattr(fields, "run_compressed", True) is False
    if fields.dequantize:
        unpack_modules(model)


@torch.no_grad()
def unpack_modules(model: Any) -> None:
    """Replace every packed module by the dense one, in the model's dtype."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, KimiPackedLinear | KimiPackedExperts):
            continue
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise NotImplementedError(
                f"dequantize=True with weights on disk ({name}): the quantisation cannot be undone there; leave out one"
            )
        if isinstance(module, KimiPackedLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = _loaded(module.handle().dequantize(model.dtype))
        else:
            dense = _dense_experts(module, model)
        model.set_submodule(name, dense)


def _dense_experts(packed: KimiPackedExperts, model: Any) -> KimiExperts:
    with torch.device("meta"):
        dense = KimiExperts(model.config)
    for projection in ("gate_up_proj", "down_proj"):
        rows, columns = packed.shape_of(projection)
        leaves = len(packed.leaves(projection))
        stack = torch.empty(
            packed.num_experts, leaves * rows, columns, dtype=model.dtype, device=packed.down_proj_packed.device
        )
        for expert in range(packed.num_experts):
            for index in range(leaves):
                stack[expert, index * rows : (index + 1) * rows] = packed.handle(projection, expert, index).dequantize(
                    model.dtype
                )
        setattr(dense, projection, _loaded(stack))
    return dense


def _loaded(weight: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter._is_hf_initialized = True  # or transformers would initialise it once more
    return parameter


__all__ = ["asking", "settle_dequantisation", "unpack_modules"]
