"""LoRA over packed experts, as PEFT's `target_parameters` asks for it: `experts.gate_up_proj`, `experts.down_proj`.

PEFT adds the product of its factors to the whole stack of weights for the time of a forward. Packed numbers can't take
a sum, and a dense stack is what packing is there to avoid. Here PEFT makes, names and saves its adapters as over dense
experts, and the block that owns the experts reads them: a chosen expert computes W x + scaling B (A x), with W
dequantised for this product alone. PEFT keeps A as [E r, in], experts apart, and B as [out, r E], experts interleaved.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Factors of one adapter: A [r, in] and B [out, r] of each expert, and the scaling.
Factors = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], float]


class ExpertAdapters:
    """The active adapters of the experts of one layer, for one forward."""

    def __init__(self) -> None:
        self._of: dict[str, list[Factors]] = {}

    def append(self, projection: str, lora_a: torch.Tensor, lora_b: torch.Tensor, experts: int, scaling: float) -> None:
        """Take up an adapter.

        Args:
            projection: "gate_up_proj" or "down_proj".
            lora_a, lora_b: PEFT's, [E r, in] and [out, r E].
            experts: their number, E.
            scaling: of the product.
        """
        # One unbind an adapter: its backward makes one gradient, where a slice an expert would make E of full size.
        rows = lora_a.view(experts, -1, lora_a.shape[1]).unbind(0)
        columns = lora_b.view(lora_b.shape[0], -1, experts).unbind(2)
        self._of.setdefault(projection, []).append((rows, columns, scaling))

    def added(self, y: torch.Tensor, projection: str, expert: int, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """y + the adapters' share, in y's dtype.

        Args:
            y: [n, rows], the expert's own product.
            projection: as in `append`.
            expert: its number.
            x: [n, in].
            start: the first of the `rows` in the adapters' output: up comes after gate.
        """
        for rows, columns, scaling in self._of.get(projection, ()):
            inner = F.linear(x.to(rows[expert].dtype), rows[expert])
            share = F.linear(inner, columns[expert][start : start + y.shape[1]]) * scaling
            y = y + share.to(y.dtype)
        return y


def adapters_over_packed(experts: nn.Module, packed_class: type) -> tuple[Any, ExpertAdapters] | None:
    """The packed experts within PEFT's wrappers, and the adapters that are active; None if it isn't that.

    Args:
        experts: what stands where the block's experts were.
        packed_class: of the packed experts.

    Raises:
        ValueError: for adapters on other parameters than the two stacks, and for hooks on the wrappers, which PEFT puts
            there for batches of several adapters (`adapter_names`).
    """
    if "base_layer" not in experts._modules:
        return None
    wrappers, base = [], experts
    while "base_layer" in base._modules:
        wrappers.append(base)
        base = base._modules["base_layer"]
    if not isinstance(base, packed_class):
        return None
    adapters = ExpertAdapters()
    for wrapper in wrappers:
        if wrapper._forward_hooks or wrapper._forward_pre_hooks:
            raise ValueError(
                "a hook is on an adapter of packed experts (PEFT puts one there for adapter_names=, batches of several "
                "adapters), which is not read: use one adapter for a batch, and put hooks on the base layer"
            )
        projection = getattr(wrapper, "parameter_name", None)
        if projection not in ("gate_up_proj", "down_proj"):
            raise ValueError(
                f"an adapter is on {projection!r} of packed experts, where it would do nothing: use "
                'target_parameters=["experts.gate_up_proj", "experts.down_proj"], as for dense experts'
            )
        if wrapper.disable_adapters:
            continue
        for name in wrapper.active_adapters:
            if name in wrapper.lora_A:
                factors = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
                adapters.append(projection, *factors, base.num_experts, wrapper.scaling[name])
    return base, adapters


__all__ = ["ExpertAdapters", "adapters_over_packed"]
