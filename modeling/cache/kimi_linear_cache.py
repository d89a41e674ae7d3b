"""The hybrid cache of Kimi Linear: constant-size state for KDA layers, one latent row per token for MLA layers.

| layer | holds | bytes a sequence (released shape, bf16) |
|---|---|---|
| KDA | state [B, H, K, V] fp32; windows of the three short convolutions [B, 3 H K, W-1] | 2 MiB + 72 KiB |
| KDA, while recording | what taking tokens back needs (`cache/recording.py`) | 10.2 MiB more |
| MLA | latent rows [B, L, kv_lora_rank + qk_rope_head_dim] | 1,152 a token |

`KimiLinearCache` speaks transformers' `Cache` protocol and is what `generate()` makes by default. KDA layers talk to it
and to transformers' own caches (`DynamicCache(config=...)`, `StaticCache`) through `cache/kda_states.py`.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .kda_layer import KDACacheLayer, tokens_to_crop
from .latent_layer import LatentCacheLayer
from .recording import RECORDED_TOKENS
from .snapshots import CacheSnapshot, attention_layers, check_same_shape, load_snapshot, model_shape, save_snapshot
from .wholeness import Wholeness


class KimiLinearCache(Cache):
    """Cache of a Kimi Linear model, one layer object per decoder layer (module docstring has the sizes).

    Args:
        config: a Kimi Linear config.

    Example:
        >>> cache = KimiLinearCache(model.config)
        >>> model.generate(**inputs, past_key_values=cache)
        >>> cache.nbytes
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.model_shape = model_shape(config)
        is_kda = [kind == "linear_attention" for kind in self.model_shape["layer_types"]]
        super().__init__(layers=[KDACacheLayer() if kda else LatentCacheLayer() for kda in is_kda])
        # Set between `generate` and its first call, see expect_whole_prompt (generate/speculative.py).
        self.awaits_whole_prompt = False
        # Speculative decoding: accepted tokens when the last draft began, or when its refused tokens were taken back.
        self.accepted_tokens = 0
        self.wholeness = Wholeness()
        # What follows the last token, if an interrupted `generate` left it (NextLogits (generate/resume.py)).
        self.next_logits: Any = None

    def __repr__(self) -> str:
        kda = len(self._kda_layers)
        return (
            f"KimiLinearCache({kda} KDA + {len(self.layers) - kda} MLA layers, {self.get_seq_length()} tokens, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def _kda_layers(self) -> list[KDACacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, KDACacheLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of states, windows and latent rows in use, all layers and batch rows together."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def recording_nbytes(self) -> int:
        """Bytes that recording takes, all layers and batch rows together."""
        return sum(layer.recording_nbytes for layer in self._kda_layers)

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

    def expect(self, length: int) -> None:
        """Let MLA layers make room for `length` positions in all when they next allocate; nothing is allocated now.

        Without it they grow on the way, and each growth holds one layer's rows twice for a moment.
        """
        for layer in self.layers:
            if isinstance(layer, LatentCacheLayer):
                layer.expected_length = max(layer.expected_length, length)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(kv_length, kv_offset) for a mask over what MLA layers attend to."""
        return self.layers[layer_idx].get_mask_sizes(query_length)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers are KDA; none if all are.

        transformers 5.24 asks this to learn whether anything counts tokens, and ours do: without a count, `generate()`
        would run the tokens that the cache holds again.
        """
        is_kda = [isinstance(layer, KDACacheLayer) for layer in self.layers]
        return [False] * len(is_kda) if all(is_kda) else is_kda

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

    # A change that fails half way

    def changing(
        self, what: str, undo: Callable[[], bool] | None = None, mends: bool = False
    ) -> AbstractContextManager[None]:
        """The context in which more than one layer is changed; arguments and errors as `Wholeness.change`."""
        self.next_logits = None
        return self.wholeness.change(what, undo, mends)

    def taking_tokens(self, what: str) -> AbstractContextManager[None]:
        """The context in which a call appends tokens to all layers.

        If it fails, an empty cache becomes empty again, and a cache that records what it was before the call. Any other
        cache refuses further use until `restore` or `reset`.

        Args:
            what: the call, for the error.

        Raises:
            ValueError: if the cache is not whole, or another thread is changing it.
        """
        return self.changing(what, partial(self.undo, self.get_seq_length()))

    def undo(self, seen_tokens: int) -> bool:
        """Go back to the `seen_tokens` positions before a call that failed; False where that can't be."""
        if seen_tokens == 0:
            for layer in self.layers:
                layer.reset()
            return True
        undone = [layer.undo(seen_tokens) for layer in self.layers]
        return all(undone)

    # Taking tokens back

    def activate_past_recording(self, max_tokens: int = RECORDED_TOKENS) -> None:
        """From now on record what `crop` needs; `generate` calls it by itself for speculative decoding.

        The tokens of the last call can always be taken back (of a prompt, the last `max_tokens` / 2; a call of more
        than 256 tokens counts as one). As long as calls bring no more than 16 tokens, so can the last `max_tokens` / 4
        of all (given 128 or more).

        Args:
            max_tokens: room of the recording, whose bytes grow with it (`recording_nbytes`).
        """
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
        for layer in self._kda_layers:
            layer.activate_past_recording(max_tokens)

    def deactivate_past_recording(self) -> None:
        """Stop recording and free its memory; tokens can't be taken back any more."""
        for layer in self._kda_layers:
            layer.deactivate_past_recording()

    @property
    def is_recording(self) -> bool:
        """Whether KDA layers record what `crop` needs."""
        return any(layer.record_past for layer in self._kda_layers)

    def prepare_recording(self, new_tokens: int) -> None:
        """Before a captured graph steps through `new_tokens` positions (see `KDACacheLayer.advance`)."""
        for layer in self._kda_layers:
            layer.prepare_recording(new_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, as if they had never been seen.

        KDA states and windows become, bit for bit, what they are after the same inputs of the kept tokens alone, in
        whichever calls those came. (Inputs of a layer are outputs of matrix products: there the bits of one row may
        depend on how many rows the call had.)

        Args:
            tokens_to_remove: minus how many; a positive number is the length to keep, as in older transformers; 0 is
                what the installed transformers means by it.

        Raises:
            ValueError: if KDA layers have seen more tokens than that and didn't record them; nothing is changed then.
        """
        self.wholeness.check()
        tokens = tokens_to_crop(tokens_to_remove, self.get_seq_length())
        for layer in self._kda_layers:
            layer.check_crop(tokens)
        with self.changing("crop"):
            for layer in self.layers:
                layer.roll_back(tokens)
        self.accepted_tokens = self.get_seq_length() + 1

    def crop_rows(self, tokens_to_remove: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Take back another number of tokens from every row of the batch, as speculative decoding of a batch needs.

        What all rows take back is dropped. What a row takes back beyond that stays as a hole: its KDA states
        have never seen it, its latent rows are masked out. (No layer knows positions, so holes change nothing.)

        Args:
            tokens_to_remove: [B] integers, how many of the last positions each row takes back, holes included.
            attention_mask: [B, L] of the positions that the cache holds now, zero at padding and earlier holes; None
                for all ones.

        Returns:
            [B, L - min(tokens_to_remove)], the mask of what the cache holds from now on. The caller must append ones
            for new tokens and give it to the model in every later call.

        Raises:
            ValueError: for counts or a mask that don't fit, or more tokens than were recorded; nothing is changed then.
        """
        self.wholeness.check()
        batch_size, length = self.batch_size, self.get_seq_length()
        if tuple(tokens_to_remove.shape) != (batch_size,) or tokens_to_remove.is_floating_point():
            raise ValueError(
                f"tokens_to_remove must be {batch_size} integers, one per row, got {tokens_to_remove.dtype} "
                f"{list(tokens_to_remove.shape)}"
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, length):
            raise ValueError(
                f"attention_mask must be {[batch_size, length]}, the positions that the cache holds, got "
                f"{list(attention_mask.shape)}"
            )
        counts = tokens_to_remove.cpu()
        fewest, most = int(counts.min()), int(counts.max())
        if fewest < 0 or most > length:
            raise ValueError(f"tokens_to_remove must be from 0 to {length}, got {counts.tolist()}")
        for layer in self._kda_layers:
            layer.check_crop(most)
        with self.changing("crop_rows"):
            for layer in self.layers:
                if isinstance(layer, KDACacheLayer):
                    layer.roll_back(fewest, counts if most > fewest else None)
                else:
                    layer.roll_back(fewest)
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, length, dtype=torch.int64, device=tokens_to_remove.device)
        columns = torch.arange(length - fewest, device=attention_mask.device)
        ends = (length - counts).to(attention_mask.device)[:, None]
        return attention_mask[:, : length - fewest] * (columns < ends)

    # Copies

    def snapshot(self) -> CacheSnapshot:
        """A copy of what the cache holds, for `restore`; not of what was recorded."""
        self.wholeness.check()
        layers, weights = [], []
        for layer in self.layers:
            if isinstance(layer, KDACacheLayer):
                held = {"window": layer.window, "state": layer.state}
                weights.append(layer.weights)
            else:
                held = {"rows": layer.rows}
                weights.append(None)
            layers.append({name: x.detach().clone() for name, x in held.items() if x is not None})
        return CacheSnapshot(self.model_shape, self.get_seq_length(), layers, weights)

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Go back to a snapshot of this cache or of another one of the same model, any number of times.

        Tensors keep their addresses where the batch size is the same. Recorded tokens are forgotten.

        Raises:
            ValueError: if the snapshot was made by another model; nothing is changed then.
        """
        if not isinstance(snapshot, CacheSnapshot):
            raise ValueError(f"restore takes what snapshot() returned, got {type(snapshot).__name__}")
        check_same_shape(snapshot.shape, self.model_shape, "the snapshot")
        for i, theirs in enumerate(snapshot.weights):
            ours = getattr(self.layers[i], "weights", None)
            if theirs is not None and ours is not None and theirs.A_log is not ours.A_log:
                raise ValueError(
                    f"the snapshot was made by another model: layer {i} was filled by other weights than this cache's"
                )
        with self.changing("restore", mends=True):
            for layer, held, weights in zip(self.layers, snapshot.layers, snapshot.weights, strict=True):
                if isinstance(layer, KDACacheLayer):
                    layer.restore(held.get("window"), held.get("state"), snapshot.seen_tokens, weights)
                else:
                    layer.restore(held.get("rows"), self.model_shape["kv_lora_rank"])

    def fork(self, copies: int) -> list["KimiLinearCache"]:
        """`copies` caches that go on from here independently, recordings included; this one is left as it is.

        (For the same continuation of several rows in one batch there is `batch_repeat_interleave`.)
        """
        if copies < 1:
            raise ValueError(f"fork needs at least one copy, got {copies}")
        self.wholeness.check()
        return [copy.deepcopy(self) for _ in range(copies)]

    def save(self, path: Any) -> None:
        """Write the cache to a safetensors file that `load` reads, say one with a system prompt in it.

        Args:
            path: of the file (str or Path), which is replaced if it exists.

        Raises:
            ValueError: if the cache is empty.
        """
        save_snapshot(path, self.snapshot())

    @classmethod
    def load(cls, path: Any, model: nn.Module) -> "KimiLinearCache":
        """The cache in a file that `save` wrote, on the devices of `model`.

        Args:
            path: of the file (str or Path).
            model: the model that shall continue from it, loaded from the checkpoint that the cache was made with.

        Raises:
            ValueError: if the file is damaged, of another version, or was made by another model or in another dtype.
        """
        cache, modules = cls(model.config), attention_layers(model)
        is_kda = [isinstance(layer, KDACacheLayer) for layer in cache.layers]
        weights = [modules[i].step_weights() if kda else None for i, kda in enumerate(is_kda)]
        snapshot = load_snapshot(path, cache.model_shape, weights)
        for i, held in enumerate(snapshot.layers):
            weight = modules[i].o_proj.weight
            for name, tensor in held.items():
                if name != "state" and tensor.dtype != model.dtype:
                    raise ValueError(
                        f"{path} was made in {tensor.dtype} and the model is in {model.dtype}; load the "
                        "model with the dtype it had then"
                    )
                held[name] = tensor.to(weight.device)
        cache.restore(snapshot)
        return cache

    # Rows of the batch

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep rows `beam_idx` of the batch, in that order.

        Raises:
            ValueError: if a row doesn't exist; nothing is changed then. On a GPU this reads the values back.
        """
        self._check_rows(beam_idx)
        with self.changing("reorder_cache"):
            super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, numbers or a mask.

        Raises:
            ValueError: if a row doesn't exist; nothing is changed then. On a GPU this reads the values back.
        """
        self._check_rows(indices)
        with self.changing("batch_select_indices"):
            super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        with self.changing("batch_repeat_interleave"):
            super().batch_repeat_interleave(repeats)

    def _check_rows(self, indices: torch.Tensor) -> None:
        batch_size = self.batch_size
        if batch_size < 0 or indices.numel() == 0:
            return
        if indices.dtype == torch.bool:
            if indices.shape[0] != batch_size:
                raise ValueError(f"a mask over the {batch_size} rows of the cache must be as long, got {len(indices)}")
            return
        lowest, highest = (int(x) for x in torch.aminmax(indices))
        if lowest < 0 or highest >= batch_size:
            raise ValueError(
                f"row {lowest if lowest < 0 else highest} was asked for, and the cache holds rows 0 to {batch_size - 1}"
            )

    def reset(self) -> None:
        """Forget every token of every layer; a cache that a failure left half way can be used again."""
        self.awaits_whole_prompt = False
        with self.changing("reset", mends=True):
            for layer in self.layers:
                layer.reset()


__all__ = ["KDACacheLayer", "KimiLinearCache", "LatentCacheLayer"]
