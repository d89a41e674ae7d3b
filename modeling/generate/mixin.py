"""How `generate()` runs our models: with the hybrid cache, and with drafts that are taken back exactly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from ...kernels.kda.step import MAX_NEW_TOKENS
from ..cache.kimi_linear_cache import KimiLinearCache
from ..decode.loop import can_sample_with_steps, mask_for_all_steps, sample_with_steps
from ..decode.path import MAX_CHUNKED_TOKENS, serves, step_mask
from ..decode.step import MAX_STEP_TOKENS
from ..input_checks import check_cache, check_mask, check_positions, check_token_ids, expect_token_ids
from ..plain_modules import hanging_on_root, own_method
from ..prompt.path import may_serve, ways_of_prompts
from ..prompt.segments import is_cut
from ..transformers_versions import CACHE_NAME, as_argument, one_cache
from .cache_setup import bound_unbounded_layers, expect_text
from .refusals import check_cache_implementation, continuous_batching_error
from .resume import RememberingProcessors, keep_next_logits, outputs_of_cached_prompt
from .speculative import drop_unaccepted, expect_whole_prompt, noting_accepted, record_for_drafts, uncached_tokens


class KimiGenerationMixin(GenerationMixin):
    """transformers' `generate()` over a `KimiLinearCache`, by captured decode steps where the model has them."""

    @property
    def decode_path(self) -> str:
        """How this model decodes as it stands, limits included: by captured steps, or layer by layer and why."""
        self._decode.look_again()
        reason = self._decode.reason(self)
        if reason is not None:
            return f"layer by layer: {reason}"
        loop = self._reason_for_library_loop()
        within = "" if loop is None else f", one forward at a time, since the model {loop}"
        return (
            f"captured steps{within}: {MAX_NEW_TOKENS} new tokens of a sequence and {MAX_STEP_TOKENS} of all sequences "
            f"at a time; larger batches are cut by rows, up to {MAX_CHUNKED_TOKENS} new tokens in all are taken in "
            "several steps, and more are a prompt (see prompt_path)"
        )

    @property
    def prompt_path(self) -> str:
        """How this model takes prompts as it stands, limits included: by packed plans, or layer by layer and why."""
        self._decode.look_again()
        reason = self._prompts.reason(self)
        return ways_of_prompts() if reason is None else f"layer by layer: {reason}"

    def free_generation_memory(self) -> None:
        """Give back all that generation holds between two texts, as before a training step.

        Those are captured steps and prompts with their graphs and buffers, and what PyTorch keeps of freed memory. The
        next text captures its step anew (some tenths of a second once kernels are compiled). Caches belong to whoever
        holds them: those that `generate()` made are gone with its result. cuBLAS keeps its workspaces (32 MiB on
        Hopper).
        """
        devices = {x.device for x in self.parameters() if x.device.type == "cuda"}
        for device in devices:
            torch.cuda.synchronize(device)  # graphs may still run
        self._decode.free()
        self._prompts.clear()
        if devices:
            torch.cuda.empty_cache()

    def _reason_for_library_loop(self) -> str | None:
        """What our loop around steps would pass over, in words that follow "the model"; or None."""
        what = hanging_on_root(self, self.dtype)
        if what is not None:
            return what
        if not self._has_own("prepare_inputs_for_generation", KimiGenerationMixin):
            return "has a prepare_inputs_for_generation of its own (as prompt tuning gives it)"
        if not self._has_own("_update_model_kwargs_for_generation", GenerationMixin):
            return "has an _update_model_kwargs_for_generation of its own"
        return None

    def _has_own(self, name: str, owner: type) -> bool:
        return own_method(self, name, getattr(owner, name))

    def generate(
        self, *args: Any, past_key_values: Cache | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate()`, over a `KimiLinearCache` unless another is asked for.

        Args:
            args: `inputs` and the others, as transformers has them.
            past_key_values: a cache to continue from.
            cache: another name of `past_key_values`, transformers' own since 5.24.
            kwargs: as transformers has them; and `prompt_progress`, see `forward`.

        Raises:
            ValueError: if both names are given and hold different caches.
            TypeError: for a cache under a name that is none of the two.
        """
        return super().generate(*args, **as_argument(one_cache(past_key_values, cache, kwargs)), **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next call in `generate()`, as transformers has it; drafts over a filled cache are cut right.

        transformers reads from this signature that `inputs_embeds` are served.
        """
        past_key_values = one_cache(past_key_values, cache, kwargs)
        if next_sequence_length is None:
            next_sequence_length = uncached_tokens(past_key_values, input_ids)
        held = {CACHE_NAME: past_key_values, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **held, **kwargs)
        if past_key_values is not None and not self._has_own("prepare_inputs_for_generation", KimiGenerationMixin):
            inputs["past_key_values"] = past_key_values  # the name that PEFT's, which is around this one, looks for
        return inputs

    def _prepare_model_inputs(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        expect_token_ids(inputs)
        return super()._prepare_model_inputs(inputs, *args, **kwargs)

    def _get_candidate_generator(
        self, *args: Any, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        generator = super()._get_candidate_generator(
            *args, generation_config=generation_config, model_kwargs=model_kwargs, **kwargs
        )
        return noting_accepted(generator, generation_config.max_length, model_kwargs.get(CACHE_NAME))

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; an interruption leaves a cache with accepted tokens only."""
        cache = kwargs.get(CACHE_NAME)
        expect_whole_prompt(cache, input_ids)
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        except BaseException:
            drop_unaccepted(cache)
            raise

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """The forward that `generate()` begins with: of the prompt, as far as the cache doesn't hold it."""
        mask = model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        outputs = outputs_of_cached_prompt(model_kwargs.get(CACHE_NAME), input_ids, embeds, length)
        if outputs is not None:
            return outputs
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Make `KimiLinearCache` the cache of `generate()` unless the user brings or asks for another."""
        if isinstance(model_kwargs.get(CACHE_NAME), KimiLinearCache) and not generation_config.use_cache:
            raise ValueError(
                "use_cache=False with past_key_values: every step would append the whole text to the cache again; "
                "leave out one of the two"
            )
        check_cache_implementation(generation_config.cache_implementation, self.config.layer_types)
        # Older transformers ask for "dynamic_full" where a draft will be taken back.
        wants_default = generation_config.cache_implementation in (None, "dynamic", "dynamic_full")
        if wants_default and generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = KimiLinearCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
            bound_unbounded_layers(model_kwargs.get(CACHE_NAME))
        record_for_drafts(model_kwargs.get(CACHE_NAME), generation_config, generation_mode)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, for every way into transformers' continuous batching goes through here.

        Raises:
            ValueError: always.
        """
        raise continuous_batching_error()

    def _step_logits(
        self,
        past_key_values: Any,
        input_ids: Any,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """Logits [B, T, vocab_size] by a captured step, or None where the layers are to be run one by one."""
        if not serves(past_key_values, input_ids, attention_mask, kwargs, self.config):
            self._decode.look_again()  # a prompt, or what steps don't answer: there is time for it
            return None
        batch_size, length = input_ids.shape
        parts = input_ids.split(max(1, min(MAX_NEW_TOKENS, MAX_STEP_TOKENS // batch_size)), dim=1)
        step = self._decode.step(self, *parts[0].shape)
        if step is None:
            return None
        check_token_ids(input_ids, self.config.vocab_size)
        check_positions(position_ids, batch_size, length)
        check_cache(past_key_values, self.config, batch_size)
        check_mask(attention_mask, batch_size, length, past_key_values.get_seq_length())
        honoured, mask = step_mask(None if attention_mask is None else attention_mask.to(step.device), length)
        if not honoured or step.inputs.misfit(past_key_values) is not None:
            return None
        if len(parts) == 1:
            return step(past_key_values, input_ids, mask)
        with past_key_values.taking_tokens("decode steps"):
            # Room for all at once, so that what the first part records is still there when the last is.
            past_key_values.prepare_recording(length)
            steps = [self._decode.step(self, *part.shape) for part in parts]
            return torch.cat([step(past_key_values, part, mask) for step, part in zip(steps, parts)], dim=1)

    def _planned_logits(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        past_key_values: Any,
        use_cache: bool | None,
        kept: slice | torch.Tensor,
        prompt_progress: Callable[[int, int], None] | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor | None, Cache | None]:
        """(Logits [B, kept, vocab_size] by a packed prompt or a step, the cache to return), or None twice.

        A few new tokens over a cache are a step; of more, a prompt reads each weight once where steps come in turn.
        """
        arguments = (past_key_values, input_ids, attention_mask, position_ids)
        serves_prompt = may_serve(self, *arguments, kwargs)
        # Segments, which are what else takes so many tokens, report what they have done.
        if serves_prompt and (prompt_progress is None or not is_cut(self.model, *input_ids.shape)):
            cache = KimiLinearCache(self.config) if past_key_values is None else past_key_values
            hidden_states = self._prompts.hidden_states(self, cache, input_ids, attention_mask, position_ids, kept)
            if hidden_states is not None:
                keeps_cache = self.config.use_cache if use_cache is None else use_cache
                held = cache if keeps_cache or past_key_values is not None else None
                return self.lm_head(self.model.norm(hidden_states)), held
        logits = self._step_logits(*arguments, kwargs)
        if logits is None:
            return None, None
        return logits[:, kept.to(logits.device) if torch.is_tensor(kept) else kept], past_key_values

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
        cache = model_kwargs.get(CACHE_NAME)
        expect_text(cache, input_ids.shape[1], generation_config.max_length)
        processors = RememberingProcessors(logits_processor)
        try:
            return self._sample_remembering(
                input_ids, processors, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        except BaseException:
            keep_next_logits(cache, processors.last)
            raise

    def _sample_remembering(
        self,
        input_ids: torch.LongTensor,
        logits_processor: RememberingProcessors,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool,
        streamer: Any,
        **model_kwargs: Any,
    ) -> Any:
        self._decode.look_again()
        find_step = partial(self._decode.step, self, input_ids.shape[0], 1)
        ours = can_sample_with_steps(generation_config, model_kwargs, synced_gpus)
        step = find_step() if ours and self._reason_for_library_loop() is None else None
        if step is None:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        mask = mask_for_all_steps(model_kwargs.get("attention_mask"), stopping_criteria, step.device)
        forward = partial(self, use_cache=True, return_dict=True)
        return sample_with_steps(
            find_step,
            forward,
            outputs,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            mask,
        )


__all__ = ["KimiGenerationMixin"]
