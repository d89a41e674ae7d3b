"""One packed prompt over the cache's own storage: captured as a CUDA graph, or launched from the host.

A captured one serves every prompt that fits into it: lengths and addresses are data, as in a decode step, so a new
length compiles and captures nothing. Graphs of several sizes share one pool of memory, because no two of them run at
the same time. A prompt that is launched from the host is made for its length; it pays where the GPU has more to do than
the host.
"""

from itertools import pairwise
from typing import Any

import torch

from ...kernels.gpu.compile_threads import run_in_threads
from ...kernels.gpu.launching import launching_on
from ..cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from ..decode.hand_over import HandOver
from ..decode.inputs import StepInputs
from ..decode.step_part import capture_stream
from ..placement import device_of_layer
from .packing import Packing
from .plan import PromptPlan


class SharedPool:
    """What the graphs of one model share: memory, the stream of captures, and the end of the last run.

    The next run waits for that end, so that all may use one workspace of cuBLAS's, which belongs to the stream.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.handle = torch.cuda.graph_pool_handle() if on_gpu else None
        self.stream = capture_stream(self, device) if on_gpu else None
        self.done = torch.cuda.Event() if on_gpu else None


class PromptPart:
    """The layers of one device over packed tokens.

    Args:
        plan: with room for them.
        pool: to capture the launches into, once for all runs; None to launch them from the host. Where there is no GPU
            (Triton's interpreter) they are always launched from the host.
    """

    def __init__(self, plan: PromptPlan, pool: SharedPool | None = None) -> None:
        self.plan, self.device = plan, plan.device
        self._pool = pool if plan.device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._mask: torch.Tensor | None = None
        self._streams: set[int] = set()
        if self._pool is not None:
            self._capture()

    def _capture(self) -> None:
        """Record the launches. Without rows they touch no cache."""
        self.plan.x.zero_()
        compile_launches(self.plan)
        with torch.cuda.device(self.device):
            self.plan.launch()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            options = {"pool": self._pool.handle, "stream": self._pool.stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._graph, **options):
                self.plan.launch()

    def hand_over(
        self,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        packing: Packing,
        mask: torch.Tensor | None,
        first_row: int,
    ) -> None:
        """Let the next launch work on these tokens; arguments as `PromptRun.__call__`."""
        if self._pool is not None:
            torch.cuda.current_stream(self.device).wait_event(self._pool.done)  # of a run in another stream
        plan = self.plan
        numbers = to_device(packing.numbers(plan.tokens, plan.sequences, plan.keys or 0), self.device)
        plan.numbers.copy_(numbers[: len(plan.numbers)])
        if plan.span.embeds:
            torch.index_select(input_ids.reshape(-1), 0, numbers[len(plan.numbers) :], out=plan.input_ids)
        self._mask = None if mask is None else mask.to(self.device, non_blocking=True)  # read by its address
        entries = self._entries(cache, self._mask, first_row)
        if not entries:
            return
        table = torch.tensor(entries, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        plan.table.copy_(table.view_as(plan.table), non_blocking=True)

    def _entries(self, cache: KimiLinearCache, mask: torch.Tensor | None, first_row: int) -> list[int]:
        """What the table is to hold, layer by layer."""
        masked = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
        entries: list[int] = []
        for layer in cache.layers[self.plan.span.first : self.plan.span.end]:
            if isinstance(layer, KDACacheLayer):
                entries += (layer.state[first_row:].data_ptr(), layer.window[first_row:].data_ptr(), 0, 0)
            else:
                entries += (layer.storage[first_row:].data_ptr(), layer.storage.stride(0), *masked)
        return entries

    def launch(self) -> None:
        """Run the layers."""
        if self._graph is not None:
            self._graph.replay()
        else:
            with launching_on(self.device):
                self.plan.launch()

    def current_stream(self) -> torch.cuda.Stream | None:
        """The current stream, in which the buffers are in use from now on: a plan may be dropped while it runs."""
        if self._pool is None:
            return None
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams:
            for buffer in self.plan.buffers():
                buffer.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        return stream

    def mark_end(self, stream: torch.cuda.Stream | None) -> None:
        """Let runs in other streams wait for what `stream` has been given so far."""
        if stream is not None:
            self._pool.done.record(stream)


class PromptRun:
    """All layers over packed tokens.

    Args:
        plans: one for each device that has layers, in their order.
        pools: of the plans' devices; None as for `PromptPart`.
    """

    def __init__(self, plans: list[PromptPlan], pools: dict[torch.device, SharedPool] | None = None) -> None:
        self.parts = [PromptPart(plan, None if pools is None else pools[plan.device]) for plan in plans]
        self._hand_overs = [HandOver(a.x, b.x) for a, b in pairwise(plans)]

    @property
    def plan(self) -> PromptPlan:
        """Of the last part, whose hidden states are those of the run."""
        return self.parts[-1].plan

    def __call__(
        self,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        packing: Packing,
        mask: torch.Tensor | None,
        kept: slice | torch.Tensor,
        first_row: int = 0,
    ) -> torch.Tensor:
        """Hidden states [B, kept, hidden_size] after the last layer. The cache holds the tokens afterwards, uncounted.

        The caller holds whatever keeps others from these buffers, and is in `cache.changing`.

        Args:
            cache: with room for the tokens (`open_cache`).
            input_ids: [B, T] on the first plan's device.
            packing: of these tokens.
            mask: bool [B, past + T], dense, False at padding; None if nothing is.
            kept: of the T positions, those whose hidden states are wanted; zeros where there is padding.
            first_row: of these B rows in the cache.
        """
        for part in self.parts:
            part.hand_over(cache, input_ids, packing, mask, first_row)
        places = packing.places()[:, kept.cpu() if isinstance(kept, torch.Tensor) else kept]
        flat = to_device(places.clamp(min=0).flatten(), self.plan.device)
        streams = [part.current_stream() for part in self.parts]
        try:
            for layer in cache.layers:
                if isinstance(layer, KDACacheLayer):
                    layer.is_changing = True
            for i, part in enumerate(self.parts):
                if i > 0:
                    self._hand_overs[i - 1]()
                part.launch()
            hidden = self.plan.x.index_select(0, flat).view(*places.shape, -1)
        finally:
            for part, stream in zip(self.parts, streams):
                part.mark_end(stream)
        padding = places < 0
        return hidden.masked_fill_(padding.to(self.plan.device)[..., None], 0.0) if bool(padding.any()) else hidden


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x`, which is on the CPU, on `device`, without a wait of the host."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def compile_launches(plan: PromptPlan) -> None:
    """Compile all kernels of a plan that has no row yet, several at a time. Waits for the GPU, before and after."""
    with torch.cuda.device(plan.device):
        kinds = plan.kinds_of_launches()
        torch.cuda.synchronize()  # threads launch in streams of their own
        run_in_threads(plan.device, *kinds)
        torch.cuda.synchronize()


def open_cache(cache: KimiLinearCache, inputs: StepInputs, model: Any, length: int, clear: slice | None) -> None:
    """Make room in `cache` for `length` positions in all; an empty one gets zero states, as the first token finds them.

    Args:
        cache: empty, or with tokens of `inputs.batch` rows.
        inputs: the shapes that the plan reads.
        model: whose cache it is.
        length: cached positions and new ones.
        clear: positions whose latent rows become zero, because some of them are padding; None if none is.
    """
    config = model.config
    for layer, module in zip(cache.layers, model.model.layers):
        like = torch.empty(0, dtype=inputs.dtype, device=device_of_layer(module))
        if isinstance(layer, KDACacheLayer):
            layer.weights = module.self_attn.step_weights()
            if layer.state is None:
                heads, K = config.linear_num_heads, config.linear_head_dim
                shapes = (3 * heads * K, config.linear_conv_kernel_dim - 1), (heads, K, K)
                window, state = layer.begin_step(0, inputs.batch, *shapes, like=like)
                layer.lazy_initialization(conv_states=window, recurrent_states=state)
                layer.is_changing = False
            continue
        if layer.storage is None:
            widths = config.kv_lora_rank, config.qk_rope_head_dim
            layer.lazy_initialization(*(like.new_empty(inputs.batch, 1, 0, width) for width in widths))
        layer.reserve(length)
        if clear is not None:
            layer.storage[:, clear] = 0


def commit(cache: KimiLinearCache, past: int, length: int) -> None:
    """Let `cache` count `length` more positions than `past`. Called again after an interruption, it goes on."""
    for layer in cache.layers:
        if layer.get_seq_length() == past:
            layer.advance(length)


__all__ = ["PromptRun", "SharedPool", "commit", "compile_launches", "open_cache"]
