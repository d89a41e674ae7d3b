"""A captured prompt: one CUDA graph over the launches of a `PromptPlan`, which serves every prompt that fits into it.

As a captured decode step it reads and writes the cache's own storage by addresses in device memory. Lengths are data
too, so a new length compiles and captures nothing; a larger one takes the next larger plan.
"""

from functools import partial
from typing import Any

import torch

from ...kernels.gpu.compile_threads import run_in_threads
from ..cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from ..decode.inputs import StepInputs
from .packing import Packing
from .plan import PromptPlan


class PromptGraph:
    """The layers over up to `tokens` packed tokens of up to `sequences` rows.

    On a GPU the launches are captured at construction; elsewhere (Triton's interpreter) they run one by one.

    Args:
        model: a `KimiLinearForCausalLM` whose parameters are plain, of one dtype, on one device.
        tokens: room for tokens, padding left out.
        sequences: room for rows.
    """

    def __init__(self, model: Any, tokens: int, sequences: int) -> None:
        self.plan = PromptPlan(model, tokens, sequences)
        self.device, self.dtype, self.config = self.plan.device, self.plan.dtype, model.config
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done: torch.cuda.Event | None = None
        self._streams: set[int] = set()
        if self.device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        """Record the launches. Without sequences they touch no cache."""
        with torch.cuda.device(self.device):
            run_in_threads(self.device, *self.plan.kinds_of_launches())
            self.plan.launch()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(self.device)  # PyTorch's own capture stream stays on the first GPU that had one
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.plan.launch()
            self._done = torch.cuda.Event()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that pass between launches."""
        return sum(x.nbytes for x in self.plan.buffers())

    def __call__(
        self,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        packing: Packing,
        mask: torch.Tensor | None,
        kept: slice | torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [B, kept, hidden_size] after the last layer; `cache` has seen the tokens afterwards.

        The caller holds whatever keeps others from these buffers, and is in `cache.changing`.

        Args:
            cache: with room for the tokens (`open_cache`).
            input_ids: [B, T] on the plan's device.
            packing: of these tokens.
            mask: bool [B, past + T], dense, on the device, False at padding; None if nothing is.
            kept: of the T positions, those whose hidden states are wanted; zeros where there is padding.
        """
        past, (batch, length) = cache.get_seq_length(), input_ids.shape
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)  # of a run in another stream
        self._hand_over(cache, input_ids, packing, mask)
        places = packing.places(batch, length)[:, kept].to(self.device, torch.int64)
        stream = None if self._done is None else self._stream_of_run()
        try:
            for layer in cache.layers:
                if isinstance(layer, KDACacheLayer):
                    layer.is_changing = True
            if self._graph is None:
                self.plan.launch()
            else:
                self._graph.replay()
            hidden = self.plan.x.index_select(0, places.clamp(min=0).flatten()).view(*places.shape, -1)
        finally:
            if stream is not None:
                self._done.record(stream)
        self._commit(cache, past, length)
        return hidden.masked_fill_((places < 0)[..., None], 0.0) if packing.has_padding else hidden

    def _hand_over(
        self, cache: KimiLinearCache, input_ids: torch.Tensor, packing: Packing, mask: torch.Tensor | None
    ) -> None:
        plan, pinned = self.plan, self.device.type == "cuda"
        numbers = packing.numbers(plan.tokens, plan.sequences)
        numbers = (numbers.pin_memory() if pinned else numbers).to(self.device, non_blocking=True)
        plan.numbers.copy_(numbers[: len(plan.numbers)])
        torch.index_select(input_ids.reshape(-1), 0, numbers[len(plan.numbers) :], out=plan.input_ids)
        table = torch.tensor(self._entries(cache, mask), pin_memory=pinned)
        plan.table.copy_(table.view_as(plan.table), non_blocking=True)

    def _entries(self, cache: KimiLinearCache, mask: torch.Tensor | None) -> list[int]:
        """What the table is to hold, layer by layer."""
        masked = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
        entries: list[int] = []
        for layer in cache.layers:
            if isinstance(layer, KDACacheLayer):
                entries += (layer.state.data_ptr(), layer.window.data_ptr(), 0, 0)
            else:
                entries += (layer.storage.data_ptr(), layer.storage.stride(0), *masked)
        return entries

    def _stream_of_run(self) -> torch.cuda.Stream:
        """The current stream, in which the buffers are in use from now on: a plan may be dropped while it runs."""
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams:
            for buffer in self.plan.buffers():
                buffer.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        return stream

    def _commit(self, cache: KimiLinearCache, past: int, length: int) -> None:
        for layer in cache.layers:
            if layer.get_seq_length() == past:
                layer.advance(length)


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
    like = torch.empty(0, dtype=inputs.dtype, device=inputs.device)
    for layer, module in zip(cache.layers, model.model.layers):
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


__all__ = ["PromptGraph", "open_cache"]
