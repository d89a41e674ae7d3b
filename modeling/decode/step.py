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
from ...kernels.gpu.compile_threads import run_in_threads
from ..cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from ..generate.resume import NextLogits
from .inputs import StepInputs
from .plan import StepPlan

# Most tokens (batch times new tokens) of one graph; larger batches are cut by rows (row_parts.py).
MAX_STEP_TOKENS = 512


class DecodeStep:
    """Logits of `tokens` new tokens for each of `batch` sequences, over a `KimiLinearCache` that has seen some.

    On a GPU the launches are captured at construction; elsewhere (Triton's interpreter) they run one by one.

    Args:
        model: a `KimiLinearForCausalLM` whose parameters are plain, of one dtype, on one device.
        batch: sequences.
        tokens: new tokens of each.
    """

    def __init__(self, model: Any, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        self.config: KimiLinearConfig = model.config
        self.plan = StepPlan(model, batch, tokens)
        self.device, self.dtype = self.plan.device, self.plan.dtype
        self.inputs = StepInputs(self.config, batch, self.dtype, self.device)
        self._streams: set[int] = set()
        self._lock = threading.Lock()
        self._held: tuple[int, ...] | None = None  # what the table holds
        self._past_on_device = -1
        self._past_of_run = -1
        self._was_conditional = False
        self._done: torch.cuda.Event | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            self._capture()

    @property
    def plans(self) -> list[StepPlan]:
        """The step's one plan, as `RowParts` has several."""
        return [self.plan]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that pass between launches."""
        return sum(x.nbytes for x in self.plan.buffers())

    def _capture(self) -> None:
        """Record the launches, on scratch memory in place of a cache."""
        config, B = self.config, self.batch
        K, heads = config.linear_head_dim, config.linear_num_heads
        state = torch.zeros(B, heads, K, K, dtype=torch.float32, device=self.device)
        window = torch.zeros(B, 3 * heads * K, config.linear_conv_kernel_dim - 1, dtype=self.dtype, device=self.device)
        rows = torch.zeros(
            B, self.tokens, config.kv_lora_rank + config.qk_rope_head_dim, dtype=self.dtype, device=self.device
        )
        for i, kind in enumerate(config.layer_types):
            kda = kind == "linear_attention"
            entry = (state.data_ptr(), window.data_ptr(), 0, 0) if kda else (rows.data_ptr(), rows.stride(0), 0, 0)
            self.plan.table[i].copy_(torch.tensor(entry))
        with torch.cuda.device(self.device):
            run_in_threads(self.device, *self.plan.kinds_of_launches())  # in turn they take seven seconds and more
            self.plan.launch()
            self.plan.past.zero_()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(self.device)  # PyTorch's own capture stream stays on the first GPU that had one
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.plan.launch()
            self._done = torch.cuda.Event()

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
        entries = self._entries(cache, mask, past + self.tokens, first_row or 0)
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)  # of a run in another stream
        held = tuple(entries)
        if held != self._held:
            # From pinned memory, or the host would wait for every step launched so far.
            entry = torch.tensor(entries, pin_memory=self.device.type == "cuda")
            self._held = None  # an interruption must not leave it saying what the table held before
            self.plan.table.copy_(entry.view_as(self.plan.table), non_blocking=True)
            self._held = held
        if past != self._past_on_device:
            self._past_on_device = -1
            self.plan.past.fill_(past)
        self._past_on_device = self._past_of_run = past
        if active is not None:
            self._was_conditional = True
            torch.mul(active.expand_as(self.plan.lengths), self.tokens, out=self.plan.lengths)
        elif self._was_conditional:
            self.plan.lengths.fill_(self.tokens)
            self._was_conditional = False
        self.plan.input_ids.copy_(input_ids.reshape(-1))
        for layer in cache.layers:
            if isinstance(layer, KDACacheLayer):
                layer.is_changing = True

    def _entries(self, cache: KimiLinearCache, mask: torch.Tensor | None, length: int, first_row: int) -> list[int]:
        """What the table is to hold, layer by layer, after making room for `length` positions."""
        masked = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
        entries: list[int] = []
        for layer in cache.layers:
            if isinstance(layer, KDACacheLayer):
                state, window = layer.state[first_row:], layer.window[first_row:]
                entries += (state.data_ptr(), window.data_ptr(), *self._recording_entry(layer, first_row))
            else:
                layer.reserve(length)
                entries += (layer.storage[first_row:].data_ptr(), layer.storage.stride(0), *masked)
        return entries

    def _recording_entry(self, layer: KDACacheLayer, first_row: int) -> tuple[int, int]:
        """(address of the first new token in the layer's recording or 0, elements between its sequences)."""
        if not layer.record_past:
            return 0, 0
        layer.prepare_recording(self.tokens)
        recording, heads, K = layer.recording, self.config.linear_num_heads, self.config.linear_head_dim
        recording.allocate(layer.window, layer.window.shape[0], heads * (4 * K + 1))
        return recording.inputs[first_row:, recording.length].data_ptr(), recording.inputs.stride(0)

    def run(self, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> torch.Tensor:
        """`copy` of the logits [batch, tokens, vocab_size] after `prepare`; the next run overwrites the original."""
        self._past_on_device = -1  # until `commit`: an interruption leaves it unknown
        stream = None if self._done is None else self._stream_of_run()
        try:
            if self._graph is None:
                self.plan.launch()
            else:
                self._graph.replay()
            return copy(self.plan.logits.view(self.batch, self.tokens, -1))
        finally:
            if stream is not None:
                self._done.record(stream)  # after the copy: a run in another stream waits for it too

    def _stream_of_run(self) -> torch.cuda.Stream:
        """The current stream, in which the buffers are in use from now on: a step may be dropped while it runs."""
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams:
            for buffer in self.plan.buffers():
                buffer.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        return stream

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
        for layer in cache.layers:
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
        if self._graph is not None and not self._has_run():
            self.skip(cache)  # a graph runs whole or not at all
        return cache.undo(past)

    def _has_run(self) -> bool:
        """Whether what was prepared has run to its end: the last launch counts the tokens on the device."""
        return self._past_of_run >= 0 and int(self.plan.past) == self._past_of_run + self.tokens

    @property
    def lock(self) -> threading.Lock:
        """Held while the step's buffers are in use."""
        return self._lock


__all__ = ["MAX_STEP_TOKENS", "DecodeStep"]
