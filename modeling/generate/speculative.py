"""What `generate()` needs of the cache for speculative decoding: drafts that were refused must leave no trace."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMode, PromptLookupCandidateGenerator

from ..cache.kda_layer import KDACacheLayer
from ..cache.kimi_linear_cache import KimiLinearCache
from ..cache.recording import RECORDED_TOKENS

# Room in the recording of a model that makes drafts, token by token: any draft of up to 480 tokens can be taken back.
_DRAFTER_TOKENS = 1024


def record_for_drafts(cache: Any, generation_config: GenerationConfig, generation_mode: GenerationMode) -> None:
    """Let the cache of a model that verifies or makes drafts record its past; nothing in other generation modes.

    transformers before 5.15 doesn't ask for it by itself.

    Raises:
        ValueError: if it is one of transformers' own caches, which can't take tokens back from KDA states.
    """
    if generation_mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant:
        return
    layers = cache.layers if isinstance(cache, Cache) else []
    if any(hasattr(layer, "recurrent_states") and not isinstance(layer, KDACacheLayer) for layer in layers):
        raise ValueError(
            f"speculative decoding takes tokens back, which a {type(cache).__name__} can't do with KDA states: leave "
            "out past_key_values and cache_implementation, or give past_key_values=KimiLinearCache(model.config)"
        )
    if isinstance(cache, KimiLinearCache):
        # Half a recording is kept of a prompt, and prompt lookup appends its first draft to that.
        drafts = generation_config.prompt_lookup_num_tokens or 0
        tokens = _DRAFTER_TOKENS if generation_config.is_assistant else max(RECORDED_TOKENS, 2 * drafts)
        cache.activate_past_recording(tokens)


def expect_whole_prompt(cache: Any, input_ids: torch.Tensor) -> None:
    """Before speculative decoding: transformers gives its first call all tokens, even if the cache holds some of them.

    Args:
        cache: what will be decoded with; `uncached_tokens` asks it what is left to take.
        input_ids: [B, L], the prompt.

    Raises:
        ValueError: if no token is left to take.
    """
    if not isinstance(cache, KimiLinearCache) or cache.get_seq_length() == 0:
        return
    if input_ids.shape[1] <= cache.get_seq_length():
        raise ValueError(
            f"past_key_values holds {cache.get_seq_length()} tokens and input_ids {input_ids.shape[1]}: for "
            "speculative decoding input_ids must be all tokens, the cached ones and at least one more"
        )
    cache.awaits_whole_prompt = True


def uncached_tokens(cache: Any, input_ids: torch.Tensor) -> int | None:
    """How many tokens at the end of `input_ids` [1, L] the first call of speculative decoding has to take.

    None in all other calls, and where the cache was empty.
    """
    if not isinstance(cache, KimiLinearCache) or not cache.awaits_whole_prompt:
        return None
    cache.awaits_whole_prompt = False
    return input_ids.shape[1] - cache.get_seq_length()


def noting_accepted(generator: Any, max_length: int, cache: Any) -> Any:
    """`generator`, whose drafts now note in `cache` how many tokens are accepted when they begin.

    Drafts from the prompt leave room for the token that follows them, too. Those of transformers' other generators do;
    in 5.10 a draft that crosses `max_length` would be accepted beyond it.
    """
    get_candidates = generator.get_candidates
    is_lookup = isinstance(generator, PromptLookupCandidateGenerator)

    def get_noted_candidates(input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(cache, KimiLinearCache):
            cache.accepted_tokens = input_ids.shape[1]
        candidates, logits = get_candidates(input_ids, **kwargs)
        if is_lookup:
            candidates = candidates[:, : max(max_length - 1, input_ids.shape[1])]
        return candidates, logits

    generator.get_candidates = get_noted_candidates
    return generator


def drop_unaccepted(cache: Any) -> None:
    """After an interruption of speculative decoding: leave the accepted tokens but the last, as its end does."""
    if not isinstance(cache, KimiLinearCache):
        return
    cache.awaits_whole_prompt = False
    drafted = cache.get_seq_length() - (cache.accepted_tokens - 1)
    if drafted > 0 and cache.accepted_tokens > 0 and cache.wholeness.is_whole:
        try:
            cache.crop(-drafted)
        except ValueError:  # not recorded; what interrupted is what the caller should see
            cache.wholeness.abandon("speculative decoding")


__all__ = ["drop_unaccepted", "expect_whole_prompt", "noting_accepted", "record_for_drafts", "uncached_tokens"]
