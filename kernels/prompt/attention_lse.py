"""Softmax attention that also gives the log of its normaliser, from PyTorch's own kernels, and the joining of parts.

Attention over many keys is attention over blocks of them, joined by their normalisers (arXiv 2112.05682): only one
block of keys and values has to exist at a time.
"""

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention

from ..gpu.availability import fused_path_serves
from .merge_attention import merge_attention_fwd

# Bytes of fp32 scores that exist at a time where PyTorch has no fused kernel.
_SCORE_BYTES = 1 << 28


def attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * query key^T) value, without a backward.

    Args:
        query: [B, H, T, K].
        key: [B, H, L, K]; like the value in the query's dtype, or cast to it.
        value: [B, H, L, V]; V may differ from K.
        causal: whether query t sees keys 0 .. t only; T must be L then.
        scale: of the scores.

    Returns:
        [B, H, T, V] in the query's dtype, and the natural logarithm of the sum of exp(scale * score) of each query,
        [B, H, T] in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: if `causal` is asked for and T and L differ.
    """
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(f"causal attention needs as many keys as queries, got {key.shape[2]} and {query.shape[2]}")
    # The operators below read all three as the query's dtype. Under autocast the others may be of another one.
    key, value = key.to(query.dtype), value.to(query.dtype)
    if query.is_cuda:
        parameters = SDPAParams(query, key, value, None, 0.0, causal, False)
        if can_use_cudnn_attention(parameters):
            output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, causal, False, scale=scale
            )
            return output, lse.reshape(query.shape[:3])
        if can_use_efficient_attention(parameters):
            output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, True, 0.0, causal, scale=scale
            )
            return output, lse[..., : query.shape[2]]  # its rows are padded
    return _written_out(query, key, value, causal, scale)


def _written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with matrix products, a few queries at a time."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = key.to(dtype), value.to(dtype)
    (batch, heads, length), keys = query.shape[:3], key.shape[2]
    tokens = max(1, _SCORE_BYTES // (4 * batch * heads * max(keys, 1)))
    outputs, normalisers = [query.new_empty(batch, heads, 0, value.shape[3])], [key.new_empty(batch, heads, 0)]
    for begin in range(0, length, tokens):
        scores = query[:, :, begin : begin + tokens].to(dtype) @ key.transpose(2, 3) * scale
        if causal:
            scores = scores + scores.new_full(scores.shape[2:], float("-inf")).triu(begin + 1)
        normalisers.append(scores.logsumexp(dim=-1))
        outputs.append((scores.softmax(dim=-1) @ value).to(query.dtype))
    return torch.cat(outputs, dim=2), torch.cat(normalisers, dim=2)


def merge_attention(o: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Join attention over further keys into `o` and `lse`, in place (equations in prompt/merge_attention.py).

    Args:
        o: [B, T, H, V] fp32 (or float64), contiguous: the average over the keys so far.
        lse: [B, H, T] in the same dtype, contiguous: its normaliser, as `attention_with_lse` gives it.
        part, part_lse: the same for further keys; `part` in any floating-point dtype and any strides.
    """
    if o.dtype == torch.float32 and fused_path_serves(o, lse, part, part_lse):
        merge_attention_fwd(o, lse, part, part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    old, new = ((x - total).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))  # [B, T, H, 1]
    o.mul_(old).add_(part * new)
    lse.copy_(total)


__all__ = ["attention_with_lse", "merge_attention"]
