"""Long prompts in segments: what a prompt needs beside weights and cache stays bounded, however long it is.

Each segment is a forward of its own over the cache that the ones before it left: KDA states, convolution windows and
latents carry everything. Segments are a multiple of KDA's chunk, so the recurrence is cut where it is cut anyway. What
differs from one piece is rounding: attention joins a segment's own keys and those of the cache in fp32, each from an
output rounded to the model's dtype, and matrix products of other shapes may sum in another order.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

from ..cache.kimi_linear_cache import KimiLinearCache
from ..input_checks import check_cache, check_mask, check_mask_values, check_positions, check_token_ids, wants_records
from ..layers.sequence_layout import cu_seqlens_of_restarts
from ..placement import is_spread
from ..transformers_versions import as_argument

# Tokens (times batch) of a segment. At the released shape they take about 4 GiB while they go through a layer, the
# rows gathered for the experts and KDA's tiles above all; fewer would leave each of 256 experts less than 1,024 rows.
SEGMENT_TOKENS = 32768
# The same where the layers are on several GPUs. Each GPU waits while the first segment is on its way to it, or the last
# one has left it: shorter segments make that shorter.
SPREAD_SEGMENT_TOKENS = 16384
# KDA's chunk, and any power of two below.
_MULTIPLE = 64


def segment_bounds(batch_size: int, length: int, segment_tokens: int | None = None) -> list[tuple[int, int]]:
    """(begin, end) of the segments of a prompt: as few as `segment_tokens` allow, of about the same length.

    Equal lengths leave no short rest at the end, which would take another path through attention.

    Args:
        batch_size: rows.
        length: tokens of each.
        segment_tokens: most tokens of a segment, all rows together; None: SEGMENT_TOKENS.
    """
    segment_tokens = SEGMENT_TOKENS if segment_tokens is None else segment_tokens
    most = max(segment_tokens // batch_size // _MULTIPLE, 1) * _MULTIPLE
    count = -(-length // most)
    tokens = -(-length // (count * _MULTIPLE)) * _MULTIPLE
    return [(begin, min(begin + tokens, length)) for begin in range(0, length, tokens)]


def segment_tokens_of(model: Any) -> int:
    """Most tokens of a segment for a `KimiLinearModel`, which may be spread over several devices."""
    return min(SPREAD_SEGMENT_TOKENS, SEGMENT_TOKENS) if is_spread(model) else SEGMENT_TOKENS


def is_cut(model: Any, batch_size: int, length: int) -> bool:
    """Whether a prompt of [batch_size, length] tokens takes a `KimiLinearModel` several segments."""
    if 0 in (batch_size, length):
        return False
    fewest = min(SPREAD_SEGMENT_TOKENS, SEGMENT_TOKENS)  # asked first, since most inputs are shorter than any segment
    if len(segment_bounds(batch_size, length, fewest)) == 1:
        return False
    return len(segment_bounds(batch_size, length, segment_tokens_of(model))) > 1


def takes_segments(
    model: Any,
    tokens: torch.Tensor | None,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    options: dict[str, Any],
) -> bool:
    """Whether a forward is cut into segments: inference over one long prompt a row, of which nothing is recorded.

    Args:
        model: a `KimiLinearModel`; its config may ask for outputs to be recorded.
        tokens: [B, T] ids or [B, T, hidden_size] embeddings.
        attention_mask: [B, cached + T] or None can be cut; others can't.
        position_ids: [B, T]; where they may mark packed sequences, those can't be cut.
        past_key_values: the cache to continue from.
        options: the other keyword arguments of the forward.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or tokens is None or tokens.ndim < 2:
        return False
    if not is_cut(model, *tokens.shape[:2]):
        return False
    if attention_mask is not None and not (torch.is_tensor(attention_mask) and attention_mask.ndim == 2):
        return False
    if options.get("cu_seq_lens_q") is not None or wants_records(options, model.config):
        return False
    may_be_packed = position_ids is not None and attention_mask is None and past_key_values is None
    return not may_be_packed or cu_seqlens_of_restarts(position_ids) is None


class Progress:
    """Reports of finished segments to `report`, if there is one, while the host launches up to two segments more.

    Args:
        report: called with (tokens done, tokens of the prompt).
        length: tokens of the prompt.
    """

    def __init__(self, report: Callable[[int, int], None] | None, length: int) -> None:
        self._report, self._length = report, length
        self._under_way: list[tuple[int, torch.cuda.Event]] = []

    def launched(self, end: int, device: torch.device) -> None:
        """The segment that ends with token `end` is launched, its last layers in the current stream of `device`."""
        if self._report is None:
            return
        if device.type != "cuda":
            self._report(end, self._length)
            return
        self._under_way.append((end, torch.cuda.current_stream(device).record_event()))
        self.wait(2)

    def wait(self, left: int = 0) -> None:
        """Wait until at most `left` segments are under way."""
        while len(self._under_way) > left:
            end, event = self._under_way.pop(0)
            event.synchronize()
            self._report(end, self._length)


def forward_in_segments(
    model: Any,
    *,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    keep_last: int | None,
    prompt_progress: Callable[[int, int], None] | None,
    **kwargs: Any,
) -> MoeModelOutputWithPast:
    """`KimiLinearModel.forward`, segment by segment; arguments as there.

    Everything is checked before the first segment changes the cache.

    Returns:
        As `KimiLinearModel.forward`; `last_hidden_state` is [B, min(keep_last, T), hidden_size].
    """
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    batch_size, length = tokens.shape[:2]
    if input_ids is not None:
        check_token_ids(input_ids, model.config.vocab_size)
    check_positions(position_ids, batch_size, length)
    cache = KimiLinearCache(model.config) if past_key_values is None else past_key_values
    check_cache(cache, model.config, batch_size)
    check_mask(attention_mask, batch_size, length, model._past_length(cache))
    check_mask_values(attention_mask)
    if attention_mask is not None and attention_mask.all():
        attention_mask = None
    if isinstance(cache, KimiLinearCache):
        cache.expect(cache.get_seq_length() + length)
    kept_from = 0 if keep_last is None else max(length - keep_last, 0)
    outputs, progress = [], Progress(prompt_progress, length)
    with cache.taking_tokens("a prompt in segments") if isinstance(cache, KimiLinearCache) else nullcontext():
        for begin, end in segment_bounds(batch_size, length, segment_tokens_of(model)):
            embeds = tokens[:, begin:end]
            if input_ids is not None:  # which would be checked again, and the host would wait for that
                embeds = model.embed_tokens(embeds)
            hidden_states = model.forward(
                inputs_embeds=embeds,
                attention_mask=None
                if attention_mask is None
                else attention_mask[:, : attention_mask.shape[1] - length + end],
                position_ids=None if position_ids is None else position_ids[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                **{**kwargs, "return_dict": True},
            ).last_hidden_state
            if end > kept_from:
                outputs.append(hidden_states[:, max(kept_from - begin, 0) :].clone())
            device = hidden_states.device
            del hidden_states, embeds  # a segment's activations go before the next one's come
            progress.launched(end, device)
        progress.wait()
    returned = cache if use_cache or past_key_values is not None else None
    return MoeModelOutputWithPast(last_hidden_state=torch.cat(outputs, dim=1), **as_argument(returned))


__all__ = ["SEGMENT_TOKENS", "forward_in_segments", "is_cut", "segment_bounds", "takes_segments"]
