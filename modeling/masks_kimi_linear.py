"""The masks of a forward, by layer type."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from .cache_kimi_linear import KimiLinearCache
from .mla_attention import CausalOverCache


def make_masks(
    config: KimiLinearConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None = None,
    packed: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Masks by layer type: what MLA layers take, and [B, T] of the new tokens (or None) for KDA.

    MLA's is what `create_causal_mask` makes, or `CausalOverCache` where causality is all that is to be said.

    Under compilation a prompt's mask is always kept, since whether it is all ones cannot be asked, and a single token
    is taken as valid, which keeps the growing mask out of the graph.
    """
    if _only_causal(config, inputs_embeds.shape[1], attention_mask, past_key_values, packed):
        return {"full_attention": CausalOverCache(), "linear_attention": None}
    full_attention = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values if "full_attention" in config.layer_types else None,
        position_ids=position_ids,
        **kwargs,
    )
    padding_mask = None
    if attention_mask is not None and attention_mask.ndim == 2:
        padding_mask = attention_mask[:, -inputs_embeds.shape[1] :].contiguous()
        compiling = torch.compiler.is_compiling()
        if (compiling and padding_mask.shape[1] == 1) or (not compiling and padding_mask.all()):
            padding_mask = None
    return {"full_attention": full_attention, "linear_attention": padding_mask}


def _only_causal(
    config: KimiLinearConfig, new_tokens: int, attention_mask: Any, past_key_values: Cache | None, packed: bool
) -> bool:
    """Whether `CausalOverCache` says it all: one sequence a row, no padding, a cache as long as its tokens."""
    if packed or not CausalOverCache.fits(config, new_tokens):
        return False
    if not (past_key_values is None or isinstance(past_key_values, KimiLinearCache)):
        return False
    return attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all()))


__all__ = ["make_masks"]
