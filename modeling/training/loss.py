"""The loss of a training step without logits: when it may be taken, and how."""

from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ...kernels.training.linear_cross_entropy import linear_cross_entropy_sum
from ..plain_modules import weights_are_plain


def loss_without_logits(
    model: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, **kwargs: Any
) -> torch.Tensor | None:
    """What `model.loss_function` would say of the logits of `hidden`, or None where it has to see the logits.

    It does for a loss of the user's own, and for a head that is more than its weight (adapters, hooks, a bias, sharded
    or quantised storage, another device).

    Args:
        model: the language model: `lm_head`, `loss_function`.
        hidden: [B, T, hidden_size].
        labels: [B, T] token ids, shifted inside.
        kwargs: those of `ForCausalLMLoss`: num_items_in_batch, ignore_index, shift_labels; others change nothing.
    """
    weight = _plain_weight(model, hidden)
    if weight is None or model.loss_function is not ForCausalLMLoss:
        return None
    ignore_index, shifted = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shifted = shifted.reshape(-1).to(hidden.device)
    if shifted.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"shift_labels must have a label for each of the {hidden.shape[:-1].numel()} tokens, got {shifted.numel()}"
        )
    dtype = torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden) else hidden.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        total = linear_cross_entropy_sum(hidden.flatten(0, -2).to(dtype), weight.to(dtype), shifted, ignore_index)
    counted = kwargs.get("num_items_in_batch")
    if counted is None:
        return total / (shifted != ignore_index).sum()
    return total / (counted.to(total.device) if torch.is_tensor(counted) else counted)


def _autocasts(hidden: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64


def _plain_weight(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    """The head's weight, if the logits are nothing but its product with `hidden`."""
    head = model.lm_head
    if type(head) is not nn.Linear or head.bias is not None or not weights_are_plain((head,), hidden.device):
        return None
    same = head.weight.dtype == hidden.dtype or _autocasts(hidden)
    return head.weight if same and type(head.weight) is nn.Parameter else None


__all__ = ["loss_without_logits"]
