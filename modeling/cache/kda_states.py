"""How a KDA layer reads and writes its state in a cache of ours or of transformers."""

import torch
from transformers.cache_utils import Cache

from .kda_layer import KDACacheLayer


def own_kda_layer(cache: Cache | None, layer_idx: int) -> KDACacheLayer | None:
    """The KDA layer of a `KimiLinearCache`, or None for no cache or one of transformers' own."""
    layer = None if cache is None else cache.layers[layer_idx]
    return layer if isinstance(layer, KDACacheLayer) else None


def read_kda_states(cache: Cache, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(window [B, 3 H K, W-1], state [B, H, K, V]) that `cache` holds for a KDA layer, or (None, None)."""
    layer = cache.layers[layer_idx]
    if isinstance(layer, KDACacheLayer):
        return layer.window, layer.state
    if not cache.has_previous_state(layer_idx):
        return None, None
    window, state = layer.conv_states, layer.recurrent_states
    if isinstance(window, dict):  # transformers >= 5.20 numbers the states of a layer
        window, state = window[0], state[0]
    return window, state


def write_kda_states(cache: Cache, layer_idx: int, window: torch.Tensor, state: torch.Tensor, new_tokens: int) -> None:
    """Store what a KDA layer holds after `new_tokens` more positions."""
    layer = cache.layers[layer_idx]
    if isinstance(layer, KDACacheLayer):
        layer.store(window, state, new_tokens)
        return
    # A full window replaces the one that is held; both updates write in place, which keeps addresses for CUDA graphs.
    cache.update_conv_state(window, layer_idx)
    layer.dtype = state.dtype  # transformers < 5.20 would allocate the state in the window's dtype
    cache.update_recurrent_state(state, layer_idx)


__all__ = ["own_kda_layer", "read_kda_states", "write_kda_states"]
