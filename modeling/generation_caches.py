"""Caches that `generate()` can be asked for and a hybrid model cannot use: refused in words, before any work."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_kimi_linear import KimiLinearCache

# Positions behind a prompt that a cache makes room for at once, at the most: these or a 32nd of the prompt.
_ROOM_AHEAD = 1024


def check_cache_implementation(name: str | None, layer_types: list[str]) -> None:
    """Raise ValueError if `cache_implementation=name` cannot work for these layers on this machine.

    Args:
        name: what `generate()` was asked for, or None.
        layer_types: of the config.
    """
    if name == "quantized" and "linear_attention" in layer_types:
        raise ValueError(
            "cache_implementation='quantized' has no place for the recurrent state of KDA layers, which must stay in "
            "fp32; leave it out: KimiLinearCache is small already, for it holds latents, not keys and values"
        )
    if name is not None and "offloaded" in name and not torch.accelerator.is_available():
        raise ValueError(
            f"cache_implementation={name!r} moves layers between an accelerator and the CPU, and there is no "
            "accelerator here; leave it out"
        )


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


def continuous_batching_error() -> ValueError:
    """What `generate_batch` and its relatives raise."""
    return ValueError(
        "continuous batching (generate_batch, init_continuous_batching, cache_implementation='paged') keeps keys and "
        "values in pages, which can hold neither the recurrent state of KDA layers nor MLA latents; call generate() "
        "with a left-padded batch and its attention_mask instead"
    )


__all__ = ["bound_unbounded_layers", "check_cache_implementation", "continuous_batching_error", "expect_text"]
