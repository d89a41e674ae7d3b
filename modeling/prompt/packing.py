"""How the tokens of a batch lie in a packed prompt: end to end, padding left out."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Where the tokens of [B, T] inputs over a cache of `past` positions go, all on the CPU.

    Attributes:
        source: [n] int32, place of each packed token in the flattened input.
        rows: [n] int32, its row.
        positions: [n] int32, its position in the cache.
        cu_seqlens: [B + 1] int32, where each row's tokens begin and end.
        starts: [B] int32, the first valid position of each row, cached ones included.
        has_padding: whether any new position is padding.
    """

    source: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    starts: torch.Tensor
    has_padding: bool

    @classmethod
    def of(cls, batch: int, length: int, past: int, mask: torch.Tensor | None) -> "Packing":
        """Packing of `length` new tokens of each row; `mask` is bool [batch, past + length] on the CPU, or None."""
        if mask is None:
            source = torch.arange(batch * length, dtype=torch.int32)
            counts, starts = torch.full((batch,), length), torch.zeros(batch, dtype=torch.int32)
        else:
            new = mask[:, past:]
            source = new.flatten().nonzero().flatten().to(torch.int32)
            counts, starts = new.sum(dim=1), mask.to(torch.int8).argmax(dim=1).to(torch.int32)
        rows = source // length
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
        cu_seqlens[1:] = counts.cumsum(0)
        return cls(source, rows, source - rows * length + past, cu_seqlens, starts, len(source) < batch * length)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.source)

    def numbers(self, tokens: int, sequences: int) -> torch.Tensor:
        """`PromptPlan.numbers` of a plan with room for so many tokens and sequences, and `source` after them."""
        n, batch = self.tokens, len(self.starts)
        numbers = torch.zeros(3 * tokens + 2 * sequences + 1, dtype=torch.int32)
        rows, positions, cu_seqlens, starts, source = numbers.split([tokens, tokens, sequences + 1, sequences, tokens])
        rows[:n], positions[:n], source[:n] = self.rows, self.positions, self.source
        rows[n:] = -1
        cu_seqlens[: batch + 1], cu_seqlens[batch + 1 :] = self.cu_seqlens, n
        starts[:batch] = self.starts
        return numbers

    def places(self, batch: int, length: int) -> torch.Tensor:
        """[batch, length] int32: where each token went, -1 for padding."""
        places = torch.full((batch * length,), -1, dtype=torch.int32)
        places[self.source] = torch.arange(self.tokens, dtype=torch.int32)
        return places.view(batch, length)


__all__ = ["Packing"]
