"""How `generate()` runs our models: with the hybrid cache, and with drafts that are taken back exactly."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from .cache_kimi_linear import KimiLinearCache
from .speculative_decoding import expect_whole_prompt, record_for_drafts, uncached_tokens, within_length


class KimiGenerationMixin(GenerationMixin):
    """transformers' `generate()` over a `KimiLinearCache`."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next call in `generate()`, as transformers has it; drafts over a filled cache are cut right.

        transformers reads from this signature that `inputs_embeds` are served.
        """
        if next_sequence_length is None:
            next_sequence_length = uncached_tokens(past_key_values, input_ids)
        held = {"past_key_values": past_key_values, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **held, **kwargs)

    def _get_candidate_generator(self, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, generation_config=generation_config, **kwargs)
        return within_length(generator, generation_config.max_length)

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        expect_whole_prompt(kwargs.get("past_key_values"), input_ids)
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Make `KimiLinearCache` the cache of `generate()` unless the user brings or asks for another."""
        # Older transformers ask for "dynamic_full" where a draft will be taken back.
        wants_default = generation_config.cache_implementation in (None, "dynamic", "dynamic_full")
        if wants_default and generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = KimiLinearCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        record_for_drafts(model_kwargs.get("past_key_values"), generation_config, generation_mode)


__all__ = ["KimiGenerationMixin"]
