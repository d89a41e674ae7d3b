"""Errors at the boundary: what a caller got wrong, in words, before a kernel finds out."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..configuration.configuration_kimi_linear import KimiLinearConfig


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `input_ids` is an integer [B, T] tensor within the vocabulary.

    On a GPU this waits for the values; an embedding lookup out of range would end the CUDA context instead. Compiled
    graphs skip it.
    """
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"input_ids must be [batch, tokens] integers, got {list(input_ids.shape)} {input_ids.dtype}")
    if torch.compiler.is_compiling() or input_ids.numel() == 0 or input_ids.device.type == "meta":
        return
    if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(x) for x in torch.aminmax(input_ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids hold token {low if low < 0 else high}, outside the vocabulary [0, {vocab_size}); "
            "check that the tokenizer belongs to this model"
        )


def expect_token_ids(inputs: Any) -> None:
    """Raise ValueError unless the `inputs` of `generate()` are a tensor or None."""
    if inputs is not None and not isinstance(inputs, torch.Tensor):
        fix = "a tensor [batch, tokens]"
        if hasattr(inputs, "keys"):
            fix = "its tensors, by name: generate(**inputs), or inputs=inputs['input_ids'] with the attention_mask"
        raise ValueError(f"generate(inputs=...) got a {type(inputs).__name__}; give {fix}")


def check_embeddings(inputs_embeds: torch.Tensor, hidden_size: int) -> None:
    """Raise ValueError unless `inputs_embeds` is [B, T, hidden_size] with at least one token."""
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size:
        raise ValueError(f"inputs_embeds must be [batch, tokens, {hidden_size}], got {list(inputs_embeds.shape)}")
    if 0 in inputs_embeds.shape[:2]:
        rows, tokens = inputs_embeds.shape[:2]
        raise ValueError(f"the input is empty: {rows} rows of {tokens} tokens; give at least one of each")


def wants_records(options: dict[str, Any], config: Any) -> bool:
    """Whether keyword arguments of a forward, or its config where they say nothing, ask for more than its result.

    That is hidden states, attention weights or router logits, which only the layers' own forwards have.
    """
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        asked = options.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            return True
    return False


def check_positions(position_ids: torch.Tensor | None, batch_size: int, length: int) -> None:
    """Raise ValueError unless `position_ids` is None or [1 or B, T]."""
    if position_ids is not None and tuple(position_ids.shape) not in ((1, length), (batch_size, length)):
        raise ValueError(
            f"position_ids are {list(position_ids.shape)} but must be {[batch_size, length]} or [1, {length}]; "
            "generate() makes them from attention_mask, which must be as long as cache and prompt together"
        )


def check_labels(labels: torch.Tensor, batch_size: int, length: int, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError unless `labels` is [B, T] and holds token ids or `ignore_index`."""
    if tuple(labels.shape) != (batch_size, length) or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"labels must be integers {[batch_size, length]}, one for each position whose logits are kept "
            f"(logits_to_keep=0 keeps all), got {list(labels.shape)} {labels.dtype}"
        )
    check_label_values(labels, vocab_size, ignore_index)


def check_label_values(labels: torch.Tensor, vocab_size: int, ignore_index: int, name: str = "labels") -> None:
    """Raise ValueError unless `labels`, of any shape, holds token ids or `ignore_index`. Compiled graphs skip it.

    On a GPU this waits for the values; others would end the CUDA context, or be read outside of the logits.
    """
    if torch.compiler.is_compiling() or labels.device.type == "meta":
        return
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    wrong = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"{name} hold {int(wrong[0])}, neither a token in [0, {vocab_size}) nor {ignore_index}, which marks tokens "
            "without loss"
        )


def _numbered(held: Any) -> torch.Tensor | None:
    """A state of a linear-attention cache layer; transformers >= 5.20 numbers them."""
    return held.get(0) if isinstance(held, dict) else held


def check_cache(cache: Any, config: KimiLinearConfig, batch_size: int) -> None:
    """Raise ValueError unless `cache` is whole, was made for a model of this shape and holds this many rows."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values must be a Cache (KimiLinearCache, or transformers' DynamicCache/StaticCache made with "
            f"config=model.config), got {type(cache).__name__}"
        )
    if hasattr(cache, "wholeness"):
        cache.wholeness.check()
    expected = config.layer_types[: config.num_hidden_layers]  # fewer while a draft exits early
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers and the model {config.num_hidden_layers}; make it with "
            "KimiLinearCache(model.config)"
        )
    is_kda = [hasattr(layer, "recurrent_states") for layer in cache.layers]
    if is_kda != [kind == "linear_attention" for kind in expected]:
        raise ValueError(
            "past_key_values was made for another config: its KDA and MLA layers don't stand where this model's do"
        )
    heads, width, taps = config.linear_num_heads, config.linear_head_dim, config.linear_conv_kernel_dim
    for index, layer in enumerate(cache.layers):
        if is_kda[index]:
            state, window = _numbered(layer.recurrent_states), _numbered(layer.conv_states)
            _check_held(index, "a state", state, batch_size, (heads, width, width))
            _check_held(index, "windows", window, batch_size, (3 * heads * width, taps - 1))
        else:
            latent, shared = getattr(layer, "keys", None), getattr(layer, "values", None)
            _check_held(index, "latents", latent, batch_size, (1, None, config.kv_lora_rank))
            _check_held(index, "shared keys", shared, batch_size, (1, None, config.qk_rope_head_dim))


def check_mask_values(attention_mask: Any) -> None:
    """Raise ValueError unless a [B, T] `attention_mask` holds nothing but 0 and 1. Compiled graphs skip it.

    A mask that numbers packed samples (1 1 1 2 2 2) would pass for one sequence.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or attention_mask.dtype == torch.bool:
        return
    if torch.compiler.is_compiling() or attention_mask.numel() == 0 or attention_mask.device.type == "meta":
        return
    if attention_mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    wrong = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if wrong.numel():
        raise ValueError(
            f"attention_mask holds {wrong[0].item()}, but must be 1 at tokens and 0 at padding. Packed samples are "
            "kept apart by cu_seq_lens_q, or by position_ids that restart, without a mask (DataCollatorWithFlattening)"
        )


def checkpointing_over_cache_error(past_length: int) -> ValueError:
    """What to raise where layers are checkpointed over a filled cache, which transformers keeps from them."""
    return ValueError(
        f"past_key_values holds {past_length} tokens, and gradient checkpointing keeps the cache from the layers: "
        "leave out the cache, call the model under torch.no_grad(), or call gradient_checkpointing_disable()"
    )


def check_cache_dtype(cache: Any, inputs: torch.Tensor) -> None:
    """Raise ValueError if latents or windows of `cache` have a wider dtype than `inputs` [B, T, hidden_size].

    A narrower cache, as autocast leaves it, is taken; under autocast nothing is checked.
    """
    if torch.is_autocast_enabled(inputs.device.type):
        return
    for index, layer in enumerate(cache.layers):
        kda = hasattr(layer, "recurrent_states")
        held = _numbered(layer.conv_states) if kda else getattr(layer, "keys", None)
        if isinstance(held, torch.Tensor) and torch.promote_types(held.dtype, inputs.dtype) != inputs.dtype:
            raise ValueError(
                f"past_key_values was made in {held.dtype} (layer {index}) and the model is in {inputs.dtype}; run the "
                "prompt again in this dtype, or load the model with the dtype it had then"
            )


def _check_held(index: int, what: str, held: Any, batch_size: int, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless a cached tensor is [batch_size, *shape]; None in `shape` fits any length."""
    if not isinstance(held, torch.Tensor) or held.ndim != len(shape) + 1:
        return  # not allocated yet
    if held.shape[0] != batch_size:
        raise ValueError(f"past_key_values holds {held.shape[0]} sequences and the input has {batch_size} rows")
    if any(wanted not in (None, got) for wanted, got in zip(shape, held.shape[1:])):
        wanted = [got if size is None else size for size, got in zip(shape, held.shape[1:])]
        raise ValueError(
            f"past_key_values was made for another config: layer {index} holds {what} of shape "
            f"{list(held.shape[1:])}, this model's are {wanted}"
        )


def check_mask(attention_mask: Any, batch_size: int, length: int, past_length: int | None) -> None:
    """Raise ValueError unless an `attention_mask` covers the cached and the new tokens of every row.

    Args:
        attention_mask: what the caller gave; prepared dicts and block masks pass.
        batch_size: rows of the input.
        length: new tokens.
        past_length: cached tokens, or None where the cache doesn't count them.
    """
    if isinstance(attention_mask, list | tuple):
        raise ValueError(f"attention_mask must be a tensor [batch, tokens], got a {type(attention_mask).__name__}")
    if not isinstance(attention_mask, torch.Tensor):
        return
    if attention_mask.ndim == 4:
        rows, _, new, seen = attention_mask.shape
        if rows not in (1, batch_size) or new != length or seen < (past_length or 0) + length:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)} but must be [1 or {batch_size}, heads or 1, {length}, "
                f"all tokens]: {past_length} cached and {length} new ones"
            )
        return
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens] or [batch, 1, new, all], got {list(attention_mask.shape)}"
        )
    expected = attention_mask.shape[1] if past_length is None else past_length + length
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] != expected:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} but must be {[batch_size, expected]}: one row per "
            f"sequence, covering {past_length} cached tokens and {length} new ones"
        )


__all__ = [
    "check_cache",
    "check_cache_dtype",
    "check_embeddings",
    "check_label_values",
    "check_labels",
    "check_mask",
    "check_mask_values",
    "check_positions",
    "check_token_ids",
    "checkpointing_over_cache_error",
    "expect_token_ids",
    "wants_records",
]
