"""
KDA on GPUs with Triton: the chunked backward, as one call per stage. Equations are in the stages' modules.

The forward keeps its inputs and, for long prompts, the state before each segment; nothing else. The backward takes the
segments from the last to the first. Of each it computes stage 1 of the forward again (intra), then the states at all
chunks' borders and, in the same launch, their gradients (backward_scan), then chunk by chunk the gradients of the
products inside (backward_pairs) and everything else (backward_rest). benchmarks/kda_backward_notes.md counts the bytes
for which this was chosen.

Seam for context parallelism: a rank that holds a stretch of tokens needs the state before it (`initial_state`) and the
gradient of the state after it (`dstate`), and gives back the state after it and the gradient of the state before it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..gpu.availability import interpreted
from ..gpu.classes import gpu_of
from ..gpu.compile_threads import compile_side_by_side
from ..gpu.launching import launching_on
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded
from .backward_pairs import kda_pairs_bwd
from .backward_rest import kda_rest_bwd
from .backward_scan import kda_scan_bwd
from .configs import CHUNK, intra_config, pairs_config, rest_config, scan_config
from .index import Segment, kda_index_fwd
from .intra import intra_tiles, kda_intra_fwd

_NAMESPACE = operator_namespace("kda", __name__)
# Tokens (times batch) whose tiles and border states the backward holds at once, if they are not packed.
SEGMENT_TOKENS = 8192


def segment_length(B: int) -> int:
    """Tokens of a row that are one segment of the backward, a multiple of the chunk."""
    return max(1, SEGMENT_TOKENS // max(B, 1) // CHUNK) * CHUNK


def segment_count(B: int, T: int, packed: bool) -> int:
    """Segments of the backward of B rows of T tokens, at least one; a pack is one."""
    return 1 if packed else max(1, -(-T // segment_length(B)))


def _workspace(
    q: torch.Tensor, V: int, NC: int, C: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Stage 1's tiles, and for NC chunks the states at their borders, these' gradients, U and `radial` (bwd_pairs)."""
    tiles, H, VP = intra_tiles(q, NC, C), q.shape[2], padded(V)
    dtype, BK = tiles[0].dtype, tiles[0].shape[-1]
    states, dstates = (torch.empty(NC, H, BK, VP, dtype=dtype, device=q.device) for _ in range(2))
    u = torch.empty(NC, H, C, VP, dtype=dtype, device=q.device)
    return tiles, (states, dstates, u, torch.empty(NC, H, 2, C, dtype=torch.float32, device=q.device))


def _gradients(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Room for dq, dk, dv, dg in the tiles' dtype (fp16 lacks their exponents), and dbeta in fp32."""
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    dq, dk, dg = (torch.empty(q.shape, dtype=dtype, device=q.device) for _ in range(3))
    dv = torch.empty(v.shape, dtype=dtype, device=q.device)
    return dq, dk, dv, dg, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _plan(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[list[Segment], int, int]:
    """The segments, the number of all chunks, and that of the largest segment."""
    B, T = q.shape[:2]
    if cu_seqlens is not None:
        index = (cu_seqlens, *kda_index_fwd(cu_seqlens, T, CHUNK))
        NC = index[-1].numel()
        return [Segment(0, NC, index=index)], NC, NC
    length = segment_length(B)
    segments = [Segment(t, -(-min(length, T - t) // CHUNK)) for t in range(0, max(T, 1), length)]
    return segments, B * -(-T // CHUNK), B * segments[0].NT


@torch.library.custom_op(f"{_NAMESPACE}::chunk_kda_bwd", mutates_args=())
def _chunk_kda_bwd(
    do: torch.Tensor,
    dstate: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    o: torch.Tensor,
    segment_states: torch.Tensor,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """Gradients of q, k, v, g, beta, A_log, dt_bias and, in fp32, of the state before the first token [N, H, K, V]."""
    (H, K), (N, V), device = q.shape[2:], (segment_states.shape[1], v.shape[-1]), q.device
    name, gpu, upcast = str(q.dtype).removeprefix("torch."), gpu_of(device), interpreted() and q.dtype == torch.bfloat16
    intra, scan = intra_config(gpu, K, name), scan_config(gpu, K, V, name)
    pairs, rest = pairs_config(gpu, V, name), rest_config(gpu, K, V, name)
    gradients, dstate_in = _gradients(q, v), torch.empty(N, H, K, V, dtype=torch.float32, device=device)
    do = do.contiguous()
    dstate = None if dstate is None else dstate.float().contiguous()

    def stages(
        state: torch.Tensor | None, dstate: torch.Tensor | None, segment: Segment
    ) -> tuple[Callable[..., None], ...]:
        first_sum = q.shape[0] * (segment.t_begin // CHUNK)
        where = {"segment": segment, "tiles": tiles, "upcast": upcast}
        whole = {**where, "borders": borders}
        states = {"state_in": state, "dstate_out": dstate, "dstate_in": dstate_in}
        parts = {**whole, "gradients": gradients}
        return (
            partial(kda_intra_fwd, q, k, g, beta, A_log, dt_bias, scale=scale, config=intra, **where),
            partial(kda_scan_bwd, v, do, dv, config=scan, **states, **whole),
            partial(kda_pairs_bwd, q, k, v, g, A_log, dt_bias, o, do, scale=scale, config=pairs, **parts),
            partial(kda_rest_bwd, q, k, g, A_log, dt_bias, do, sums=sums, first_sum=first_sum, config=rest, **parts),
        )

    with launching_on(device):
        segments, NC, held = _plan(q, cu_seqlens)
        tiles, borders = _workspace(q, V, held, CHUNK)
        sums = tuple(torch.empty(NC, H, n, dtype=torch.float32, device=device) for n in (padded(K) // rest.BK, K))
        dv = gradients[2]
        if N * H > 0:
            kind = ("backward", device, H, K, V, q.dtype, A_log.dtype, dt_bias.dtype, cu_seqlens is None)
            compiles = stages(None, None, segments[0])
            compile_side_by_side(kind, device, *(partial(stage, compile_only=True) for stage in compiles))
        if cu_seqlens is not None:
            # Tokens outside every sequence (before the first, after the last) have no gradient.
            for x in gradients:
                x.zero_()
        for i in reversed(range(len(segments) if N * H > 0 else 0)):
            state = segment_states[i - 1] if i > 0 else initial_state
            intra_stage, scan_stage, *last_stages = stages(state, dstate, segments[i])
            for stage in (intra_stage, scan_stage, *last_stages) if NC > 0 else (scan_stage,):
                stage()
            dstate = dstate_in
        dA_log, ddt_bias = sums[0].sum((0, 2)), sums[1].sum(0).reshape(-1)
    dq, dk, dv, dg, dbeta = (x.to(q.dtype) for x in gradients)
    return dq, dk, dv, dg, dbeta, dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype), dstate_in


@_chunk_kda_bwd.register_fake
def _(do, dstate, q, k, v, g, beta, A_log, dt_bias, scale, initial_state, cu_seqlens, o, segment_states):
    # As new tensors, dense whatever the strides of the inputs are.
    (N, H, K, V), B, T = segment_states.shape[1:], *q.shape[:2]
    dq, dk, dg = (q.new_empty(B, T, H, K) for _ in range(3))
    return (dq, dk, q.new_empty(B, T, H, V), dg, q.new_empty(B, T, H), A_log.new_empty(H), dt_bias.new_empty(H * K),
            segment_states.new_empty(N, H, K, V))  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, g, beta, A_log, dt_bias, ctx.scale, initial_state, cu_seqlens, ctx.training = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, output[0], output[2])


def _backward(
    ctx: Any, do: torch.Tensor | None, dstate: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if not ctx.training:
        raise RuntimeError(
            "chunk_kda_fwd was called without training=True, so the states that its backward needs are gone"
        )
    *inputs, initial_state, cu_seqlens, o, segment_states = ctx.saved_tensors
    do = torch.zeros_like(inputs[2]) if do is None else do
    gradients = _chunk_kda_bwd(do, dstate, *inputs, ctx.scale, initial_state, cu_seqlens, o, segment_states)
    return *gradients[:7], None, None if initial_state is None else gradients[7], None, None


def differentiate(chunk_kda_fwd: Any) -> None:
    """Give the forward's operator, whose inputs and outputs `_setup_context` knows, its backward."""
    chunk_kda_fwd.register_autograd(_backward, setup_context=_setup_context)


__all__ = ["differentiate", "segment_count", "segment_length"]
