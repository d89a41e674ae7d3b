"""The hybrid cache of Kimi Linear: constant-size state for KDA layers, one latent row per token for MLA layers.

| layer | holds | bytes a sequence (released shape, bf16) |
|---|---|---|
| KDA | state [B, H, K, V] fp32; windows of the three short convolutions [B, 3 H K, W-1] | 2 MiB + 72 KiB |
| MLA | latent rows [B, L, kv_lora_rank + qk_rope_head_dim] | 1,152 a token |

`KimiLinearCache` speaks transformers' `Cache` protocol and is what `generate()` makes by default. KDA layers talk to it
and to transformers' own caches (`DynamicCache(config=...)`, `StaticCache`) through the functions at the end of this
file.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

# Latent rows are allocated in blocks of at least this many tokens, and at least an eighth of what is there, so that
# appending one token at a time copies each row a bounded number of times.
_BLOCK = 256


def _tokens_to_remove(argument: int, length: int) -> int:
    """Tokens that `crop(argument)` drops of `length`: negative counts them, positive is the length to keep."""
    return min(-argument, length) if argument <= 0 else max(length - argument, 0)


class KDACacheLayer(LinearAttentionCacheLayerMixin):
    """State of one KDA layer after the tokens seen so far; its size does not depend on how many there were.

    Attributes:
        state: [B, H, K, V] fp32, or None before the first token.
        window: [B, 3 * H * K, W - 1], the last inputs of the q, k and v convolutions, oldest first, or None.
        seen_tokens: positions appended, padding included; equals the MLA layers' length.
    """

    is_compileable = False
    is_croppable = False
    record_past = False
    number_of_states = 1

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None
        self.window: torch.Tensor | None = None
        self.seen_tokens = 0
        self.device: torch.device | None = None

    # transformers addresses the tensors of a linear-attention layer by these names, with a state index of 0.
    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        """`{0: window}`."""
        return {0: self.window}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        """`{0: state}`."""
        return {0: self.state}

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """`{0: whether any token was seen}`."""
        return {0: self.state is not None}

    @property
    def is_conv_states_initialized(self) -> dict[int, bool]:
        """`{0: whether the window is allocated}`."""
        return {0: self.window is not None}

    @property
    def is_recurrent_states_initialized(self) -> dict[int, bool]:
        """`{0: whether the state is allocated}`."""
        return {0: self.state is not None}

    def lazy_initialization(
        self, conv_states: torch.Tensor | None = None, recurrent_states: torch.Tensor | None = None, **_: Any
    ) -> None:
        """Adopt tensors as the window and the state (transformers' name for it)."""
        self.window = conv_states if conv_states is not None else self.window
        self.state = recurrent_states if recurrent_states is not None else self.state
        held = self.state if self.state is not None else self.window
        self.device = held.device if held is not None else None

    def update_conv_state(self, conv_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Replace the convolution windows, [B, 3 * H * K, W - 1]."""
        self.lazy_initialization(conv_states=conv_states)
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Replace the state, [B, H, K, V]."""
        self.lazy_initialization(recurrent_states=recurrent_states)
        return recurrent_states

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions, which a kernel has taken into `state` and `window` in place."""
        self.seen_tokens += tokens

    def get_seq_length(self) -> int:
        """Positions appended so far."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) of a mask over all positions."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def _apply(self, function) -> None:
        if self.state is not None:
            self.state, self.window = function(self.state), function(self.window)

    def reset(self) -> None:
        """Forget every token."""
        self.state = self.window = None
        self.seen_tokens = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep rows `beam_idx` of the batch, in that order."""
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move the tensors to the CPU; `prefetch` brings them back."""
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to the layer's device."""
        if self.state is not None and self.state.device != self.device:
            self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens: a recurrent state has swallowed them.

        Raises:
            ValueError: unless nothing is to be removed.
        """
        if _tokens_to_remove(tokens_to_remove, self.seen_tokens):
            raise ValueError(
                f"crop({tokens_to_remove}): the state of a KDA layer cannot give back tokens it has seen; "
                "keep a copy of the cache from before them (copy.deepcopy) and continue from that"
            )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.state is None else self.state.nbytes + self.window.nbytes


class LatentCacheLayer(CacheLayerMixin):
    """Latent rows of one MLA layer, in one tensor [B, capacity, kv_lora_rank + qk_rope_head_dim].

    A row is the normalised latent followed by the shared key; keys and values are never stored expanded.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None
        self._latent_dim = 0
        self._length = 0
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether rows are allocated."""
        return self._rows is not None

    @property
    def is_croppable(self) -> bool:
        """Rows can be dropped exactly."""
        return True

    @property
    def rows(self) -> torch.Tensor | None:
        """[B, L, kv_lora_rank + qk_rope_head_dim], a view of the rows in use."""
        return None if self._rows is None else self._rows[:, : self._length]

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, 1, L, kv_lora_rank], the latents (transformers' name for the first cached tensor)."""
        return None if self._rows is None else self.rows[:, None, :, : self._latent_dim]

    @property
    def values(self) -> torch.Tensor | None:
        """[B, 1, L, qk_rope_head_dim], the shared keys (transformers' name for the second cached tensor)."""
        return None if self._rows is None else self.rows[:, None, :, self._latent_dim :]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, widths, dtype and device from the first rows."""
        width = key_states.shape[-1] + value_states.shape[-1]
        self._latent_dim, self._length = key_states.shape[-1], 0
        self._rows = key_states.new_empty(key_states.shape[0], 0, width)
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents [B, 1, T, kv_lora_rank] and shared keys [B, 1, T, qk_rope_head_dim]; return all of both."""
        if self._rows is None:
            self.lazy_initialization(key_states, value_states)
        new_rows = torch.cat([key_states, value_states], dim=-1).squeeze(1)
        end = self._length + new_rows.shape[1]
        if torch.is_grad_enabled() and (new_rows.requires_grad or self._rows.requires_grad):
            # Autograd may still need the old rows as they are, so nothing is written in place.
            self._rows = torch.cat([self.rows, new_rows], dim=1)
        else:
            if end > self._rows.shape[1]:
                self._grow(end)
            self._rows[:, self._length : end] = new_rows
        self._length = end
        return self.keys, self.values

    @property
    def storage(self) -> torch.Tensor | None:
        """[B, capacity, kv_lora_rank + qk_rope_head_dim], all rows that are allocated."""
        return self._rows

    def reserve(self, length: int) -> None:
        """Make room for `length` rows in all; moves the storage if it has to grow."""
        if length > self._rows.shape[1]:
            self._grow(length)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more rows, which a kernel has written to `storage`."""
        self._length += tokens

    def _grow(self, needed: int) -> None:
        capacity = max(needed, self._length + max(_BLOCK, self._length // 8))
        grown = self._rows.new_empty(self._rows.shape[0], -(-capacity // _BLOCK) * _BLOCK, self._rows.shape[2])
        grown[:, : self._length] = self.rows
        self._rows = grown

    def get_seq_length(self) -> int:
        """Rows in use."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) after `query_length` more rows."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: the layer grows."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget every row."""
        self._rows, self._length = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep rows `beam_idx` of the batch, in that order."""
        if self._rows is not None:
            self._rows = self._rows.index_select(0, beam_idx.to(self._rows.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self._rows is not None:
            self._rows = self._rows.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch."""
        if self._rows is not None:
            self._rows = self._rows[indices.to(self._rows.device)]

    def offload(self) -> None:
        """Move the rows to the CPU; `prefetch` brings them back."""
        if self._rows is not None:
            self._rows = self._rows.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move the rows back to the layer's device."""
        if self._rows is not None and self._rows.device != self.device:
            self._rows = self._rows.to(self.device, non_blocking=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` rows; a positive number is the length to keep, as in older transformers."""
        self._length -= _tokens_to_remove(tokens_to_remove, self._length)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return 0 if self._rows is None else self.rows.numel() * self._rows.element_size()

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return 0 if self._rows is None else self._rows.nbytes


class KimiLinearCache(Cache):
    """Cache of a Kimi Linear model, one layer object per decoder layer (module docstring has the sizes).

    Args:
        config: a Kimi Linear config; only `layer_types` is read.

    Example:
        >>> cache = KimiLinearCache(model.config)
        >>> model.generate(**inputs, past_key_values=cache)
        >>> cache.nbytes
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layer_types = config.get_text_config(decoder=True).layer_types
        super().__init__(
            layers=[KDACacheLayer() if kind == "linear_attention" else LatentCacheLayer() for kind in layer_types]
        )

    def __repr__(self) -> str:
        kda = sum(isinstance(layer, KDACacheLayer) for layer in self.layers)
        return (
            f"KimiLinearCache({kda} KDA + {len(self.layers) - kda} MLA layers, {self.get_seq_length()} tokens, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of states, windows and latent rows in use, all layers and batch rows together."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows of the batch, or -1 while the cache is empty."""
        for layer in self.layers:
            held = layer.state if isinstance(layer, KDACacheLayer) else layer.rows
            if held is not None:
                return held.shape[0]
        return -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, padding included. KDA and MLA layers both know it."""
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(kv_length, kv_offset) for a mask over what MLA layers attend to."""
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether KDA layer `layer_idx` (the last one by default) has seen a token."""
        layers = self.layers if layer_idx is None else [self.layers[layer_idx]]
        kda = [layer for layer in layers if isinstance(layer, KDACacheLayer)]
        if not kda:
            raise ValueError(
                "has_previous_state is a question about KDA layers, and "
                + ("the cache has none" if layer_idx is None else f"layer {layer_idx} is an MLA layer")
            )
        return kda[-1].state is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; a positive number is the length to keep.

        Raises:
            ValueError: if KDA layers have seen tokens; nothing is changed then.
        """
        for layer in self.layers:
            if isinstance(layer, KDACacheLayer):
                layer.crop(tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, LatentCacheLayer):
                layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget every token of every layer."""
        for layer in self.layers:
            layer.reset()


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
    """Store what a KDA layer leaves behind after `new_tokens` more positions."""
    layer = cache.layers[layer_idx]
    if isinstance(layer, KDACacheLayer):
        layer.lazy_initialization(conv_states=window, recurrent_states=state)
        layer.seen_tokens += new_tokens
        return
    # A full window replaces the one that is held; both updates write in place, which keeps addresses for CUDA graphs.
    cache.update_conv_state(window, layer_idx)
    layer.dtype = state.dtype  # transformers < 5.20 would allocate the state in the window's dtype
    cache.update_recurrent_state(state, layer_idx)


__all__ = ["KDACacheLayer", "KimiLinearCache", "LatentCacheLayer", "read_kda_states", "write_kda_states"]
