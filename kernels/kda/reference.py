"""The oracle: Kimi Delta Attention as the plain recurrence over tokens, all of it in float64.

From the raw projections of one token and head, with x the gate logits and b the beta logit:

    g    = -exp(A_log) softplus(x + dt_bias)             log decay, never positive
    beta = sigmoid(b)
    q, k = q / sqrt(sum q^2 + 1e-6), k / sqrt(sum k^2 + 1e-6)
    S_t  = (I - beta k k^T) Diag(exp(g)) S_{t-1} + beta k v^T        arXiv 2510.26692, eq. 1
    o_t  = S_t^T (scale q)

It is meant to be read beside the paper, and to judge every other path; it shares no code with them.
"""

import torch


def recurrent_kda_reference(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """KDA token by token in float64, differentiable.

    Args:
        q, k: [B, T, H, K], any floating-point dtype, not normalised.
        v: [B, T, H, V].
        g: [B, T, H, K] raw gate logits; -inf means no decay.
        beta: [B, T, H] raw logits of the writing strength; -inf means nothing is written.
        A_log: H elements.
        dt_bias: H * K elements, head-major.
        scale: of q; None for K^-0.5.
        initial_state: [N, H, K, V]; None for zeros. N is B, or the number of packed sequences.
        cu_seqlens: [N + 1] boundaries of packed sequences (B is 1).

    Returns:
        o [B, T, H, V] and the final state [N, H, K, V], both float64.
    """
    q, k, v, g, beta, A_log, dt_bias = (x.double() for x in (q, k, v, g, beta, A_log, dt_bias))
    (B, T, H, K), V = q.shape, v.shape[-1]
    if cu_seqlens is None:
        sequences = [(row, 0, T) for row in range(B)]
    else:
        ends = cu_seqlens.tolist()
        sequences = [(0, ends[n], ends[n + 1]) for n in range(len(ends) - 1)]

    scale = K**-0.5 if scale is None else scale
    q = scale * q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    x = g + dt_bias.reshape(H, K)
    softplus = torch.logaddexp(x, torch.zeros_like(x))  # ln(e^x + e^0)
    alpha = torch.exp(-A_log.reshape(H, 1).exp() * softplus)
    beta = beta.sigmoid()

    outputs, states = [], []
    for n, (row, start, end) in enumerate(sequences):
        S = q.new_zeros(H, K, V) if initial_state is None else initial_state[n].double()
        for t in range(start, end):
            S = alpha[row, t, :, :, None] * S
            error = v[row, t] - torch.einsum("hk,hkv->hv", k[row, t], S)
            S = S + torch.einsum("h,hk,hv->hkv", beta[row, t], k[row, t], error)
            outputs.append(torch.einsum("hk,hkv->hv", q[row, t], S))
        states.append(S)
    o = torch.stack(outputs) if outputs else q.new_zeros(0, H, V)
    final_state = torch.stack(states) if states else q.new_zeros(0, H, K, V)
    return o.reshape(B, T, H, V), final_state
