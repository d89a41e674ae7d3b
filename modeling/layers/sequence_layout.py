"""Where the tokens of a batch are: padding that recurrent layers must not see, and boundaries of packed sequences."""

from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.kda.checks import check_cu_seqlens


@dataclass(frozen=True)
class PaddingLayout:
    """How to move each row's valid tokens to its front, where a recurrent layer can stop after `lengths`.

    A recurrence has no attention mask: a padding token before or between valid ones would enter the convolution
    windows, and one after them would decay the state. All fields have static shapes, so the layout compiles.

    Attributes:
        order: [B, T] int64, source position of each compacted token.
        inverse: [B, T] int64, compacted position of each source token.
        valid: [B, T] bool, which compacted positions hold a valid token.
        mask: [B, T] bool, which source positions do.
        lengths: [B] int64, valid tokens of each row.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    valid: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> "PaddingLayout":
        """Layout of a [B, T] mask, non-zero where the token is valid; any pattern of holes is allowed."""
        mask = mask.bool()
        order = torch.argsort(~mask, dim=1, stable=True)
        inverse = torch.argsort(order, dim=1)
        lengths = mask.sum(dim=1)
        positions = torch.arange(mask.shape[1], device=mask.device)
        return cls(order, inverse, positions < lengths[:, None], mask, lengths)

    def to(self, device: torch.device) -> "PaddingLayout":
        """The same layout on `device` (layers of a sharded model sit on several)."""
        if self.order.device == device:
            return self
        fields = (self.order, self.inverse, self.valid, self.mask, self.lengths)
        return PaddingLayout(*(field.to(device) for field in fields))

    def compact(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] with each row's valid tokens moved to the front."""
        return x.gather(1, self.order[..., None].expand_as(x))

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] with tokens back in place and zeros where there is padding."""
        return x.gather(1, self.inverse[..., None].expand_as(x)) * self.mask[..., None]


def position_ids_of_packed(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """[1, length] positions that restart at every boundary in `cu_seqlens` [N + 1]."""
    positions = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, positions, right=True) - 1
    return (positions - cu_seqlens[sequence])[None]


def cu_seqlens_of_restarts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Boundaries [N + 1] of the sequences in a [B, T] batch laid end to end, or None if no row is packed.

    A position that doesn't follow its left neighbour starts a sequence, as in transformers' own packing detection
    (masking_utils.find_packed_sequence_indices), so that MLA and KDA layers agree on the boundaries.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    if not starts[:, 1:].any():
        return None
    firsts = starts.flatten().nonzero().flatten()
    return torch.cat([firsts, firsts.new_tensor([position_ids.numel()])])


def packing_of(
    batch_size: int,
    length: int,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Any,
    cu_seq_lens: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Boundaries of packed sequences ([N + 1], or None) and the position ids [B, T] that restart there, if any.

    Args:
        batch_size, length: of the new tokens, B and T.
        attention_mask, position_ids, past_key_values, cu_seq_lens: what the forward got of these, or None.

    Raises:
        ValueError: for boundaries beside a cache or a mask, and for boundaries that don't fit the tokens.
    """
    if cu_seq_lens is not None:
        if past_key_values is not None:
            raise ValueError("packed sequences (cu_seq_lens_q) and past_key_values exclude one another")
        if attention_mask is not None:
            raise ValueError(
                "packed sequences (cu_seq_lens_q) and attention_mask exclude one another: leave out the mask, and "
                "padding too"
            )
        # Read back from a GPU, once a forward: the kernels trust boundaries, and wrong ones would lead them astray.
        on_cpu = cu_seq_lens.cpu() if isinstance(cu_seq_lens, torch.Tensor) else cu_seq_lens
        check_cu_seqlens(on_cpu, batch_size, length, name="cu_seq_lens_q")
        return cu_seq_lens, position_ids_of_packed(cu_seq_lens, length) if position_ids is None else position_ids
    may_be_packed = position_ids is not None and attention_mask is None and past_key_values is None
    # Looking for restarts reads values, which a compiled graph cannot.
    if not may_be_packed or length < 2 or torch.compiler.is_compiling():
        return None, position_ids
    return cu_seqlens_of_restarts(position_ids.expand(batch_size, -1)), position_ids


__all__ = ["PaddingLayout", "cu_seqlens_of_restarts", "packing_of"]
