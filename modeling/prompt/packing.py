"""How the tokens of a batch lie in a packed prompt: end to end, padding left out.

`x[indices]`, with more than 3,000 of them, and `repeat_interleave` spread over all cores; where others use these, the
call waits 12 ms for 20 us of work, and so does whatever has more than 32,768 elements. `index_select`, `index_copy_`
and `index_add_` of vectors take the caller's thread, and so do the methods of NumPy's arrays.
"""

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
        ends: [B] int32, the position after each row's last valid one; `starts` where it has no new token.
        has_holes: whether a row has padding between these.
        shape: (B, T).
    """

    source: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    has_holes: bool
    shape: tuple[int, int]

    @classmethod
    def of(cls, batch: int, length: int, past: int, mask: torch.Tensor | None) -> "Packing":
        """Packing of `length` new tokens of each row; `mask` is bool [batch, past + length] on the CPU, or None."""
        if mask is None:
            source = torch.arange(batch * length, dtype=torch.int32)
            counts, starts = torch.full((batch,), length), torch.zeros(batch, dtype=torch.int32)
            ends, has_holes = starts + (past + length), False
        else:
            valid = mask.numpy()
            new = valid[:, past:]
            source = torch.from_numpy(new.ravel().nonzero()[0].astype("int32"))
            counts, held = torch.from_numpy(new.sum(axis=1)), torch.from_numpy(valid.sum(axis=1))
            starts = torch.from_numpy(valid.argmax(axis=1)).to(torch.int32)
            ends = (mask.shape[1] - torch.from_numpy(valid[:, ::-1].argmax(axis=1))).to(torch.int32)
            ends = torch.where(counts > 0, ends, starts)
            has_holes = bool((held != ends - starts)[counts > 0].any())
        rows = torch.from_numpy(source.numpy() // length)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
        cu_seqlens[1:] = counts.cumsum(0)
        positions = torch.from_numpy(source.numpy() % length + past)
        return cls(source, rows, positions, cu_seqlens, starts, ends, has_holes, (batch, length))

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.source)

    @property
    def keys(self) -> int:
        """Positions that they see, of all rows together."""
        return int((self.ends - self.starts).sum())

    @property
    def has_padding(self) -> bool:
        """Whether any new position is padding."""
        return self.tokens < self.shape[0] * self.shape[1]

    def of_rows(self, begin: int, end: int) -> "Packing":
        """The packing of rows begin .. end alone."""
        first, last = (int(self.cu_seqlens[i]) for i in (begin, end))
        return Packing(
            source=self.source[first:last] - begin * self.shape[1],
            rows=self.rows[first:last] - begin,
            positions=self.positions[first:last],
            cu_seqlens=self.cu_seqlens[begin : end + 1] - first,
            starts=self.starts[begin:end],
            ends=self.ends[begin:end],
            has_holes=self.has_holes,
            shape=(end - begin, self.shape[1]),
        )

    def row_parts(self, tokens: int, keys: int) -> list[tuple[int, int]]:
        """(begin, end) of successive parts of the rows with at most so many tokens and keys each, or of one row."""
        parts, begin, held = [], 0, (0, 0)
        for row in range(self.shape[0]):
            own = int(self.cu_seqlens[row + 1] - self.cu_seqlens[row]), int(self.ends[row] - self.starts[row])
            held = held[0] + own[0], held[1] + own[1]
            if row > begin and (held[0] > tokens or held[1] > keys):
                parts.append((begin, row))
                begin, held = row, own
        return [*parts, (begin, self.shape[0])]

    def numbers(self, tokens: int, sequences: int, keys: int) -> torch.Tensor:
        """`PromptPlan.numbers` of a plan with room for so much, and `source` after them."""
        n, batch = self.tokens, self.shape[0]
        sizes = [tokens, tokens, sequences + 1, sequences, sequences + 1, keys, keys, tokens]
        numbers = torch.empty(sum(sizes), dtype=torch.int32)
        for part in numbers.split(sizes):
            part.zero_()
        rows, positions, cu_seqlens, starts, key_offsets, key_rows, key_positions, source = numbers.split(sizes)
        rows[:n], positions[:n], source[:n] = self.rows, self.positions, self.source
        rows[n:] = -1
        cu_seqlens[: batch + 1], cu_seqlens[batch + 1 :] = self.cu_seqlens, n
        starts[:batch] = self.starts
        if keys:
            counts = self.ends - self.starts
            key_offsets[1 : batch + 1] = counts.cumsum(0)
            key_offsets[batch + 1 :] = key_offsets[batch]
            seen = _repeated(key_offsets[: batch + 1])
            key_rows[: len(seen)], key_rows[len(seen) :] = seen, -1
            within = torch.arange(len(seen), dtype=torch.int32) - key_offsets.index_select(0, seen)
            key_positions[: len(seen)] = within + self.starts.index_select(0, seen)
        return numbers

    def places(self) -> torch.Tensor:
        """[B, T] int64: where each token went, -1 for padding."""
        places = torch.full((self.shape[0] * self.shape[1],), -1)
        places.index_copy_(0, self.source.long(), torch.arange(self.tokens))
        return places.view(self.shape)


def _repeated(offsets: torch.Tensor) -> torch.Tensor:
    """[offsets[-1]] int32: row i at offsets[i] .. offsets[i + 1]; offsets [rows + 1] int32 begin with 0."""
    steps = torch.zeros(int(offsets[-1]) + 1, dtype=torch.int32)
    steps.index_add_(0, offsets[1:-1], torch.ones_like(offsets[1:-1]))
    return steps[:-1].cumsum(0, dtype=torch.int32)


__all__ = ["Packing"]
