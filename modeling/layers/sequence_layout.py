"""Where the tokens of a batch are: padding that recurrent layers must not see, and boundaries of packed sequences."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PaddingLayout:
    """How to move each row's valid tokens to its front, where a recurrent layer can stop after `lengths`.

    A recurrence has no attention mask: a padding token in front of or between valid ones would enter the convolution
    windows, and one behind them would decay the state. All fields have static shapes, so the layout compiles.

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


__all__ = ["PaddingLayout", "cu_seqlens_of_restarts", "position_ids_of_packed"]
