"""The loop of greedy search and sampling around captured decode steps.

It does what transformers' `GenerationMixin._sample` does with its logits processors and stopping criteria, and
differs in what happens between two steps: the next step is launched before the host knows whether a stopping rule has
fired. The step itself looks: where it has, the cache stays as it is and the result is dropped. So the GPU never waits
for the host, unless a streamer, a logits processor or a stopping rule does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria, StoppingCriteriaList

from ..cache.kimi_linear_cache import KimiLinearCache
from ..transformers_versions import CACHE_NAME, as_argument
from .path import step_mask
from .step import DecodeStep


def can_sample_with_steps(generation_config: Any, model_kwargs: dict[str, Any], synced_gpus: bool) -> bool:
    """Whether `sample_with_steps` does all that is asked."""
    wants_layers = generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    )
    mask = model_kwargs.get("attention_mask")
    plain_mask = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)
    plain_cache = isinstance(model_kwargs.get(CACHE_NAME), KimiLinearCache) and model_kwargs.get("use_cache")
    return plain_mask and plain_cache and not (wants_layers or synced_gpus or generation_config.is_assistant)


def sample_with_steps(
    find_step: Callable[[], DecodeStep | None],
    forward: Callable[..., Any],
    outputs: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    mask: torch.Tensor | None,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Continue from `outputs`, the prompt's; arguments and result are those of `GenerationMixin._sample`.

    Args:
        find_step: gives the step for input_ids.shape[0] sequences of one token, or None once something has been hung on
            the model or changed so that steps can't serve it any more.
        forward: the model, for that case.
        outputs: of the prompt's forward: its last logits and the `KimiLinearCache`.
        input_ids: [B, T], the prompt.
        logits_processor, stopping_criteria, generation_config, streamer: from `generate`.
        mask: of the prompt, as `mask_for_all_steps` gives it.

    Raises:
        RuntimeError: scores that give no probabilities, as from transformers' own loop, only later.
    """
    cache, records = outputs[CACHE_NAME], _Records(generation_config)
    pad = generation_config._pad_token_tensor
    has_eos = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    limits = [criteria for criteria in stopping_criteria if type(criteria) is MaxLengthCriteria]
    rules = StoppingCriteriaList(criteria for criteria in stopping_criteria if criteria not in limits)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    sound = unfinished

    def last_logits(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        if last.device != input_ids.device:
            last = last.to(input_ids.device)  # half as many bytes as in fp32
        return last.to(copy=True, dtype=torch.float32)

    logits = last_logits(outputs.logits)
    del outputs
    while True:
        scores = logits_processor(input_ids, logits)
        records.add(scores, logits)
        if generation_config.do_sample:
            next_tokens, drawn = _draw(scores)
            sound = sound & drawn
        else:
            next_tokens = scores.argmax(dim=-1)
        if has_eos:
            next_tokens = torch.where(unfinished, next_tokens, pad.to(next_tokens.device))
        input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(next_tokens.cpu())
        if _reached(limits, input_ids):
            break
        going_on = None
        if rules:
            unfinished = unfinished & ~rules(input_ids, records.scores)
            going_on = _Answer((unfinished & sound).any())
        active = None if going_on is None else going_on.on_device
        past = cache.get_seq_length()
        if mask is not None:
            mask = _grown(mask, past + 1)
        step = find_step()
        if step is None:
            if going_on is not None and not going_on.read():
                break
            seen = None if mask is None else mask[:, : past + 1]
            logits = last_logits(forward(next_tokens[:, None], attention_mask=seen, **as_argument(cache)).logits)
            continue
        with step.lock, cache.changing("a decode step", partial(step.settle, cache, past, active)):
            step.prepare(cache, next_tokens[:, None], mask, active)
            logits = step.run(last_logits)
            if going_on is not None and not going_on.read():
                step.skip(cache)
                break
            step.commit(cache)
    if generation_config.do_sample:
        _check_draws(sound)
    if streamer is not None:
        streamer.end()
    return records.result(input_ids, cache)


def _reached(limits: list[MaxLengthCriteria], input_ids: torch.Tensor) -> bool:
    """Whether a limit of the length, which the host knows, is reached."""
    length = input_ids.shape[1]
    for limit in limits:
        if limit.max_position_embeddings is not None and length == limit.max_position_embeddings + 1:
            limit(input_ids, None)  # warns that the model was not trained for this
    return any(length >= limit.max_length for limit in limits)


def _draw(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids [B] drawn by the scores [B, vocab_size], bool [B] whether the scores give probabilities).

    Of probabilities p and exponentially distributed e, `torch.multinomial(p, 1)` takes the largest p / e, and waits for
    the device twice to look at p. The largest log p - log e is the same token, but for ties within rounding; it needs
    no softmax, which takes 70 us for one row of 163,840, and a look at the end is enough, as NaN is the largest of all.
    """
    best = (scores - torch.empty_like(scores).exponential_().log_()).max(dim=-1)
    return best.indices, best.values.isfinite()


def _check_draws(sound: torch.Tensor) -> None:
    if not bool(sound.all()):
        rows = (~sound).nonzero().flatten().tolist()
        raise RuntimeError(
            f"there was nothing to sample from in rows {rows}: the logits held NaN or inf, or a logits processor left "
            "no token; look at the weights and their dtype, and at the processors"
        )


class _Answer:
    """A bool on the device that the host reads later, without waiting for what was launched in between."""

    def __init__(self, on_device: torch.Tensor) -> None:
        self.on_device, self._event = on_device, None
        if on_device.is_cuda:
            self._on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._on_host.copy_(on_device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(on_device.device))

    def read(self) -> bool:
        """Wait for the value."""
        if self._event is None:
            return bool(self.on_device)
        self._event.synchronize()
        return bool(self._on_host)


class _Records:
    """What `return_dict_in_generate` collects."""

    def __init__(self, generation_config: Any) -> None:
        self._returns_dict = generation_config.return_dict_in_generate
        self.scores: tuple[torch.Tensor, ...] | None = None
        self.logits: tuple[torch.Tensor, ...] | None = None
        if self._returns_dict and generation_config.output_scores:
            self.scores = ()
        if self._returns_dict and generation_config.output_logits:
            self.logits = ()

    def add(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def result(self, sequences: torch.Tensor, cache: KimiLinearCache) -> torch.Tensor | GenerateDecoderOnlyOutput:
        if not self._returns_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=self.scores, logits=self.logits, **as_argument(cache)
        )


def mask_for_all_steps(
    attention_mask: torch.Tensor | None, stopping_criteria: Any, device: torch.device
) -> torch.Tensor | None:
    """The prompt's mask with room for what is generated, or None if nothing is padding.

    Args:
        attention_mask: [B, cached positions and the prompt], or None.
        stopping_criteria: from `generate`, which may know the longest text.
        device: of the steps' masks.
    """
    if attention_mask is None:
        return None
    _, mask = step_mask(attention_mask.to(device), attention_mask.shape[1])
    return None if mask is None else _grown(mask, max(mask.shape[1] + 256, stopping_criteria.max_length or 0))


def _grown(mask: torch.Tensor, length: int) -> torch.Tensor:
    """`mask` with at least `length` columns, those after it True."""
    if length <= mask.shape[1]:
        return mask
    return torch.nn.functional.pad(mask, (0, max(length - mask.shape[1], 256)), value=True)


__all__ = ["can_sample_with_steps", "mask_for_all_steps", "sample_with_steps"]
