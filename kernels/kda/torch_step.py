"""The decode step of KDA in plain PyTorch: the twin of `kda_step` (kda/operators.py), from
projections to the gated norm.

Every token goes through operators of its own, on tensors of one shape and layout. An elementwise function may round
differently in vector and in scalar code, and which of the two an element meets depends on the shape it sits in; so only
this way do the bits of the state after a token not depend on how many tokens came in the same call. Rolling back
relies on it.
"""

import torch
import torch.nn.functional as F

from .torch_forward import _no_autocast

_NORM_EPS = 1e-6  # added to the sum of squares (docs/checkpoint.md, "Norms")


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
        q, k, v: [B, T, H * K], [B, T, H * K], [B, T, H * V] projections before the convolutions.
        f: [B, T, H * K] raw gate logits.
        beta: [B, T, H] raw write-strength logits.
        gate: [B, T, H * V] logits of the output gate, or None where only the state is wanted.
        conv_weights: of q, k, v: [channels, 1, W] each, tap W - 1 meets the current token.
        window: [B, 2 H K + H V, W - 1], the last inputs of the three convolutions, oldest first.
        A_log, dt_bias: H and H * K elements.
        norm_weight, norm_eps: of the gated RMSNorm over V.
        state: [B, H, K, V].
        lengths: [B] integer tokens each row takes; None for T.

    Returns:
        y [B, T, H, V] in q's dtype (None without `gate`; of no meaning after a row's length), the window and the state
        after each row's tokens.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (B, H, K, V), out_dtype = state.shape, q.dtype
    taps = torch.cat(conv_weights)[:, 0].to(dtype)  # [channels, W]
    decay_rate = -A_log.to(dtype).reshape(H, 1).exp()
    # Copies, conversions and single sums round alike in any shape, so these may take all tokens at once. Tokens go in
    # front, so that one token is dense.
    qkv = torch.cat([q, k, v], dim=-1)[..., None]
    f = f.to(dtype).unflatten(-1, (H, K)) + dt_bias.to(dtype).reshape(H, K)
    f, beta = f.transpose(0, 1).contiguous(), beta.to(dtype).transpose(0, 1)[..., None, None].contiguous()
    outputs = []
    with _no_autocast(q.device.type):
        for t in range(q.shape[1]):
            inputs = torch.cat([window, qkv[:, t]], dim=-1)  # [B, channels, W]
            y = F.silu((inputs * taps).sum(-1))
            if out_dtype != dtype:
                y = y.to(out_dtype).to(dtype)  # rounded as after a prompt
            qk = y[:, : 2 * H * K].view(B, 2, H, K)
            qk = qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + _NORM_EPS)
            q_t, k_t = qk.unsqueeze(3).unbind(1)  # [B, H, 1, K]
            g = decay_rate * F.softplus(f[t])
            decayed = g.exp()[..., None] * state
            change = (y[:, 2 * H * K :].view(B, H, 1, V) - k_t @ decayed) * beta[t].sigmoid()
            new_state = decayed + k_t.transpose(2, 3) * change
            if gate is not None:
                outputs.append(q_t @ new_state)
            new_window = inputs[..., 1:]
            if lengths is not None:
                active = (lengths > t).view(-1, 1, 1)
                new_window = torch.where(active, new_window, window)
                new_state = torch.where(active[..., None], new_state, state)
            window, state = new_window, new_state
    window = window.contiguous()
    if gate is None:
        return None, window, state
    o = torch.cat(outputs, dim=2).transpose(1, 2) * K**-0.5
    y = _gated_norm(o, gate, norm_weight, norm_eps)
    return y.to(out_dtype), window, state


def _gated_norm(o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of o [B, T, H, V] times sigmoid(gate [B, T, H * V]), in o's dtype (arXiv 2510.26692, eq. 10)."""
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps)
    return weight.to(o.dtype) * o * gate.to(o.dtype).unflatten(-1, o.shape[-2:]).sigmoid()


__all__ = ["kda_step_torch"]
