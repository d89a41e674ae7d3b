"""Kimi Delta Attention in plain PyTorch: the chunked form for prompts and training, the recurrence for single tokens.

Per head, with log decays g_t <= 0 and write strength beta_t in [0, 1] (arXiv 2510.26692, eq. 1):

    S_t = Diag(exp(g_t)) S_{t-1} + beta_t k_t (v_t - (Diag(exp(g_t)) S_{t-1})^T k_t)^T,    o_t = S_t^T q_t

The chunked form (eq. 6 to 9) takes C tokens at once. With S the state in front of the chunk, G_i the sum of its gates
up to token i, and all products of tokens i >= j decayed by exp(G_i - G_j):

    L[i, j] = beta_i k_i k_j  (i > j)            U = (I + L)^-1 (beta v)           new = U - W S
    P[i, j] = q_i k_j         (i >= j)           W = (I + L)^-1 (beta k exp(G))    o   = (q exp(G)) S + P new
                                                 S' = Diag(exp(G_C)) S + (k exp(G_C - G))^T new

This model's decay is unbounded below, so exp of a positive sum must not be formed, and neither may G_i - G_j be taken
from two long sums: behind one gate of -2,661 that costs 2e-4 absolute. `_decayed_products` builds L and P by joining
blocks, each decayed towards the border between both by sums of its own gates only, which never rise above zero.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .checks import check_kda_inputs

_NORM_EPS = 1e-6  # added to the sum of squares (docs/checkpoint.md, "Norms")
# Elements of the largest input whose fp32 copies exist at the same time: 512 tokens of 32 heads of 128. Temporaries are
# some 20 such copies (40 with the backward pass), whatever the length of the sequence.
_SEGMENT_ELEMENTS = 512 * 32 * 128

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v, g, beta
_Rule = Callable[[_Inputs, torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _activate(inputs: _Inputs, A_log: torch.Tensor, dt_bias: torch.Tensor, scale: float) -> _Inputs:
    """Raw inputs [B, T, H, .] -> normalised q (scaled) and k, v, log decays and beta, [B, H, T, .] in fp32."""
    dtype, heads, key_dim = _compute_dtype(inputs[0]), *inputs[0].shape[2:]
    q, k, v, g, beta = (x.transpose(1, 2).to(dtype) for x in inputs)
    q = q * (scale * torch.rsqrt(q.square().sum(-1, keepdim=True) + _NORM_EPS))
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + _NORM_EPS)
    g = F.softplus(g + dt_bias.to(dtype).reshape(heads, 1, key_dim))
    return q, k, v, -A_log.to(dtype).reshape(heads, 1, 1).exp() * g, beta.sigmoid()


def _decayed_products(
    a: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Strictly lower triangular A[i, j] = sum_d a_i[d] k_j[d] exp(g_{j+1}[d] + ... + g_i[d]), and the sums of gates.

    Blocks of rows are joined in pairs, log2(C) times. For the pair (early, late), A[late, early] is one product of `a`
    decayed since the border and `k` decayed up to it.

    Args:
        a: [..., C, K], C a power of two.
        k: [..., C, K].
        g: [..., C, K] log decays, none positive.

    Returns:
        A [..., C, C]; g summed up to each row, itself included, and behind each row, both [..., C, K].
    """
    a, k, since = (x.unsqueeze(-2) for x in (a, k, g))  # [..., blocks, rows of a block, K]
    upto = torch.zeros_like(since)
    products = torch.zeros_like(a[..., :1])  # [..., blocks, rows, rows]
    while a.shape[-3] > 1:
        a_late = a.unflatten(-3, (-1, 2))[..., 1, :, :]
        k_early = k.unflatten(-3, (-1, 2))[..., 0, :, :]
        since_early, since_late = since.unflatten(-3, (-1, 2)).unbind(-3)
        upto_early, upto_late = upto.unflatten(-3, (-1, 2)).unbind(-3)
        early, late = products.unflatten(-3, (-1, 2)).unbind(-3)
        below = (a_late * since_late.exp()) @ (k_early * upto_early.exp()).transpose(-1, -2)
        right = torch.cat([torch.zeros_like(below), late], dim=-2)
        products = torch.cat([torch.cat([early, below], dim=-2), right], dim=-1)
        upto = torch.cat([upto_early + since_late[..., -1:, :], upto_late], dim=-2)
        since = torch.cat([since_early, since_late + since_early[..., -1:, :]], dim=-2)
        a, k = (x.unflatten(-3, (-1, 2)).flatten(-3, -2) for x in (a, k))
    return products.squeeze(-3), since.squeeze(-3), upto.squeeze(-3)


def _segment(
    inputs: _Inputs, A_log: torch.Tensor, dt_bias: torch.Tensor, state: torch.Tensor, scale: float, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few chunks from raw inputs [B, T, H, .]: (o [B, T, H, V] in v's dtype, state [B, H, K, V])."""
    length, out_dtype = inputs[0].shape[1], inputs[2].dtype
    q, k, v, g, beta = _activate(inputs, A_log, dt_bias, scale)
    # Zero rows fill the last chunk: they decay nothing and write nothing.
    fill = -length % chunk_size
    q, k, v, g, beta = (
        F.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, chunk_size)) for x in (q, k, v, g, beta[..., None])
    )  # [B, H, chunks, C, .]
    k_beta = k * beta
    within, since, upto = _decayed_products(torch.stack([k_beta, q]), k, g)
    # Both right-hand sides of the WY form in one triangular solve, whose unit diagonal is implied (eq. 7).
    right = torch.cat([k_beta * since.exp(), v * beta], dim=-1)
    solved = torch.linalg.solve_triangular(within[0], right, upper=False, unitriangular=True)
    w, u = solved.split([k.shape[-1], v.shape[-1]], dim=-1)
    q_state, attention = q * since.exp(), within[1] + torch.diag_embed((q * k).sum(-1))
    k_end = (k * upto.exp()).transpose(-1, -2)
    decay = since[..., -1, :, None].exp()
    outputs = []
    for i in range(q.shape[2]):
        new = u[:, :, i] - w[:, :, i] @ state
        outputs.append(q_state[:, :, i] @ state + attention[:, :, i] @ new)
        state = decay[:, :, i] * state + k_end[:, :, i] @ new
    o = torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2)
    return o.to(out_dtype).contiguous(), state


def _chunked(
    inputs: _Inputs, A_log: torch.Tensor, dt_bias: torch.Tensor, state: torch.Tensor, scale: float, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, key_dim = inputs[0].shape
    # Under torch.compile this pins a dynamic length, which the loops below would do piecemeal, in minutes.
    length = len(range(length))
    while chunk_size // 2 >= length:
        chunk_size //= 2
    tokens = _SEGMENT_ELEMENTS // (batch * heads * max(key_dim, inputs[2].shape[-1]))
    tokens = max(tokens // chunk_size, 1) * chunk_size
    if length <= tokens:
        return _segment(inputs, A_log, dt_bias, state, scale, chunk_size)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, A_log, dt_bias, state))
    outputs = []
    # Not slices: the gradient of each would be as long as the sequence.
    for part in zip(*(x.split(tokens, dim=1) for x in inputs)):
        arguments = (part, A_log, dt_bias, state, scale, chunk_size)
        if needs_grad:
            o, state = checkpoint(_segment, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state = _segment(*arguments)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def _stepped(
    inputs: _Inputs, A_log: torch.Tensor, dt_bias: torch.Tensor, state: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, g, beta = _activate(inputs, A_log, dt_bias, scale)
    outputs = []
    for t in range(q.shape[2]):
        state = g[:, :, t, :, None].exp() * state
        change = beta[:, :, t, None] * (v[:, :, t] - (k[:, :, t, None] @ state).squeeze(-2))
        state = state + k[:, :, t, :, None] * change[..., None, :]
        outputs.append(q[:, :, t, None] @ state)
    o = torch.cat(outputs, dim=2).transpose(1, 2)
    return o.to(inputs[2].dtype).contiguous(), state


def _run(
    rule: _Rule,
    inputs: _Inputs,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rule` over every sequence: (o [B, T, H, V], final states [N, H, K, V])."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.cpu()
    check_kda_inputs(*inputs, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    q, _, v, _, _ = inputs
    (B, T, H, K), V, dtype = q.shape, v.shape[-1], _compute_dtype(q)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    scale = K**-0.5 if scale is None else scale
    state = q.new_zeros(N, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if T == 0:
        return torch.zeros_like(v), state.clone()
    with _no_autocast(q.device.type):
        if cu_seqlens is None:
            return rule(inputs, A_log, dt_bias, state, scale)
        lengths = cu_seqlens.diff().tolist()
        states, outputs = list(state.split(1)), []
        for n, part in enumerate(zip(*(x.split(lengths, dim=1) for x in inputs))):
            if lengths[n] > 0:
                o, states[n] = rule(part, A_log, dt_bias, states[n], scale)
                outputs.append(o)
        return torch.cat(outputs, dim=1), torch.cat(states)


def _no_autocast(device_type: str):
    """Autocast would run the products in half precision. Some devices (meta) have no autocast to disable."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def chunk_kda_torch(
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
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KDA over whole sequences, from raw projections; differentiable, exact for any gate.

    Gate, beta, norms, state and all products are fp32 (float64 for float64 inputs), under autocast too. Temporaries do
    not grow with T; training keeps the inputs and one state for each stretch of tokens, and recomputes the rest.

    Args:
        q, k: [B, T, H, K], any strides, T >= 0; not normalised. All five inputs have one dtype.
        v: [B, T, H, V].
        g: [B, T, H, K] raw gate logits: the log decay is -exp(A_log) softplus(g + dt_bias). -inf means no decay.
        beta: [B, T, H] raw logits of the writing strength. -inf means nothing is written.
        A_log: H elements, any shape.
        dt_bias: H * K elements, head-major, any shape.
        scale: of q; None for K^-0.5.
        initial_state: [N, H, K, V], None for zeros; N is B, or the number of packed sequences.
        cu_seqlens: [N + 1] boundaries of packed sequences (B must be 1), which may be empty. Read back from a GPU.
        output_final_state: whether to return the state behind the last token.
        chunk_size: tokens per chunk, a power of two.

    Returns:
        o [B, T, H, V] in v's dtype, contiguous, and the final state [N, H, K, V] in fp32 or None.

    Raises:
        ValueError: if shapes, dtypes, devices, boundaries or the chunk size don't fit.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")

    def rule(inputs, A_log, dt_bias, state, scale):
        return _chunked(inputs, A_log, dt_bias, state, scale, chunk_size)

    o, state = _run(rule, (q, k, v, g, beta), A_log, dt_bias, scale, initial_state, cu_seqlens)
    return o, state if output_final_state else None


def recurrent_kda_torch(
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
    """KDA token by token, for the few tokens of a decoding step; arguments as `chunk_kda_torch`."""
    o, state = _run(_stepped, (q, k, v, g, beta), A_log, dt_bias, scale, initial_state, cu_seqlens)
    return o, state if output_final_state else None


__all__ = ["chunk_kda_torch", "recurrent_kda_torch"]
