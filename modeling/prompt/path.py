"""Which prompts the captured plans answer, and how: the neighbour of decode/path.py."""

import threading
from collections import OrderedDict
from functools import partial
from typing import Any

import torch

from ..cache.kimi_linear_cache import KimiLinearCache
from ..decode.inputs import StepInputs
from ..input_checks import (
    check_cache,
    check_cache_dtype,
    check_mask,
    check_mask_values,
    check_positions,
    check_token_ids,
)
from .graph import PromptGraph, open_cache
from .packing import Packing

# Room for tokens of the captured plans: between two of them the padding costs less than the weights that both read.
TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
# Room for rows.
SEQUENCES = (1, 8, 64)
# Scores of new tokens over cached positions up to which attention in latent space beats expanding the cache.
_MOST_SCORES = 1 << 23
# Bytes of the buffers of the plans that are kept.
_KEPT_BYTES = 1 << 30


class PromptPath:
    """The captured prompts of one model. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[int, int], PromptGraph] = OrderedDict()
        self._made_from: Any = None
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptPath":
        return PromptPath()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PromptPath, ()

    def clear(self) -> None:
        """Free graphs and buffers."""
        with self._lock:
            self._graphs.clear()

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
        past = cache.get_seq_length()
        check_token_ids(input_ids, model.config.vocab_size)
        check_positions(position_ids, batch, length)
        check_cache(cache, model.config, batch)
        check_cache_dtype(cache, model.lm_head.weight)
        check_mask(attention_mask, batch, length, past)
        check_mask_values(attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        on_cpu = None if mask is None else mask.cpu()
        if on_cpu is None or bool(on_cpu.all()):
            mask = on_cpu = None
        packing = Packing.of(batch, length, past, on_cpu)
        inputs = StepInputs(model.config, batch, model.lm_head.weight.dtype, model.lm_head.weight.device)
        if not _fits(packing, batch, past + length) or (past > 0 and inputs.misfit(cache) is not None):
            return None
        clear = slice(past, past + length) if packing.has_padding else None
        mask = None if mask is None else mask.to(inputs.device).contiguous()
        with self._lock, cache.changing("a captured prompt", partial(cache.undo, past)):
            graph = self._graph(model, packing.tokens, batch)
            open_cache(cache, inputs, model, past + length, clear)
            return graph(cache, input_ids.to(inputs.device), packing, mask, kept)

    def _graph(self, model: Any, tokens: int, batch: int) -> PromptGraph:
        key = next(n for n in TOKENS if n >= tokens), next(n for n in SEQUENCES if n >= batch)
        made_from = model._decode.made_from
        if made_from is not self._made_from:
            self._graphs.clear()
            self._made_from = made_from
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = PromptGraph(model, *key)
            while len(self._graphs) > 1 and sum(kept.nbytes for kept in self._graphs.values()) > _KEPT_BYTES:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph


def _fits(packing: Packing, batch: int, length: int) -> bool:
    """Whether a captured plan is for so many tokens and rows over `length` positions."""
    if not 0 < packing.tokens <= TOKENS[-1] or batch > SEQUENCES[-1]:
        return False
    return packing.tokens * length // batch <= _MOST_SCORES


def may_serve(
    model: Any,
    cache: Any,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    position_ids: Any,
    kwargs: dict[str, Any],
) -> bool:
    """Whether a forward call with these arguments is a prompt that captured plans may answer, by its form.

    Args:
        model: a `KimiLinearForCausalLM`.
        cache: the one to continue from, or None for a new one.
        input_ids: [B, T].
        attention_mask: [B, cached + T] or None.
        position_ids: [B, T]; where they may mark packed sequences, the layers look at them.
        kwargs: the other arguments of the forward.
    """
    config = model.config
    if not (cache is None or (isinstance(cache, KimiLinearCache) and not cache.is_recording)):
        return False
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        return False
    if torch.is_grad_enabled() or input_ids.shape[0] > SEQUENCES[-1] or input_ids.numel() > 64 * TOKENS[-1]:
        return False
    if attention_mask is None and (position_ids is not None and cache is None):
        return False
    if attention_mask is None and input_ids.numel() > TOKENS[-1]:
        return False
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        return False
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            return False
    if kwargs.get("cu_seq_lens_q") is not None or getattr(config, "is_causal", None) is False:
        return False
    return model._decode.reason(model) is None


__all__ = ["SEQUENCES", "TOKENS", "PromptPath", "may_serve"]
