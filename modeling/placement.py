"""Which device each decoder layer is on: one for all, or several, over which accelerate has spread the model."""

from typing import Any, NamedTuple

import torch


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


def device_of_layer(layer: Any) -> torch.device:
    """The device of a decoder layer's first norm, which every layer has as it is on disk."""
    return layer.input_layernorm.weight.device


__all__ = ["LayerSpan", "device_of_layer", "layer_spans"]
