"""Going on with a cache that an earlier `generate()` left, after its end or after an interruption.

An interrupted `generate()` may leave a cache that holds every token that was yielded. Then no token is left to run, and
the next call needs the logits that follow the last one: they are kept with the cache until it changes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import LogitsProcessorList
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from ..cache.kimi_linear_cache import KimiLinearCache
from ..transformers_versions import as_argument


@dataclass(frozen=True)
class NextLogits:
    """Logits [B, vocab_size] that follow the `seen_tokens` positions of a cache."""

    seen_tokens: int
    logits: torch.Tensor


class RememberingProcessors(LogitsProcessorList):
    """The logits processors of one `generate()`, which remember the logits that they were last given."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        super().__init__(processors)
        self.last: NextLogits | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As `LogitsProcessorList`."""
        self.last = NextLogits(input_ids.shape[1], scores.clone())  # processors may write into what they are given
        return super().__call__(input_ids, scores, **kwargs)


def keep_next_logits(cache: Any, last: NextLogits | None) -> None:
    """After an interruption: leave the `last` logits with the cache if they follow what it holds."""
    if isinstance(cache, KimiLinearCache) and last is not None and last.seen_tokens == cache.get_seq_length():
        cache.next_logits = last


def outputs_of_cached_prompt(
    cache: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None, mask_length: int
) -> MoeCausalLMOutputWithPast | None:
    """What `generate()` begins from if the cache holds its whole prompt; None if there are tokens left to run.

    Args:
        cache: of the call, maybe None.
        input_ids: [B, T] given to `generate()`: all tokens, or the new ones only.
        inputs_embeds: [B, T, hidden_size] in place of them, or None.
        mask_length: positions of the attention mask. Where they are T, `input_ids` are all tokens.

    Raises:
        ValueError: if the cache holds more than the prompt, or as much and the logits that follow are not known; or if
            it is not whole.
    """
    if not isinstance(cache, KimiLinearCache):
        return None
    cache.wholeness.check()
    if cache.get_seq_length() == 0:
        return None
    length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
    seen = cache.get_seq_length()
    if length > seen or (inputs_embeds is None and length != mask_length):
        return None
    held = cache.next_logits
    if length == seen and held is not None and held.seen_tokens == seen and held.logits.shape[0] == input_ids.shape[0]:
        return MoeCausalLMOutputWithPast(logits=held.logits[:, None], **as_argument(cache))
    raise ValueError(
        f"the prompt has {length} tokens and past_key_values holds {seen}: nothing is left to run. Give all tokens of "
        "the conversation, the cached ones and at least one more; or take tokens back with "
        f"past_key_values.crop({length - 1}), which needs activate_past_recording() before them; or start again with "
        "past_key_values.reset()"
    )


__all__ = ["NextLogits", "RememberingProcessors", "keep_next_logits", "outputs_of_cached_prompt"]
