"""One device's part of a decode step: its launches as a CUDA graph, and what the graph is told before each run."""

import weakref
from typing import Any

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...kernels.gpu.compile_threads import run_in_threads
from ..cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from ..placement import LayerSpan
from .plan import StepPlan

_idle_streams: dict[torch.device, list[Any]] = {}  # streams whose graphs are gone


class StepPart:
    """The launches of one `LayerSpan` (see `StepPlan`), captured at construction if its device is a GPU.

    Args:
        model, batch, tokens, span: as `StepPlan`.
    """

    def __init__(self, model: Any, batch: int, tokens: int, span: LayerSpan) -> None:
        self.span, self.device = span, span.device
        self.config: KimiLinearConfig = model.config
        self.plan = StepPlan(model, batch, tokens, span)
        self._streams: set[int] = set()
        self._held: tuple[int, ...] | None = None  # what the table holds
        self._mask: torch.Tensor | None = None
        self._was_conditional = False
        self._done: torch.cuda.Event | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            self._capture()

    @property
    def runs_whole_or_not(self) -> bool:
        """Whether an interruption can't come in the middle of the launches."""
        return self._graph is not None

    def _capture(self) -> None:
        """Record the launches, on scratch memory in place of a cache."""
        config, plan = self.config, self.plan
        B, K, heads = plan.batch, config.linear_head_dim, config.linear_num_heads
        state = torch.zeros(B, heads, K, K, dtype=torch.float32, device=self.device)
        window = torch.zeros(B, 3 * heads * K, config.linear_conv_kernel_dim - 1, dtype=plan.dtype, device=self.device)
        rows = torch.zeros(
            B, plan.tokens, config.kv_lora_rank + config.qk_rope_head_dim, dtype=plan.dtype, device=self.device
        )
        for i, kind in enumerate(config.layer_types[self.span.first : self.span.end]):
            kda = kind == "linear_attention"
            entry = (state.data_ptr(), window.data_ptr(), 0, 0) if kda else (rows.data_ptr(), rows.stride(0), 0, 0)
            plan.table[i].copy_(torch.tensor(entry))
        plan.x.zero_()
        with torch.cuda.device(self.device):
            run_in_threads(self.device, *plan.kinds_of_launches())  # in turn they take seven seconds and more
            plan.launch()
            plan.past.zero_()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            stream = capture_stream(self, self.device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                plan.launch()
            self._done = torch.cuda.Event()

    def wait(self) -> None:
        """Let the current stream wait for the end of a run in another one."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)

    def point_at(self, cache: KimiLinearCache, mask: torch.Tensor | None, length: int, first_row: int) -> None:
        """Let the next run work on `cache`, after making room for `length` positions; arguments as `DecodeStep`'s."""
        entries = self._entries(cache, mask, length, first_row)
        if not entries or entries == self._held:
            return
        # From pinned memory, or the host would wait for every step launched so far.
        table = torch.tensor(entries, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._held = None  # an interruption must not leave it saying what the table held before
        self.plan.table.copy_(table.view_as(self.plan.table), non_blocking=True)
        self._held = entries

    def _entries(
        self, cache: KimiLinearCache, mask: torch.Tensor | None, length: int, first_row: int
    ) -> tuple[int, ...]:
        """What the table is to hold, layer by layer."""
        mask = self._mask_here(mask)
        masked = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
        entries: list[int] = []
        for layer in cache.layers[self.span.first : self.span.end]:
            if isinstance(layer, KDACacheLayer):
                state, window = layer.state[first_row:], layer.window[first_row:]
                entries += (state.data_ptr(), window.data_ptr(), *self._recording_entry(layer, first_row))
            else:
                layer.reserve(length)
                entries += (layer.storage[first_row:].data_ptr(), layer.storage.stride(0), *masked)
        return tuple(entries)

    def _mask_here(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """`mask`, or a copy on this device, at the same address as the last one if that had the same shape."""
        if mask is None or mask.device == self.device:
            return mask
        if self._mask is None or self._mask.shape != mask.shape:
            self._mask = torch.empty(mask.shape, dtype=torch.bool, device=self.device)
        return self._mask.copy_(mask, non_blocking=True)

    def _recording_entry(self, layer: KDACacheLayer, first_row: int) -> tuple[int, int]:
        """(address of the first new token in the layer's recording or 0, elements between its sequences)."""
        if not layer.record_past:
            return 0, 0
        layer.prepare_recording(self.plan.tokens)
        recording, heads, K = layer.recording, self.config.linear_num_heads, self.config.linear_head_dim
        recording.allocate(layer.window, layer.window.shape[0], heads * (4 * K + 1))
        return recording.inputs[first_row:, recording.length].data_ptr(), recording.inputs.stride(0)

    def condition(self, active: torch.Tensor | None) -> None:
        """Let the next run leave the cache alone if the bool scalar `active` is False; None: it never does."""
        if active is not None:
            self._was_conditional = True
            here = active.to(self.device, non_blocking=True)
            torch.mul(here.expand_as(self.plan.lengths), self.plan.tokens, out=self.plan.lengths)
        elif self._was_conditional:
            self.plan.lengths.fill_(self.plan.tokens)
            self._was_conditional = False

    def current_stream(self) -> torch.cuda.Stream | None:
        """The current stream, in which the buffers are in use from now on: a step may be dropped while it runs."""
        if self._done is None:
            return None
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams:
            for buffer in self.plan.buffers():
                buffer.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        return stream

    def run(self) -> None:
        """Launch everything."""
        self.plan.fetch()
        if self._graph is None:
            self.plan.launch()
        else:
            self._graph.replay()

    def mark_end(self, stream: torch.cuda.Stream | None) -> None:
        """Let runs in other streams wait for what `stream` has been given so far."""
        if stream is not None:
            self._done.record(stream)

    def has_run(self, past: int) -> bool:
        """Whether a run over `past` positions, -1 for none, came to its end, where tokens are counted on the device."""
        return past >= 0 and int(self.plan.past) == past + self.plan.tokens


def capture_stream(owner: Any, device: torch.device) -> Any:
    """A stream to capture in, which belongs to `owner` as long as that lives.

    cuBLAS keeps a workspace (32 MiB on Hopper) for each stream, and graphs captured in one share it: two that run at
    the same time must not. A new stream for each graph would leave a workspace behind with each graph that is dropped.
    PyTorch's own capture stream stays on the first GPU that had one.
    """
    idle = _idle_streams.setdefault(device, [])
    try:
        stream = idle.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    weakref.finalize(owner, idle.append, stream).atexit = False
    return stream


__all__ = ["StepPart", "capture_stream"]
