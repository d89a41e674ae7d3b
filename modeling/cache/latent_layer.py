"""The cache of one MLA layer: a growing table with one row per token."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .kda_layer import tokens_to_crop

# Latent rows are allocated in blocks of at least this many tokens, and at least a 32nd of what is there: appending one
# token at a time then copies 32 rows for each at the most, 74 KB, and a million tokens hold 3% of rows to spare.
_BLOCK, _GROWTH = 256, 32


class LatentCacheLayer(CacheLayerMixin):
    """Latent rows of one MLA layer, in one tensor [B, capacity, kv_lora_rank + qk_rope_head_dim].

    A row is the normalised latent followed by the shared key; keys and values are never stored expanded. The tensor
    keeps its address until it has to grow, is reset, or holds another number of sequences.

    Attributes:
        storage: [B, capacity, kv_lora_rank + qk_rope_head_dim], or None before the first token; rows behind
            `get_seq_length()` have no meaning.
        expected_length: rows to make room for when the storage is next allocated, so that it need not move on the way.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        self.storage: torch.Tensor | None = None
        self.expected_length = 0
        self._latent_dim = 0
        self._length = 0
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether rows are allocated."""
        return self.storage is not None

    @property
    def is_croppable(self) -> bool:
        """Rows can be dropped exactly."""
        return True

    @property
    def rows(self) -> torch.Tensor | None:
        """[B, L, kv_lora_rank + qk_rope_head_dim], a view of the rows in use."""
        return None if self.storage is None else self.storage[:, : self._length]

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, 1, L, kv_lora_rank], the latents (transformers' name for the first cached tensor)."""
        return None if self.storage is None else self.rows[:, None, :, : self._latent_dim]

    @property
    def values(self) -> torch.Tensor | None:
        """[B, 1, L, qk_rope_head_dim], the shared keys (transformers' name for the second cached tensor)."""
        return None if self.storage is None else self.rows[:, None, :, self._latent_dim :]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, widths, dtype and device from the first rows."""
        width = key_states.shape[-1] + value_states.shape[-1]
        self._latent_dim, self._length = key_states.shape[-1], 0
        self.storage = key_states.new_empty(key_states.shape[0], 0, width)
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents [B, 1, T, kv_lora_rank] and shared keys [B, 1, T, qk_rope_head_dim]; return all of both."""
        if self.storage is None:
            self.lazy_initialization(key_states, value_states)
        new_rows = torch.cat([key_states, value_states], dim=-1).squeeze(1)
        end = self._length + new_rows.shape[1]
        if torch.is_grad_enabled() and (new_rows.requires_grad or self.storage.requires_grad):
            # Autograd may still need the old rows as they are, so nothing is written in place.
            self.storage = torch.cat([self.rows, new_rows], dim=1)
        else:
            self.reserve(end)
            self.storage[:, self._length : end] = new_rows
        self._length = end
        return self.keys, self.values

    def reserve(self, length: int) -> None:
        """Make room for `length` rows in all, moving the storage if need be. The layer must hold or have held rows."""
        # What was made in inference mode can't be written outside of it.
        is_frozen = not torch.compiler.is_compiling() and (
            self.storage.is_inference() and not torch.is_inference_mode_enabled()
        )
        if length <= self.storage.shape[1] and not is_frozen:
            return
        capacity = max(length, self.expected_length, self._length + max(_BLOCK, self._length // _GROWTH))
        grown = self.storage.new_empty(self.storage.shape[0], -(-capacity // _BLOCK) * _BLOCK, self.storage.shape[2])
        grown[:, : self._length] = self.rows
        self.storage = grown

    def advance(self, new_tokens: int) -> None:
        """Count rows that a captured graph has written behind `get_seq_length()`, within the capacity."""
        self._length += new_tokens

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
        self.storage, self._length, self.expected_length = None, 0, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep rows `beam_idx` of the batch, in that order."""
        if self.storage is not None:
            self.storage = self.storage.index_select(0, beam_idx.to(self.storage.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self.storage is not None:
            self.storage = self.storage.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch."""
        if self.storage is not None:
            self.storage = self.storage[indices.to(self.storage.device)]

    def offload(self) -> None:
        """Move the rows to the CPU; `prefetch` brings them back."""
        if self.storage is not None:
            self.storage = self.storage.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move the rows back to the layer's device."""
        if self.storage is not None and self.storage.device != self.device:
            self.storage = self.storage.to(self.device, non_blocking=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` rows; a positive number is the length to keep, as in older transformers."""
        self.roll_back(tokens_to_crop(tokens_to_remove, self._length))

    def roll_back(self, tokens: int) -> None:
        """Drop the last `tokens` rows."""
        self._length -= tokens

    def undo(self, length: int) -> bool:
        """After a call that failed: go back to the first `length` rows, those before the call. Always possible."""
        self._length = min(self._length, length)
        return True

    def restore(self, rows: torch.Tensor | None, latent_dim: int) -> None:
        """Continue from a copy of `rows` [B, L, .], of which the first `latent_dim` columns are the latent."""
        if rows is None:
            self.reset()
            return
        if self.storage is None or self.storage.requires_grad or self.storage.shape[0] != rows.shape[0]:
            self.storage = rows.new_empty(rows.shape[0], 0, rows.shape[2])
        self._length, self._latent_dim = 0, latent_dim
        self.reserve(rows.shape[1])
        self.storage[:, : rows.shape[1]] = rows
        self._length = rows.shape[1]
        self.dtype, self.device = rows.dtype, rows.device

    @property
    def latent_dim(self) -> int:
        """kv_lora_rank, or 0 before the first row."""
        return self._latent_dim

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return 0 if self.storage is None else self.rows.numel() * self.storage.element_size()

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return 0 if self.storage is None else self.storage.nbytes


__all__ = ["LatentCacheLayer"]
