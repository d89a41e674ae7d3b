"""What `generate()` needs of the cache for speculative decoding: drafts that were refused must leave no trace."""

from typing import Any

from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMode

from .cache_kda_layer import KDACacheLayer
from .cache_kimi_linear import KimiLinearCache
from .cache_recording import RECORDED_TOKENS

# Room in the recording of a model that makes drafts, token by token: any draft of up to 480 tokens can be taken back.
_DRAFTER_TOKENS = 1024


def record_for_drafts(cache: Any, generation_config: GenerationConfig, generation_mode: GenerationMode) -> None:
    """Let the cache of a model that verifies or makes drafts record its past; nothing in other generation modes.

    transformers before 5.20 or so doesn't ask for it by itself.

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


__all__ = ["record_for_drafts"]
