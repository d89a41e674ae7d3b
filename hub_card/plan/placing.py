"""What fits where: whole layers on one device after the other, with their part of the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...modeling.prompt.segments import SEGMENT_TOKENS
from ..measure.counts import layer_cache_bytes
from ..measure.expect import prompt_scratch, step_scratch
from .cards import Card
from .weights import Weights

# The code makes room for a little more than a prompt's rows (modeling/cache/latent_layer.py).
_GROWTH = 1 / 32


@dataclass(frozen=True)
class Placed:
    """Layers of each device, and the bytes in use there; `fits` says whether all found a place."""

    fits: bool
    layers: tuple[int, ...]
    used: tuple[int, ...]


def scratch(config: Any, batch: int, context: int, kind: str) -> int:
    """Bytes that a prompt, in segments, and the steps after it need on each device."""
    tokens = min(max(batch * context, 1), SEGMENT_TOKENS)
    return max(prompt_scratch(config, tokens, kind), step_scratch(config, batch))


def cache_room(config: Any, batch: int, context: int) -> list[int]:
    """Bytes of each layer's cache, with the rows to spare that it allocates."""
    room = int(context * (1 + _GROWTH))
    return [batch * layer_cache_bytes(config, kind, room) for kind in config.layer_types]


def place(config: Any, weights: Weights, cards: Sequence[Card], batch: int, context: int) -> Placed:
    """Fill the devices in order, each with whole layers."""
    caches = cache_room(config, batch, context)
    blocks = [e + w + c for e, w, c in zip(weights.experts, weights.layers, caches)]
    spare = scratch(config, batch, context, "cpu" if cards[0].is_cpu else "cuda")
    used, layers, device = [spare] * len(cards), [0] * len(cards), 0
    for index, size in enumerate([weights.embedding, *blocks, weights.head]):
        while device < len(cards) and used[device] + size > cards[device].usable:
            device += 1
        if device == len(cards):
            return Placed(False, tuple(layers), tuple(used))
        used[device] += size
        layers[device] += 0 < index <= len(blocks)
    return Placed(True, tuple(layers), tuple(used))


def largest_batch(config: Any, weights: Weights, cards: Sequence[Card], context: int, most: int = 512) -> int:
    """Most rows of `context` tokens that fit, up to `most`; 0 if none does."""
    return _largest(lambda batch: place(config, weights, cards, batch, context).fits, most)


def longest_context(config: Any, weights: Weights, cards: Sequence[Card]) -> int:
    """Most tokens of one row that fit, in steps of 1,024 up to the model's length; 0 if none do."""
    steps = max(config.model_max_length // 1024, 1)
    return 1024 * _largest(lambda count: place(config, weights, cards, 1, count * 1024).fits, steps)


def needed_devices(config: Any, weights: Weights, card: Card, most: int = 64) -> int | None:
    """How many such devices hold the weights and a short text; None if `most` don't."""
    return next((n for n in range(1, most + 1) if place(config, weights, [card] * n, 1, 1024).fits), None)


def _largest(fits: Any, most: int) -> int:
    """The largest number up to `most` that fits, given that smaller ones do; 0 if 1 doesn't."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


__all__ = ["Placed", "cache_room", "largest_batch", "longest_context", "needed_devices", "place", "scratch"]
