"""One entry to KDA: chooses the backend by device, dtype and what is installed, once per call."""

from functools import lru_cache
from typing import Any

import torch

from ..gpu.availability import is_available, is_first_choice, serves
from .operators import MAX_HEAD_DIM, chunk_kda, kda_step
from .torch_compiled import CHUNKED_FROM, kda_torch_fwd
from .torch_forward import chunk_kda_torch, recurrent_kda_torch
from .torch_step import kda_step_torch


@lru_cache(maxsize=1)
def _fla_ops() -> tuple[Any, Any] | None:
    """fla's (chunk_kda, fused_recurrent_kda), or None. Imported on first use on a GPU: fla needs a driver to import."""
    try:
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
    except ImportError:
        return None
    return chunk_kda, fused_recurrent_kda


def resolve_kda_backend(backend: str, x: torch.Tensor, head_dim: int) -> str:
    """The backend that serves an input like `x`: "triton", "fla" or "torch".

    Args:
        backend: "auto" or a backend by name. "auto" is Triton on an NVIDIA GPU (sm_80 and later), for inference and for
            training; else fla on a GPU; and PyTorch for everything else: other devices, float64 or wide heads, missing
            packages, and compiled graphs, which can't trace fla.
        x: q, [B, T, H, K].
        head_dim: the larger of K and V.

    Raises:
        ValueError: for an unknown backend, or one that cannot serve `x`; the message says what would.
    """
    on_gpu = x.device.type == "cuda"
    fits_triton = is_available() and head_dim <= MAX_HEAD_DIM and x.dtype != torch.float64
    compiling = torch.compiler.is_compiling()  # nothing can be asked of the device or of fla then
    if backend == "auto":
        if on_gpu and fits_triton and (compiling or is_first_choice(x.device)):
            return "triton"
        return "fla" if on_gpu and not compiling and _fla_ops() is not None else "torch"
    if backend not in ("triton", "fla", "torch"):
        raise ValueError(f"kda_backend={backend!r} must be one of 'auto', 'triton', 'fla', 'torch'")
    if backend == "triton" and not (fits_triton and serves(x.device)):
        raise ValueError(
            f"kda_backend='triton' needs Triton, a GPU, bf16, fp16 or fp32, and heads of at most {MAX_HEAD_DIM}; "
            f"got device {x.device}, {x.dtype}, heads of {head_dim}; use 'auto'"
        )
    if backend == "fla" and not on_gpu:
        raise ValueError(f"kda_backend='fla' needs tensors on a GPU, got device {x.device}; use 'auto' or 'torch'")
    if backend == "fla" and _fla_ops() is None:
        raise ValueError("kda_backend='fla' needs flash-linear-attention; install it or use 'auto'")
    return backend


def kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention over new tokens, from raw projections.

    Args:
        q, k: [B, T, H, K], after their convolutions, not normalised.
        v: [B, T, H, V].
        g: [B, T, H, K] raw gate logits; the log decay is -exp(A_log) * softplus(g + dt_bias). -inf means no decay.
        beta: [B, T, H] raw logits of the writing strength. -inf means nothing is written.
        A_log: H elements, fp32.
        dt_bias: H * K elements, head-major, fp32.
        initial_state: [N, H, K, V] fp32, or None for zeros; N is B, or the number of packed sequences.
        cu_seqlens: [N + 1] boundaries of packed sequences (B must be 1).
        output_final_state: whether to return the state after the last token.
        backend: see `resolve_kda_backend`.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] fp32 or None.
    """
    inputs = (q, k, v, g, beta, A_log, dt_bias, *(() if initial_state is None else (initial_state,)))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    chosen = resolve_kda_backend(backend, q, max(q.shape[-1], v.shape[-1]))
    if chosen == "fla":
        return _fla_kda(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, output_final_state, needs_grad)
    if chosen == "triton":
        run = chunk_kda
    else:
        if torch.compiler.is_compiling() and q.shape[1] != 1:
            o, state = kda_torch_fwd(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
            return o, state if output_final_state else None
        run = chunk_kda_torch if q.shape[1] >= CHUNKED_FROM else recurrent_kda_torch
    return run(
        q,
        k,
        v,
        g,
        beta,
        A_log=A_log,
        dt_bias=dt_bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
    )


def step_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    f: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor | None,
    *,
    conv_weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    window: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    state: torch.Tensor,
    lengths: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """A few tokens from cached state, one after the other: convolutions, gate, recurrence and gated norm.

    The bits of the state after a token do not depend on the tokens that follow, nor on how calls were split.

    Args:
        q, k, v, f, beta, gate, conv_weights, window, A_log, dt_bias, norm_weight, norm_eps, state, lengths: as
            `kda_step_torch` takes them.
        backend: see `resolve_kda_backend`. PyTorch serves where that says "fla", whose kernels don't promise this, and
            where a gradient is wanted, which the step's kernel doesn't have.

    Returns:
        y [B, T, H, V] (of no use without `gate`), the window and the state: with Triton the tensors that were given,
        updated in place, with PyTorch new ones.
    """
    leaves = (q, k, v, f, beta, *conv_weights, window, A_log, dt_bias, norm_weight, state)
    leaves = leaves if gate is None else (*leaves, gate)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    chosen = resolve_kda_backend(backend, q, max(state.shape[-2:]))
    shared = {"A_log": A_log, "dt_bias": dt_bias, "norm_weight": norm_weight, "norm_eps": norm_eps, "lengths": lengths}
    if chosen != "triton" or needs_grad:
        return kda_step_torch(q, k, v, f, beta, gate, conv_weights=conv_weights, window=window, state=state, **shared)
    # The kernel wants each of the three windows dense, which the thirds of one tensor are for a single row only.
    thirds = window.chunk(3, dim=1)
    windows = tuple(third.contiguous() for third in thirds)
    y = kda_step(
        q, k, v, f, beta, v if gate is None else gate, conv_weights=conv_weights, windows=windows, state=state, **shared
    )
    for third, updated in zip(thirds, windows):
        if not third.is_contiguous():
            third.copy_(updated)
    return y, window, state


def _fla_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    output_final_state: bool,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same through fla >= 0.5.1, gate, beta and l2norm inside its kernels."""
    chunked, recurrent = _fla_ops()
    # fla's recurrent kernel has no backward, and leaves the state of an empty packed sequence unwritten.
    run = recurrent if q.shape[1] == 1 and cu_seqlens is None and not needs_grad else chunked
    return run(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        g=g.contiguous(),
        beta=beta.contiguous(),
        A_log=A_log.float().flatten(),
        dt_bias=dt_bias.float(),
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        cu_seqlens=cu_seqlens,
    )


__all__ = ["kda", "resolve_kda_backend", "step_kda"]
