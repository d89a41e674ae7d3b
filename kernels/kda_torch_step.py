"""The decode step of KDA in plain PyTorch: the twin of `kda_triton.kda_step`, from projections to the gated norm.

Every token is a call of its own on tensors of one shape and layout. An elementwise function may round differently in
vector and in scalar code, and which of the two an element meets depends on the shape it sits in; so only this way do
the bits of the state behind a token not depend on how many tokens came in the same call. Rolling back relies on it.
"""

import torch

from .kda_torch import recurrent_kda_torch
from .short_convolution import causal_short_conv


def kda_step_torch(
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
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """A few tokens from cached state; differentiable, nothing is changed in place.

    Args:
        q, k, v: [B, T, H * K], [B, T, H * K], [B, T, H * V] projections in front of the convolutions.
        f: [B, T, H * K] raw gate logits.
        beta: [B, T, H] raw write-strength logits.
        gate: [B, T, H * V] logits of the output gate, or None where only the state is wanted.
        conv_weights: of q, k, v: [D, 1, W] each, tap W - 1 meets the current token.
        window: [B, 2 H K + H V, W - 1], the last inputs of the three convolutions, oldest first.
        A_log, dt_bias: H and H * K elements.
        norm_weight, norm_eps: of the gated RMSNorm over V.
        state: [B, H, K, V].
        lengths: [B] integer tokens each row takes; None for T.

    Returns:
        y [B, T, H, V] in q's dtype (None without `gate`; of no meaning behind a row's length), the window and the state
        behind each row's tokens.
    """
    (_, heads, key_dim, value_dim), sizes = state.shape, [q.shape[-1], k.shape[-1], v.shape[-1]]
    conv_weight, outputs = torch.cat(conv_weights), []
    for t in range(q.shape[1]):
        x = torch.cat([q[:, t], k[:, t], v[:, t]], dim=-1)[:, None]
        y, new_window = causal_short_conv(x, conv_weight, window=window)
        q_t, k_t, v_t = y.split(sizes, dim=-1)
        o, new_state = recurrent_kda_torch(
            q_t.unflatten(-1, (heads, key_dim)),
            k_t.unflatten(-1, (heads, key_dim)),
            v_t.unflatten(-1, (heads, value_dim)),
            f[:, t : t + 1].unflatten(-1, (heads, key_dim)).contiguous(),
            beta[:, t : t + 1].contiguous(),
            A_log=A_log,
            dt_bias=dt_bias,
            initial_state=state,
            output_final_state=True,
        )
        if lengths is not None:
            active = (lengths > t).view(-1, 1, 1)
            new_window = torch.where(active, new_window, window)
            new_state = torch.where(active[..., None], new_state, state)
        window, state = new_window, new_state
        outputs.append(o)
    if gate is None:
        return None, window, state
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = torch.cat(outputs, dim=1).to(dtype)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + norm_eps)
    y = norm_weight.to(dtype) * o * gate.unflatten(-1, (heads, value_dim)).to(dtype).sigmoid()
    return y.to(q.dtype), window, state


__all__ = ["kda_step_torch"]
