"""
KDA on GPUs with Triton: the chunked forward, as one call per stage. Equations and layouts are in the stages' modules:
kda/index.py (packed sequences), kda/intra.py (inside chunks), kda/inter.py (the pass over chunks).

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t        S [K, V]
    per head, fp32

with g_t = -exp(A_log) softplus(logit + dt_bias), beta_t = sigmoid(logit), q and k divided by sqrt(sum of squares +
1e-6). A gate logit of -inf is no decay and a beta logit of -inf no write: together, a padding token. Any gate is
safe: no exponent is above 120, however strong the gate, and every exponent applied to the state is <= 0. A step's decay
counts for at least 2^-48, and for at least 2^-30 inside the products of a chunk's wild channels; what a chunk leaves of
the state before it counts as nothing below 2^-126.

The ops are torch custom operators with fake implementations, so that compiled graphs pass through them. `chunk_kda` is
differentiable once (backward); the decode step is not, and differentiating through it raises.
"""

from functools import partial

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..gpu.availability import interpreted, is_available, serves
from ..gpu.classes import gpu_of
from ..gpu.compile_threads import compile_side_by_side
from ..gpu.launching import launching_on
from ..gpu.operator_names import operator_namespace
from .backward import differentiate, segment_count, segment_length
from .checks import check_cu_seqlens, check_kda_inputs
from .configs import inter_config, intra_config, step_config
from .index import Segment, kda_index_fwd
from .inter import kda_inter_fwd
from .intra import intra_tiles, kda_intra_fwd
from .step import kda_step_fwd
from .streams import Lanes, runs_beside, segments

_NAMESPACE = operator_namespace("kda", __name__)
# Boundaries of packed sequences whose values were read and found right: tensor -> (version, tokens).
_CHECKED = WeakTensorKeyDictionary()

# Widest head the kernels take: a program holds a head's keys, and in the decode step its whole state, in registers.
MAX_HEAD_DIM = 256


@torch.library.custom_op(f"{_NAMESPACE}::chunk_kda_fwd", mutates_args=())
def _chunk_kda_fwd(
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
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, final states and, for `training`, the states before all segments of the backward but the first."""
    (B, T, H, K), V, device = q.shape, v.shape[-1], q.device
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    o = torch.empty(B, T, H, V, dtype=v.dtype, device=device)
    kept = segment_count(B, T, cu_seqlens is not None) - 1 if training else 0
    state = torch.empty(N, H, K, V, dtype=torch.float32, device=device)
    segment_states = torch.empty(kept, N, H, K, V, dtype=torch.float32, device=device)
    if N * H == 0:
        return o, state, segment_states
    dtype = str(q.dtype).removeprefix("torch.")
    intra = intra_config(gpu_of(device), K, dtype)
    inter = inter_config(gpu_of(device), K, V, dtype)
    C, upcast = intra.C, interpreted() and q.dtype == torch.bfloat16

    first_stage = partial(kda_intra_fwd, q, k, g, beta, A_log, dt_bias, scale=scale, config=intra, upcast=upcast)
    second_stage = partial(kda_inter_fwd, v, o, config=inter, upcast=upcast)

    def compile_for(segment: Segment, tiles: tuple[torch.Tensor, ...]) -> None:
        kind = (device, H, K, V, q.dtype, g.dtype, beta.dtype, v.dtype, A_log.dtype, dt_bias.dtype, cu_seqlens is None)
        given = {"segment": segment, "tiles": tiles, "compile_only": True}
        states = {"state_in": initial_state, "state_out": state}
        compile_side_by_side(kind, device, partial(first_stage, **given), partial(second_stage, **states, **given))

    with launching_on(device):
        if cu_seqlens is not None:
            # Tokens outside every sequence (before the first, after the last) have output 0.
            o.zero_()
            index = (cu_seqlens, *kda_index_fwd(cu_seqlens, T, C))
            chunks = index[-1].numel()
            length = min(chunks, segments(1, T, C, beside=False)[0] // C)  # of a segment, whose tiles the next reuses
            tiles = intra_tiles(q, length, C)
            compile_for(Segment(0, length, index=index), tiles)
            for begin in range(0, max(chunks, 1), max(length, 1)):
                segment = Segment(begin, min(length, chunks - begin), index=index)
                if length > 0:
                    first_stage(segment=segment, tiles=tiles)
                second_stage(state_in=initial_state, state_out=state, segment=segment, tiles=tiles)
            return o, state, segment_states
        beside = runs_beside(device, N * H * -(-V // inter.BV), B * T)
        length, slots = segments(B, T, C, beside)
        if kept > 0:
            length = segment_length(B)
        tiles = intra_tiles(q, min(slots, -(-T // length)) * B * -(-min(length, T) // C), C)
        compile_for(Segment(0, 0), tiles)
        state_in = initial_state
        with Lanes(device, beside, slots) as lanes:
            for i, t_begin in enumerate(range(0, max(T, 1), length)):
                NT, slot = -(-min(length, T - t_begin) // C), i % slots
                segment = Segment(t_begin, NT, first=slot * B * (length // C))
                if NT > 0:
                    lanes.wait_for(slot)
                    first_stage(segment=segment, tiles=tiles)
                state_out = segment_states[i] if i < kept else state
                with lanes.second(slot):
                    second_stage(state_in=state_in, state_out=state_out, segment=segment, tiles=tiles)
                state_in = state_out
    return o, state, segment_states


@_chunk_kda_fwd.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, scale, initial_state, cu_seqlens, training):
    (B, T, H, K), V = q.shape, v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept = segment_count(B, T, cu_seqlens is not None) - 1 if training else 0
    state = v.new_empty(N, H, K, V, dtype=torch.float32)
    return v.new_empty(B, T, H, V), state, v.new_empty(kept, N, H, K, V, dtype=torch.float32)


differentiate(_chunk_kda_fwd)


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Kimi Delta Attention over a prompt, from raw projections (the equations are at the top of this module);
    differentiable once in all of q, k, v, g, beta, A_log, dt_bias and initial_state.

    Args:
        q, k: [B, T, H, K], after their convolutions, not normalised; any strides, T >= 0.
        v: [B, T, H, V].
        g: [B, T, H, K] raw gate logits.
        beta: [B, T, H] raw write-strength logits.
        A_log: H elements.
        dt_bias: H * K elements, head-major.
        scale: of the outputs; K ** -0.5 if None.
        initial_state: [N, H, K, V], or None for zeros; N is B, or the number of packed sequences.
        cu_seqlens: [N + 1] integer boundaries of packed sequences (B must be 1). A GPU's values are read back to be
            checked, once for a tensor, and not in compiled graphs or while a CUDA graph is captured; the kernels read
            them on the device.
        output_final_state: whether to return the state after the last token.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] fp32 or None.

    Raises:
        ValueError: if shapes, dtypes or devices don't fit, cu_seqlens does not rise from 0 to T, or the tensors are on
            a device Triton does not serve.
    """
    check_kda_inputs(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    _check_device(q)
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, got {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise ValueError(f"K and V must be at most {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}")
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu":
        _check_boundaries(cu_seqlens, q.shape[1])
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = q, k, v, g, beta, A_log.reshape(-1), dt_bias.reshape(-1)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, initial_state))
    o, state, _ = _chunk_kda_fwd(*inputs, scale, initial_state, cu_seqlens, training)
    return o, state if output_final_state else None


def _check_boundaries(cu_seqlens: torch.Tensor, T: int) -> None:
    """Read the values back once for a tensor (all layers of a model pass the same), where reading is possible."""
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    # Tensors made in inference mode don't count their changes.
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    if version is None or _CHECKED.get(cu_seqlens) != (version, T):
        check_cu_seqlens(cu_seqlens.cpu(), 1, T)
        _CHECKED[cu_seqlens] = (version, T)


def _check_device(x: torch.Tensor) -> None:
    if not is_available():
        raise ValueError("the Triton kernels need the package triton, which is not installed")
    if not serves(x.device):
        raise ValueError(f"the Triton kernels need tensors on a GPU, got device {x.device}")


@torch.library.custom_op(f"{_NAMESPACE}::kda_step_fwd", mutates_args=("window_q", "window_k", "window_v", "state"))
def _kda_step_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    f: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    weight_q: torch.Tensor,
    weight_k: torch.Tensor,
    weight_v: torch.Tensor,
    window_q: torch.Tensor,
    window_k: torch.Tensor,
    window_v: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    state: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    eps: float,
) -> torch.Tensor:
    (B, H, K, V), T = state.shape, q.shape[1]
    o = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
    if B * T * H > 0:
        weights, windows = (weight_q, weight_k, weight_v), (window_q, window_k, window_v)
        with launching_on(q.device):
            kda_step_fwd(
                q, k, v, f, beta, gate, o, weights=weights, windows=windows, A_log=A_log, dt_bias=dt_bias,
                norm_weight=norm_weight, state=state, lengths=lengths, scale=scale, eps=eps, config=step_config(K, V),
            )  # fmt: skip
    return o


@_kda_step_fwd.register_fake
def _(q, k, v, f, beta, gate, wq, wk, wv, cq, ck, cv, A_log, dt_bias, norm_weight, state, lengths, scale, eps):
    return q.new_empty(q.shape[0], q.shape[1], state.shape[1], state.shape[3])


def kda_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    f: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    *,
    conv_weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    windows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    state: torch.Tensor,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """
    A few tokens (usually one) from cached state, from projections to gated norm in one launch (see kda/step.py).

    To verify a draft, keep a copy of state and windows, take all its tokens, and where some were refused copy back
    and take the accepted ones again: `lengths` says how many of the T tokens each row takes.

    Args:
        q, k, v: [B, T, H * K], [B, T, H * K], [B, T, H * V] projections, before the convolutions; views
            of one packed tensor serve, the last dimension must be dense.
        f: [B, T, H * K] raw gate logits.
        beta: [B, T, H] raw write-strength logits.
        gate: [B, T, H * V] logits of the output gate.
        conv_weights: of q, k, v: [channels, 1, W] or [channels, W] each, tap W - 1 meets the current token.
        windows: of q, k, v: [B, channels, W - 1] each, oldest input first, dense in the last two dimensions (parts of
            one tensor serve); updated in place.
        A_log, dt_bias: H and H * K elements.
        norm_weight, norm_eps: of the gated RMSNorm over V.
        state: [B, H, K, V] fp32, contiguous; updated in place.
        lengths: [B] integer tokens each row takes, 0 for an inactive row (state and windows stay); None for T.
        scale: of the outputs; K ** -0.5 if None.

    Returns:
        y [B, T, H, V] in q's dtype; 0 after a row's length.

    Raises:
        ValueError: if shapes, dtypes, layouts or devices don't fit.
    """
    _check_step(
        q, k, v, f, beta, gate, conv_weights=conv_weights, windows=windows, A_log=A_log, dt_bias=dt_bias,
        norm_weight=norm_weight, state=state, lengths=lengths,
    )  # fmt: skip
    _check_device(q)
    weights = [w.reshape(w.shape[0], w.shape[-1]).contiguous() for w in conv_weights]
    q, k, v, f, beta, gate = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, f, beta, gate))
    scale = state.shape[2] ** -0.5 if scale is None else scale
    return _kda_step_fwd(
        q, k, v, f, beta, gate, *weights, *windows,
        A_log.reshape(-1), dt_bias.reshape(-1), norm_weight, state, lengths, scale, norm_eps,
    )  # fmt: skip


def _check_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    f: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    *,
    conv_weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    windows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    state: torch.Tensor,
    lengths: torch.Tensor | None,
) -> None:
    if state.ndim != 4 or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state must be contiguous fp32 [B, H, K, V], got {state.dtype} {list(state.shape)}")
    if q.ndim != 3 or q.shape[0] != state.shape[0]:
        raise ValueError(f"q must be [B, T, H * K] beside state {list(state.shape)}, got {list(q.shape)}")
    (B, H, K, V), (T, W) = state.shape, (q.shape[1], conv_weights[0].shape[-1])
    if max(K, V) > MAX_HEAD_DIM:
        raise ValueError(f"K and V must be at most {MAX_HEAD_DIM}, got {K} and {V}")
    wanted = {
        "q": (q, H * K),
        "k": (k, H * K),
        "v": (v, H * V),
        "f": (f, H * K),
        "beta": (beta, H),
        "gate": (gate, H * V),
    }
    for name, (x, size) in wanted.items():
        if tuple(x.shape) != (B, T, size):
            raise ValueError(f"{name} must be {[B, T, size]} beside state {list(state.shape)}, got {list(x.shape)}")
    for name, weight, window, size in zip("qkv", conv_weights, windows, (H * K, H * K, H * V)):
        if weight.numel() != size * W or weight.shape[0] != size or weight.shape[-1] != W:
            raise ValueError(f"conv_weights of {name} must be {[size, 1, W]}, got {list(weight.shape)}")
        if tuple(window.shape) != (B, size, W - 1) or window.stride()[1:] != (W - 1, 1):
            raise ValueError(
                f"windows of {name} must be {[B, size, W - 1]}, dense in the last two dimensions, got "
                f"{list(window.shape)} with strides {list(window.stride())}"
            )
    for name, x, size in (("A_log", A_log, H), ("dt_bias", dt_bias, H * K), ("norm_weight", norm_weight, V)):
        if x.numel() != size:
            raise ValueError(f"{name} must have {size} elements, got shape {list(x.shape)}")
    if lengths is not None and (tuple(lengths.shape) != (B,) or lengths.is_floating_point()):
        raise ValueError(f"lengths must be integers [{B}], got {lengths.dtype} {list(lengths.shape)}")
    for x in (k, v, f, beta, gate, *conv_weights, *windows, A_log, dt_bias, norm_weight, state):
        if x.device != q.device:
            raise ValueError(f"all tensors must be on {q.device} as q is, got one on {x.device}")
