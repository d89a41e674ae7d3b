"""A step for more rows than one graph takes: steps over some of the rows each, one after the other."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from ..cache.kimi_linear_cache import KimiLinearCache
from .inputs import StepInputs
from .plan import StepPlan
from .step import DecodeStep


def row_bounds(batch: int, most: int) -> list[tuple[int, int]]:
    """(begin, end) of as few parts of `batch` rows as have at most `most` rows each, of about the same size."""
    count = -(-batch // most)
    return [(batch * i // count, batch * (i + 1) // count) for i in range(count)]


class RowParts:
    """What `DecodeStep` is, for any number of rows; methods and errors as there.

    Args:
        find_step: gives the `DecodeStep` for so many rows and new tokens.
        batch: sequences.
        tokens: new tokens of each.
        most: rows that one step takes at most.
    """

    def __init__(self, find_step: Callable[[int, int], DecodeStep], batch: int, tokens: int, most: int) -> None:
        self.batch, self.tokens = batch, tokens
        self._bounds = row_bounds(batch, most)
        self._steps = [find_step(end - begin, tokens) for begin, end in self._bounds]
        first = self._steps[0]
        self.device, self.inputs = first.device, StepInputs(first.config, batch, first.dtype, first.spans)
        self._given: tuple[KimiLinearCache, torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None = None
        self._has_run = False

    @property
    def plans(self) -> list[StepPlan]:
        """Of the parts."""
        return [plan for step in self._steps for plan in step.plans]

    @property
    def lock(self) -> AbstractContextManager[None]:
        """Held while the buffers of any part are in use."""
        return self._locked()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        locks = {id(step): step.lock for step in self._steps}
        with ExitStack() as held:
            for key in sorted(locks):  # in one order everywhere, so that two threads don't wait for each other
                held.enter_context(locks[key])
            yield

    def __call__(
        self, cache: KimiLinearCache, input_ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [batch, tokens, vocab_size], as `DecodeStep.__call__`."""
        with self.lock, cache.taking_tokens("a decode step"):
            self.prepare(cache, input_ids, mask)
            logits = self.run()
            self.commit(cache)
            return logits

    def prepare(
        self,
        cache: KimiLinearCache,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
    ) -> None:
        """Check and keep the inputs of `run`, as `DecodeStep.prepare`."""
        self.inputs.check(cache, mask, cache.get_seq_length() + self.tokens)
        self._given, self._has_run = (cache, input_ids, mask, active), False

    def run(self, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> torch.Tensor:
        """`copy` of the logits [batch, tokens, vocab_size]."""
        cache, input_ids, mask, active = self._given
        logits = []
        for step, (begin, end) in zip(self._steps, self._bounds):
            part = None if mask is None else mask[begin:end]
            step.prepare(cache, input_ids[begin:end], part, active, first_row=begin)
            logits.append(step.run(copy))
        self._has_run = True
        return torch.cat(logits)

    def commit(self, cache: KimiLinearCache) -> None:
        """Let `cache` count the tokens of the last `run`."""
        self._steps[-1].commit(cache)

    def skip(self, cache: KimiLinearCache) -> None:
        """In place of `commit`, where the last `run` left `cache` as it was."""
        self._steps[-1].skip(cache)

    def settle(self, cache: KimiLinearCache, past: int, active: torch.Tensor | None) -> bool:
        """After an interruption of a loop: count the tokens if all parts ran, else take them back if they are recorded.

        Arguments and result are those of `DecodeStep.settle`.
        """
        if not self._has_run:
            return cache.undo(past)
        if active is None or bool(active):
            self.commit(cache)
        else:
            self.skip(cache)
        return True


__all__ = ["RowParts", "row_bounds"]
