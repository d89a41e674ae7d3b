"""The decode step: a few tokens of every sequence through the whole model, as one CUDA graph over few fused kernels.

At batch 1 a step has to read 6.2 GB of weights, 1.4 ms on an H200; everything else is overhead to keep small. So the
projections that share an input are one launch, norms and residual sums are part of their neighbours, MLA stays in
latent space, and the host launches one graph. The graph reads and writes the cache's own storage: addresses and lengths
are in device memory, so it serves every cache, every length, and a cache that moves when it grows.

`plan.py` has the launches. Rounding differs from the layers' own forward in places: a norm's output is not rounded
before its projection, sums are rounded once. Nothing is less precise.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from ..generate.resume import NextLogits
from ..placement import LayerSpan, layer_spans
from .inputs import StepInputs
from .plan import StepPlan
from .step_part import StepPart

# Most tokens (batch times new tokens) of one graph; larger batches are cut by rows (row_parts.py).
MAX_STEP_TOKENS = 512


class DecodeStep:
    """Logits of `tokens` new tokens for each of `batch` sequences, over a `KimiLinearCache` that has seen some.

    On a GPU the launches are captured at construction; elsewhere (Triton's interpreter) they run one by one.

    Args:
        model: a `KimiLinearForCausalLM` whose parameters are plain, of one dtype, each layer's on one device.
        batch: sequences.
        tokens: new tokens of each.

    Attributes:
        parts: one for each `LayerSpan` of the model, in the order of the layers.
        device: of the embedding, where masks belong.
    """

    def __init__(self, model: Any, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        self.config: KimiLinearConfig = model.config
        self.parts = [StepPart(model, batch, tokens, span) for span in layer_spans(model)]
        self.device, self.dtype = self.parts[0].device, self.plan.dtype
        self.inputs = StepInputs(self.config, batch, self.dtype, self.spans)
        self._lock = threading.Lock()
        self._past_on_device = -1
        self._past_of_run = -1

    @property
    def plan(self) -> StepPlan:
        """Of the last part, whose logits are those of the step."""
        return self.parts[-1].plan

    @property
    def plans(self) -> list[StepPlan]:
        """Of all parts."""
        return [part.plan for part in self.parts]

    @property
    def spans(self) -> list[LayerSpan]:
        """Of all parts."""
        return [part.span for part in self.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that pass between launches."""
        return sum(x.nbytes for plan in self.plans for x in plan.buffers())

    def __call__(
        self, cache: KimiLinearCache, input_ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [batch, tokens, vocab_size] of `input_ids` [batch, tokens], which `cache` has seen afterwards.

        `mask` is bool [batch, at least past + tokens], dense in its last dimension, False at padding; the new tokens
        are never padding. It is read when the step runs. Safe to call from several threads.
        """
        undo = partial(self.take_back, cache, cache.get_seq_length())
        with self._lock, cache.changing("a decode step", undo):
            self.prepare(cache, input_ids, mask)
            logits = self.run()
            self.commit(cache)
            return logits

    def prepare(
        self,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        first_row: int | None = None,
    ) -> None:
        """Hand over the inputs of `run`; the caller holds `lock` from here until it has read the logits.

        `commit` or `skip` follows `run`. The caller is in `cache.changing`, whose `undo` is `take_back` or
        `settle`.

        Args:
            cache: with as many sequences as the step.
            input_ids: [batch, tokens].
            mask: as for `__call__`.
            active: a bool scalar on the device: where it turns out False, `run` leaves the cache as it is, `skip` must
                follow, and the logits mean nothing.
            first_row: of the step's rows in a larger `cache`, which the caller has checked (row_parts.py); None where
                the cache has the step's rows.

        Raises:
            ValueError: for a cache or mask whose memory the step would misread; nothing is changed then.
        """
        self._past_of_run = -1
        past = cache.get_seq_length()
        if first_row is None:
            self.inputs.check(cache, mask, past + self.tokens)
        for part in self.parts:
            part.wait()
            part.point_at(cache, mask, past + self.tokens, first_row or 0)
        if past != self._past_on_device:
            self._past_on_device = -1
            for part in self.parts:
                part.plan.past.fill_(past)
        self._past_on_device = self._past_of_run = past
        for part in self.parts:
            part.condition(active)
        self.parts[0].plan.input_ids.copy_(input_ids.reshape(-1))
        for layer in cache.layers:
            if isinstance(layer, KDACacheLayer):
                layer.is_changing = True

    def run(self, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> torch.Tensor:
        """`copy` of the logits [batch, tokens, vocab_size] after `prepare`; the next run overwrites the original."""
        self._past_on_device = -1  # until `commit`: an interruption leaves it unknown
        streams = [part.current_stream() for part in self.parts]
        try:
            self._run_parts(0)
            return copy(self.plan.logits.view(self.batch, self.tokens, -1))
        finally:
            for part, stream in zip(self.parts, streams):
                part.mark_end(stream)  # after the copy: a run in another stream waits for it too

    def _run_parts(self, first: int) -> None:
        """Run the parts from `first` on, each on the hidden state that the one before it left."""
        for i in range(first, len(self.parts)):
            if i > 0:
                self.parts[i].plan.x.copy_(self.parts[i - 1].plan.x, non_blocking=True)
            self.parts[i].run()

    def commit(self, cache: KimiLinearCache) -> None:
        """Let `cache` count the tokens of the last `run`. Called again after an interruption, it goes on."""
        for layer in cache.layers:
            if layer.get_seq_length() != self._past_of_run:
                continue
            if isinstance(layer, KDACacheLayer):
                layer.advance(self.tokens, recorded=layer.record_past)
            else:
                layer.advance(self.tokens)
        self._past_on_device = cache.get_seq_length()

    def skip(self, cache: KimiLinearCache) -> None:
        """In place of `commit`, where the last `run` left `cache` as it was."""
        for part in self.parts:
            self._leave(cache, part.span)

    def _leave(self, cache: KimiLinearCache, span: LayerSpan) -> None:
        """The layers of `span` are as they were before `prepare`."""
        for layer in cache.layers[span.first : span.end]:
            if isinstance(layer, KDACacheLayer):
                layer.is_changing = False

    def settle(self, cache: KimiLinearCache, past: int, active: torch.Tensor | None) -> bool:
        """After an interruption of a loop: count the tokens of a step that ran; else as `take_back`.

        Args:
            cache: which had `past` tokens before `prepare`.
            past: see there.
            active: what `prepare` was given.

        Returns:
            Whether the cache holds what it counts.
        """
        if not self._has_run():
            return self.take_back(cache, past)
        if active is None or bool(active):
            self.commit(cache)
            cache.next_logits = NextLogits(
                cache.get_seq_length(), self.plan.logits.view(self.batch, self.tokens, -1)[:, -1]
            )
        else:
            self.skip(cache)
        return True

    def take_back(self, cache: KimiLinearCache, past: int) -> bool:
        """After a failure: let `cache` have the `past` tokens that it had before `prepare`, if it can (see `undo`)."""
        for part in self.parts:
            if part.runs_whole_or_not and not part.has_run(self._past_of_run):
                self._leave(cache, part.span)
        return cache.undo(past)

    def _has_run(self) -> bool:
        """Whether what was prepared has run to its end."""
        return all(part.has_run(self._past_of_run) for part in self.parts)

    @property
    def lock(self) -> threading.Lock:
        """Held while the step's buffers are in use."""
        return self._lock


__all__ = ["MAX_STEP_TOKENS", "DecodeStep"]
