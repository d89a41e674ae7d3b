"""The masks of a forward, by layer type."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..cache.kimi_linear_cache import KimiLinearCache
from ..transformers_versions import CACHE_NAME
from .mla_attention import CausalOverCache

# Elements of a mask [B, T, L] from which on it is avoided: 256 MiB, and twice that again as the bias it is turned into.
_LARGE_MASK = 1 << 28


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

    MLA's is what `create_causal_mask` makes, or `CausalOverCache` where causality and padding at the ends are all.

    Under compilation a prompt's mask is always kept, since whether it is all ones cannot be asked, and a single token
    is taken as valid, which keeps the growing mask out of the graph.
    """
    full_attention = _without_mask(config, inputs_embeds.shape[1], attention_mask, past_key_values, packed)
    if full_attention is not None and full_attention.spans is None:
        return {"full_attention": full_attention, "linear_attention": None}
    if full_attention is None:
        full_attention = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values if "full_attention" in config.layer_types else None},
            **kwargs,
        )
    padding_mask = None
    if attention_mask is not None and attention_mask.ndim == 2:
        padding_mask = attention_mask[:, -inputs_embeds.shape[1] :].contiguous()
        compiling = torch.compiler.is_compiling()
        if (compiling and padding_mask.shape[1] == 1) or (not compiling and padding_mask.all()):
            padding_mask = None
    return {"full_attention": full_attention, "linear_attention": padding_mask}


def _without_mask(
    config: KimiLinearConfig, new_tokens: int, attention_mask: Any, past_key_values: Cache | None, packed: bool
) -> CausalOverCache | None:
    """What MLA layers can take instead of a mask, or None: it needs one sequence a row and a cache without spare rows.

    Padding in front of or behind a row's tokens takes attention row by row, which pays where the mask would be large.
    """
    if packed or not CausalOverCache.fits(config, new_tokens):
        return None
    if not (past_key_values is None or isinstance(past_key_values, KimiLinearCache)):
        return None
    if attention_mask is None:
        return CausalOverCache()
    if attention_mask.ndim != 2:
        return None
    valid = attention_mask.bool()
    counts, firsts = valid.sum(dim=1), valid.int().argmax(dim=1)
    ends = valid.shape[1] - valid.flip(1).int().argmax(dim=1)
    rows = torch.stack([counts, firsts, ends], dim=1).tolist()
    if all(count == valid.shape[1] for count, _, _ in rows):
        return CausalOverCache()
    has_holes = any(count != end - first for count, first, end in rows if count > 0)
    if has_holes or valid.numel() * new_tokens < _LARGE_MASK:
        return None
    return CausalOverCache(tuple((first, end) if count > 0 else (0, 0) for count, first, end in rows))


__all__ = ["make_masks"]
