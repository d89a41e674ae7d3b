"""Which device each decoder layer is on: one for all, or several, over which accelerate has spread the model.

accelerate hangs a hook on every module, some twenty on each layer, that moves what the module is given. The decoder
moves what it gives to its layers by itself, so `from_pretrained` takes the hooks inside layers off again, for
each costs the host time at every call. Those of the layers themselves, the embedding, the final norm and the head stay.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .plain_modules import is_placed_only, take_hook_off


class LayerSpan(NamedTuple):
    """Consecutive modules of a language model on one device: what one part of a decode step runs.

    Attributes:
        device: of all their parameters.
        first, end: of the decoder layers, [first, end); none where the device holds only the embedding or the head.
        embeds: whether the embedding is among them.
        has_head: whether the final norm and the head are.
    """

    device: torch.device
    first: int
    end: int
    embeds: bool
    has_head: bool


def layer_spans(model: Any) -> list[LayerSpan]:
    """The spans of a `KimiLinearForCausalLM`, in the order of its layers; neighbours are on different devices."""
    decoder = model.model
    count = len(decoder.layers)
    devices = [decoder.embed_tokens.weight.device, *map(device_of_layer, decoder.layers), model.lm_head.weight.device]
    begins = [i for i in range(count + 2) if i == 0 or devices[i] != devices[i - 1]]
    spans = []
    for begin, end in zip(begins, [*begins[1:], count + 2]):
        # Of the numbers here the embedding is 0, layer i is i + 1, and the head is the last.
        first, last = max(begin - 1, 0), min(end - 1, count)
        spans.append(LayerSpan(devices[begin], first, last, embeds=begin == 0, has_head=end == count + 2))
    return spans


def device_of_name(name: str, spans: list[LayerSpan]) -> torch.device:
    """The device that a step reads parameter or buffer `name` of a `KimiLinearForCausalLM` on."""
    if name.startswith("model.layers."):
        layer = int(name.split(".")[2])
        return next(span.device for span in spans if span.first <= layer < span.end)
    return (spans[0] if name.startswith("model.embed_tokens.") else spans[-1]).device


def is_spread(decoder: Any) -> bool:
    """Whether the layers of a `KimiLinearModel` are on several devices."""
    return len(set(map(device_of_layer, decoder.layers))) > 1


def check_device_map(model: nn.Module, device_map: dict[str, Any]) -> None:
    """Raise ValueError unless a device map gives every tensor of `model` a place, and each decoder layer one.

    Args:
        model: any of our classes, without weights yet.
        device_map: names of modules or tensors ("" for all) to places, as transformers takes it.
    """
    layers = decoder_of(model).layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    places: dict[str, dict[str, str]] = {}
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        key = name
        while key and key not in device_map:
            key = key.rpartition(".")[0]
        if key not in device_map:
            raise ValueError(f'device_map gives no place to {name}; name its module there, or give "" a place')
        if name.startswith(f"{prefix}."):
            layer = f"{prefix}.{name[len(prefix) + 1 :].split('.')[0]}"
            places.setdefault(layer, {}).setdefault(_place(device_map[key]), name)
    for layer, named in places.items():
        if len(named) > 1:
            where = ", ".join(f"{name} on {place}" for place, name in named.items())
            raise ValueError(f"device_map splits {layer} ({where}); give each decoder layer one place")


def _place(place: Any) -> str:
    """A place of a device map, in one spelling."""
    if isinstance(place, int):
        return f"cuda:{place}"
    return "cuda:0" if str(place) == "cuda" else str(place)


def take_hooks_off_layers(model: nn.Module) -> None:
    """Take off accelerate's hooks inside decoder layers that are whole on one device, if they only place tensors."""
    for layer in decoder_of(model).layers:
        hooked = [module for module in layer.modules() if module is not layer and "_hf_hook" in module.__dict__]
        devices = {x.device for x in (*layer.parameters(), *layer.buffers())}
        whole = len(devices) == 1 and "_hf_hook" in layer.__dict__ and is_placed_only(layer)
        if not whole or not all(map(is_placed_only, hooked)):
            continue
        for module in hooked:
            take_hook_off(module)


def decoder_of(model: nn.Module) -> Any:
    """The `KimiLinearModel` in one of our classes."""
    return getattr(model, model.base_model_prefix, model)


def device_of_layer(layer: Any) -> torch.device:
    """The device of a decoder layer's first norm, which every layer has as it is on disk."""
    return layer.input_layernorm.weight.device


__all__ = [
    "LayerSpan",
    "check_device_map",
    "decoder_of",
    "device_of_layer",
    "device_of_name",
    "is_spread",
    "layer_spans",
    "take_hooks_off_layers",
]
