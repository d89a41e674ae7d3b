"""How `generate()` runs our models: with the hybrid cache, and with drafts that are taken back exactly."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from ..cache.kimi_linear_cache import KimiLinearCache
from ..decode.loop import can_sample_with_steps, sample_with_steps
from ..decode.path import serves, step_mask
from ..input_checks import check_cache, check_mask, check_token_ids
from .cache_setup import bound_unbounded_layers, expect_text
from .refusals import check_cache_implementation, continuous_batching_error
from .speculative import expect_whole_prompt, record_for_drafts, uncached_tokens, within_length


class KimiGenerationMixin(GenerationMixin):
    """transformers' `generate()` over a `KimiLinearCache`, by captured decode steps where the model has them."""

    @property
    def decode_path(self) -> str:
        """How this model decodes as it stands: by captured steps (of up to 64 tokens), or layer by layer and why."""
        reason = self._decode.reason(self)
        return "captured steps" if reason is None else f"layer by layer: {reason}"

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
        check_cache_implementation(generation_config.cache_implementation, self.config.layer_types)
        # Older transformers ask for "dynamic_full" where a draft will be taken back.
        wants_default = generation_config.cache_implementation in (None, "dynamic", "dynamic_full")
        if wants_default and generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = KimiLinearCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
            bound_unbounded_layers(model_kwargs.get("past_key_values"))
        record_for_drafts(model_kwargs.get("past_key_values"), generation_config, generation_mode)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, for every way into transformers' continuous batching goes through here.

        Raises:
            ValueError: always.
        """
        raise continuous_batching_error()

    def _step_logits(
        self, input_ids: Any, attention_mask: Any, past_key_values: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Logits [B, T, vocab_size] by a captured step, or None where the layers are to be run one by one."""
        if not serves(past_key_values, input_ids, attention_mask, kwargs, self.config):
            return None
        step = self._decode.step(self, *input_ids.shape)
        if step is None:
            return None
        (batch_size, length), past_length = input_ids.shape, past_key_values.get_seq_length()
        check_token_ids(input_ids, self.config.vocab_size)
        check_cache(past_key_values, self.config, batch_size)
        check_mask(attention_mask, batch_size, length, past_length)
        honoured, mask = step_mask(attention_mask, length)
        return step(past_key_values, input_ids, mask) if honoured else None

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling: around captured decode steps where the model has them, else as transformers."""
        expect_text(model_kwargs.get("past_key_values"), input_ids.shape[1], generation_config.max_length)
        step = None
        if can_sample_with_steps(generation_config, model_kwargs, synced_gpus):
            step = self._decode.step(self, input_ids.shape[0], 1)
        if step is None:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        return sample_with_steps(
            step, outputs, input_ids, logits_processor, stopping_criteria, generation_config, streamer, mask
        )


__all__ = ["KimiGenerationMixin"]
