"""Which prompts go through a packed plan, and in which way: the neighbour of decode/path.py."""

import threading
from functools import partial
from typing import Any

import torch

from ...kernels.kda.step import MAX_NEW_TOKENS
from ..cache.kimi_linear_cache import KimiLinearCache
from ..checkpoint.packed_modules import packed_formats
from ..decode.inputs import StepInputs
from ..decode.step import MAX_STEP_TOKENS
from ..input_checks import (
    check_cache,
    check_cache_dtype,
    check_mask,
    check_mask_values,
    check_positions,
    check_token_ids,
    wants_records,
)
from ..placement import LayerSpan, layer_spans
from ..plain_modules import hanging
from .packing import Packing
from .plan import BLOCK_TOKENS, PromptPlan
from .run import PromptRun, SharedPool, commit, compile_launches, open_cache

# Room for tokens of the captured plans: between two of them the padding costs less than the weights that both read.
TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
# Room for rows of the captured plans.
SEQUENCES = (1, 8, 64)
# Pairs of new tokens and positions of a row up to which attention in latent space beats expanding the cache.
MOST_SCORES = 1 << 23
# Tokens of a plan that is launched from the host, and positions that they see: 2 GiB while they go through a layer.
# More rows than that take several plans, one after the other.
PART_TOKENS, PART_KEYS = 16384, 65536
# Positions of a row up to which packed attention serves; longer ones are bound by the GPU, and go layer by layer, where
# attention is cuDNN's.
MOST_POSITIONS = 8192
# Tokens of a batch without padding up to which a plan that is launched from the host serves; more go layer by layer.
# One row on an H100 80 GB, 16 layers, bf16: the plan takes 38.7 / 83.9 ms at 1,500 / 4,096 tokens, the layers 56.5 at
# 4,096, the host's time, which 1,024 tokens take as well: the lines cross near 2,500. 64 rows of 1,024: 640 ms by the
# plan, some 610 by the layers at 76 ms for each 8,192 tokens. A batch with padding takes the plan, which leaves it out.
UNPADDED_TOKENS = 2048


class PromptPath:
    """The packed prompts of one model. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], PromptRun] = {}
        self._pools: dict[torch.device, SharedPool] = {}
        self._compiled: set[bool] = set()
        self._made_from: Any = None
        self._looked_at: Any = None
        self._reason: str | None = None
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptPath":
        return PromptPath()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PromptPath, ()

    def reason(self, model: Any) -> str | None:
        """Why `model` takes prompts layer by layer, or None if packed plans serve it; looks as `DecodePath.reason`.

        Steps may do what packed plans don't, such as adapters, so the modules are asked here too.
        """
        reason = model._decode.reason(model)
        if reason is not None:
            return reason
        with self._lock:
            if self._looked_at is not model._decode.made_from:
                self._reason = _reason_beyond_steps(model)
                self._looked_at = model._decode.made_from
            return self._reason

    def clear(self) -> None:
        """Free graphs and buffers."""
        with self._lock:
            self._runs.clear()
            self._pools.clear()

    def hidden_states(
        self,
        model: Any,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        kept: slice | torch.Tensor,
    ) -> torch.Tensor | None:
        """Hidden states [B, kept, hidden_size] after the last layer, or None where the layers are to run one by one.

        The caller has asked `may_serve`. Errors are those of `KimiLinearModel.forward`.
        """
        batch, length = input_ids.shape
        past, weight = cache.get_seq_length(), model.lm_head.weight
        check_token_ids(input_ids, model.config.vocab_size)
        check_positions(position_ids, batch, length)
        check_cache(cache, model.config, batch)
        check_cache_dtype(cache, weight)
        check_mask(attention_mask, batch, length, past)
        check_mask_values(attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        on_cpu = None if mask is None else mask.cpu()
        if on_cpu is None or bool(on_cpu.numpy().all()):
            mask = on_cpu = None
        packing = Packing.of(batch, length, past, on_cpu)
        inputs = StepInputs(model.config, batch, weight.dtype, layer_spans(model))
        captured = _takes_capture(packing, past + length)
        if packing.tokens == 0 or not (captured or _takes_plan(packing, past + length, weight)):
            return None
        if past > 0 and inputs.misfit(cache) is not None:
            return None
        clear = slice(past, past + length) if packing.has_padding else None
        mask, input_ids = None if mask is None else mask.contiguous(), input_ids.to(inputs.device, torch.int64)
        # Refused before the wait for the lock: a thread that changes the same cache meanwhile would make `past` untrue.
        with cache.changing("a packed prompt", partial(cache.undo, past)), self._lock:
            open_cache(cache, inputs, model, past + length, clear)
            run = self._captured if captured else self._launched
            hidden = run(model, cache, input_ids, packing, mask, kept)
            commit(cache, past, length)
        return hidden

    def _captured(
        self,
        model: Any,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        packing: Packing,
        mask: torch.Tensor | None,
        kept: slice | torch.Tensor,
    ) -> torch.Tensor:
        """By the graph with room for it, captured if need be."""
        if model._decode.made_from is not self._made_from:
            self.clear()
            self._made_from = model._decode.made_from
        spans = _spans(model)
        for span in spans:
            if span.device not in self._pools:
                self._pools[span.device] = SharedPool(span.device)
        key = _room(TOKENS, packing.tokens), _room(SEQUENCES, packing.shape[0])
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = PromptRun([PromptPlan(model, span, *key) for span in spans], self._pools)
        return run(cache, input_ids, packing, mask, kept)

    def _launched(
        self,
        model: Any,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        packing: Packing,
        mask: torch.Tensor | None,
        kept: slice | torch.Tensor,
    ) -> torch.Tensor:
        """From the host, as many rows at a time as `PART_TOKENS` and `PART_KEYS` allow."""
        spans = _spans(model)
        if packing.has_holes not in self._compiled and input_ids.device.type == "cuda":
            for span in spans:
                compile_launches(PromptPlan(model, span, 2 * BLOCK_TOKENS, 1, 64, packing.has_holes))
            self._compiled.add(packing.has_holes)
        hidden = []
        for begin, end in packing.row_parts(PART_TOKENS, PART_KEYS):
            part = packing.of_rows(begin, end)
            if part.tokens == 0:
                positions = len(range(part.shape[1])[kept]) if isinstance(kept, slice) else len(kept)
                shape, like = (end - begin, positions, model.config.hidden_size), model.lm_head.weight
                hidden.append(like.new_zeros(shape, device=spans[-1].device))
                continue
            tokens, keys = (-(-n // 64) * 64 for n in (part.tokens, part.keys))
            size = tokens, end - begin, keys, packing.has_holes
            run = PromptRun([PromptPlan(model, span, *size) for span in spans])
            rows = slice(begin, end)
            hidden.append(run(cache, input_ids[rows], part, None if mask is None else mask[rows], kept, begin))
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)


def _spans(model: Any) -> list[LayerSpan]:
    """The spans that have the embedding or layers."""
    return [span for span in layer_spans(model) if span.embeds or span.first < span.end]


def _room(sizes: tuple[int, ...], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def _takes_capture(packing: Packing, length: int) -> bool:
    """Whether a captured plan is for these tokens, of rows of `length` positions."""
    small = packing.tokens <= TOKENS[-1] and packing.shape[0] <= SEQUENCES[-1]
    return small and packing.tokens * length <= MOST_SCORES * packing.shape[0]


def _takes_plan(packing: Packing, length: int, weight: torch.Tensor) -> bool:
    """Whether a plan launched from the host is for these tokens, of rows of `length` positions, as `weight` is."""
    by_library = weight.dtype == torch.bfloat16 or weight.device.type != "cuda"  # what grouped products take
    pays = packing.has_padding or packing.tokens <= UNPADDED_TOKENS
    return pays and length <= MOST_POSITIONS and by_library


def _is_for_steps(cache: KimiLinearCache | None, input_ids: torch.Tensor) -> bool:
    """Whether decode steps take these tokens in one go: few of each row, over a filled cache."""
    if cache is None or cache.get_seq_length() == 0 or input_ids.shape[1] > MAX_NEW_TOKENS:
        return False
    return input_ids.shape[1] == 1 or input_ids.numel() <= MAX_STEP_TOKENS


def may_serve(
    model: Any,
    cache: Any,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    position_ids: Any,
    kwargs: dict[str, Any],
) -> bool:
    """Whether a forward call with these arguments is a prompt that packed plans may answer, by its form.

    Args:
        model: a `KimiLinearForCausalLM`.
        cache: the one to continue from, or None for a new one.
        input_ids: [B, T].
        attention_mask: [B, cached + T] or None.
        position_ids: [B, T]; where they may mark packed sequences, the layers look at them.
        kwargs: the other arguments of the forward.
    """
    if not (cache is None or (isinstance(cache, KimiLinearCache) and not cache.is_recording)):
        return False
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        return False
    if torch.is_grad_enabled() or input_ids.shape[1] > MOST_POSITIONS or _is_for_steps(cache, input_ids):
        return False
    if attention_mask is None and position_ids is not None and cache is None:
        return False
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        return False
    if kwargs.get("cu_seq_lens_q") is not None or wants_records(kwargs, model.config):
        return False
    model._decode.look_again()  # a new text: there is time for it
    return model._prompts.reason(model) is None


@torch.no_grad()  # as packed plans run, see `_lasting_reason` (decode/path.py)
def _reason_beyond_steps(model: Any) -> str | None:
    """Why `model` takes no prompt by packed plans though it may decode by steps, in words; or None."""
    if formats := packed_formats(model):
        return f"packed weights ({', '.join(formats)}) have no packed prompts yet"
    for name, module in model.named_modules():
        what = None if module is model else hanging(module)
        if what is not None:
            return f"{name} {what}"
    return None


def ways_of_prompts() -> str:
    """What a model does that takes packed plans, in words."""
    return (
        f"packed plans, padding left out: captured up to {TOKENS[-1]} tokens of up to {SEQUENCES[-1]} rows, else "
        f"launched one by one (bf16) for up to {UNPADDED_TOKENS} tokens, with padding for any number in rows of up to "
        f"{MOST_POSITIONS} positions; others, and prompts that the cache records, go layer by layer"
    )


__all__ = ["SEQUENCES", "TOKENS", "PromptPath", "may_serve", "ways_of_prompts"]
