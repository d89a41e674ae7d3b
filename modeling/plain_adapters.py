"""LoRA modules of PEFT as captured steps see them: what they add, what they are switched to, and when that is plain.

PEFT puts a module of its own around each module that an adapter is for (`base_layer` leads inwards). A plain one adds

    linears               y += scale B (A x)                   lora_A [r, in], lora_B [out, r]
    embeddings            y += scale B A[:, token]             lora_embedding_A [r, vocabulary], lora_embedding_B
    stacked experts       W_e += scale B_e A_e                 one ParamWrapper around another, a parameter each:
                                                               lora_A [E r, in] is [E, r, in], lora_B [out, r E] is
                                                               [out, r, E], experts side by side

for the one adapter that is active, and nothing where it is disabled, merged, or has no part for this module. What a
step reads of it is where the optimiser writes it; `switches` says what it was switched to. Everything else that PEFT
can do (variants such as DoRA, biases, dropout in training mode, several adapters at a time, parameters other than
experts') is for the layers, and `adapter_misfit` says so.
"""

import itertools
from collections.abc import Iterator
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from .plain_modules import hanging, hung, library_class

_PEFT = "peft.tuners.lora.layer"
_KINDS = ("Linear", "Embedding", "ParamWrapper")
_EXPERTS = ("gate_up_proj", "down_proj")


class Adapter(NamedTuple):
    """`down` A and `up` B, views of PEFT's parameters: [r, in] and [out, r], of experts [E, r, in] and [E, out, r]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def wraps(module: nn.Module) -> bool:
    """Whether `module` is one that PEFT puts around a linear, an embedding or stacked experts for LoRA."""
    kind = type(module)
    return kind.__module__ == _PEFT and kind.__name__ in _KINDS and kind is library_class(_PEFT, kind.__name__)


def base_of(module: nn.Module) -> nn.Module:
    """The module of ours inside all wrappers of PEFT's, or `module` itself."""
    while wraps(module):
        module = module.base_layer
    return module


def wrappers_of(module: nn.Module) -> Iterator[nn.Module]:
    """PEFT's wrappers around a module of ours, from the outermost in; none for `module` itself."""
    while wraps(module):
        yield module
        module = module.base_layer


def adapter_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below a wrapper that are PEFT's own."""
    for name, child in module.named_children():
        if name != "base_layer":
            yield from child.modules()


def adapter_of(module: nn.Module) -> Adapter | None:
    """What a plain wrapper of a linear or an embedding adds as it is switched; None for nothing, or no wrapper."""
    name = _active(module)[0] if wraps(module) and _active(module) else None
    return None if name is None else Adapter(*_factors(module, name), module.scaling[name])


def expert_adapters(module: nn.Module) -> dict[str, Adapter]:
    """What the wrappers around stacked experts add, by the parameter's name."""
    found = {}
    while wraps(module):
        adapter = adapter_of(module)
        if adapter is not None:
            experts = module.num_experts
            down = adapter.down.view(experts, -1, adapter.down.shape[1])
            up = adapter.up.view(adapter.up.shape[0], -1, experts).permute(2, 0, 1)
            found[module.parameter_name] = Adapter(down, up, adapter.scale)
        module = module.base_layer
    return found


def _active(module: Any) -> list[str]:
    """Names of the adapters that a wrapper's forward adds."""
    if module.disable_adapters or module.merged:
        return []
    held = module.lora_embedding_A if type(module).__name__ == "Embedding" else module.lora_A
    return [name for name in module.active_adapters if name in held]


def _factors(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if type(module).__name__ == "Embedding":
        return module.lora_embedding_A[name], module.lora_embedding_B[name]
    return module.lora_A[name].weight, module.lora_B[name].weight


def adapter_misfit(module: Any) -> str | None:
    """Why a step can't do what the wrapper `module` does as it is switched, in words that follow its name; or None."""
    what = hung(module)
    if what is not None:
        return what
    kind = type(module)
    if kind.forward.__module__ != _PEFT or kind.forward.__qualname__ != f"{kind.__name__}.forward":
        return f"is a {kind.__name__} of PEFT's whose forward was replaced on the class"
    if module.disable_adapters and module.merged:
        return "has a merged adapter that was disabled, which the next forward takes out of the weight"
    names = _active(module)
    if len(names) > 1:
        return f"has {len(names)} active adapters ({', '.join(names)}), and a step takes one"
    if kind.__name__ == "ParamWrapper" and module.parameter_name not in _EXPERTS:
        return f"has an adapter on the parameter {module.parameter_name}"
    if names and kind.__name__ == "ParamWrapper" and module.parameter_name not in base_of(module)._parameters:
        return f"has an adapter on {module.parameter_name}, which is packed"
    return _unusual(module, names[0]) if names else None


def _unusual(module: Any, name: str) -> str | None:
    """What is not plain about the adapter `name` of a wrapper, in words that follow the wrapper's name; or None."""
    variants = getattr(module, "lora_variant", None)
    if variants is None or variants.get(name) is not None or module.use_dora.get(name):
        return f"has the adapter {name!r} as a variant of LoRA (DoRA, say)"
    if getattr(module, "input_fns", None) or getattr(module, "output_fns", None):
        return f"has the adapter {name!r} spread by tensor parallelism"
    dropout = None
    if type(module).__name__ != "Embedding":  # whose forward has none
        dropout = module.lora_dropout[name]
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return f"has a {type(dropout).__name__} before the adapter {name!r}"
    if type(dropout) is nn.Dropout and dropout.training and dropout.p > 0:
        return f"drops out {dropout.p:g} of the input of the adapter {name!r} in training mode"
    if type(module).__name__ != "Embedding":
        linears = module.lora_A[name], module.lora_B[name]
        for linear in linears:
            what = hanging(linear)
            if what is not None or linear.bias is not None:
                return f"has the adapter {name!r}, part of which {what or 'has a bias'}"
    if type(module).__name__ == "ParamWrapper" and not module._did_swap_in_out_features:
        return f"has the adapter {name!r} in another layout than experts of [E, out, in] have"
    device = next(itertools.chain(base_of(module).parameters(), base_of(module).buffers())).device
    for x in _factors(module, name):
        plain = type(x) is nn.Parameter and x.is_contiguous() and x.device == device
        if not plain or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"has the adapter {name!r} as {type(x).__name__} of {x.dtype} on {x.device}"
    return None


_flags = itemgetter("_disable_adapters", "_active_adapter")
_dropout_state = attrgetter("training", "p")


class AdapterSwitches:
    """What the wrappers among `modules` were switched to at construction; the wrappers belong to the holder."""

    def __init__(self, modules: list[nn.Module]) -> None:
        wrappers = [module for module in modules if wraps(module)]
        self._held = [module.__dict__ for module in wrappers]
        self._merged: list[list[str]] = [module.merged_adapters for module in wrappers]
        self._scaling: list[dict[str, float]] = [module.scaling for module in wrappers]
        self._dropouts = [x for module in wrappers for x in module.lora_dropout.values() if type(x) is nn.Dropout]
        self._copies = self._now()
        self._scaling_copies = [dict(scaling) for scaling in self._scaling]

    def _now(self) -> tuple[list[Any], list[int], list[Any]]:
        return (
            [(off, active if type(active) is str else tuple(active)) for off, active in map(_flags, self._held)],
            list(map(len, self._merged)),
            list(map(_dropout_state, self._dropouts)),
        )

    def are_same(self) -> bool:
        """Whether every wrapper is switched as it was."""
        return not self._held or (self._now() == self._copies and self._scaling == self._scaling_copies)

    def key(self) -> tuple[Any, ...]:
        """The same for the same switches, and hashable."""
        scaling = tuple(tuple(scaling.items()) for scaling in self._scaling_copies)
        return (*map(tuple, self._copies), scaling)


__all__ = [
    "Adapter",
    "AdapterSwitches",
    "adapter_misfit",
    "adapter_of",
    "adapter_parts",
    "base_of",
    "expert_adapters",
    "wrappers_of",
    "wraps",
]
