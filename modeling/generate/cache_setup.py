"""What `generate()` tells a cache before its first call: how long it will get, and what its limits are."""

from typing import Any

from transformers.cache_utils import Cache

from ..cache.kimi_linear_cache import KimiLinearCache

# Positions behind a prompt that a cache makes room for at once, at the most: these or a 32nd of the prompt.
_ROOM_AHEAD = 1024


def expect_text(cache: Any, prompt_length: int, max_length: int | None) -> None:
    """Tell a `KimiLinearCache` how long it will get, so that its rows are allocated once.

    `max_length` is often far beyond what is generated; so not more than a little of it is believed.
    """
    if isinstance(cache, KimiLinearCache):
        ahead = max(_ROOM_AHEAD, prompt_length // 32)
        cache.expect(min(prompt_length + ahead, max_length or prompt_length))


def bound_unbounded_layers(cache: Cache | None) -> None:
    """Give every layer of a static cache a `max_cache_len`, also the recurrent ones, whose size never changes.

    transformers 5.10 asks all layers for it before it reuses the static cache of an earlier `generate()`.

    Args:
        cache: changed in place; None and caches without limits are left alone.
    """
    layers: list[Any] = [] if cache is None else cache.layers
    limits = [layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len")]
    for layer in layers:
        if limits and not hasattr(layer, "max_cache_len"):
            layer.max_cache_len = max(limits)


__all__ = ["bound_unbounded_layers", "expect_text"]
