"""
Where and when the two stages of the forward run: segment by segment, side by side in two streams where that fills the
GPU.

Stage 2 is sequential over chunks: a prompt of one sequence and 32 heads gives it 64 programs, half of an H200. Stage 1
of the next segment of tokens fills the rest, and the places beside stage 2 on its multiprocessors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

# Tokens (times batch) whose stage-1 tiles are held at once; longer inputs go segment by segment through the same
# memory.
WORKSPACE_TOKENS = 32768
# The same side by side, where tiles of PARTS segments are held at once, each of at least and at most so many tokens.
# Fewer and longer segments leave more of the first stage 1 and the last stage 2 alone, but launches cost the host time.
PARTS = 4
PART_TOKENS = (4096, WORKSPACE_TOKENS // PARTS)


@lru_cache(maxsize=64)
def _side_stream(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The stream for stage 2 beside a caller's stream: two callers in different streams don't meet in it."""
    return torch.cuda.Stream(device, priority=-1)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def runs_beside(device: torch.device, programs: int, tokens: int) -> bool:
    """Whether stages run side by side: stage 2's programs leave half of an NVIDIA GPU idle, and there are two parts."""
    if device.type != "cuda" or torch.version.hip is not None or tokens < 2 * PART_TOKENS[0]:
        return False
    return 2 * programs <= _multiprocessors(device)


def segments(B: int, T: int, C: int, beside: bool) -> tuple[int, int]:
    """(tokens of a segment, a multiple of C; how many segments' tiles are held at once), for B rows of T tokens."""
    if not beside:
        return max(C, WORKSPACE_TOKENS // B // C * C), 1
    tokens = min(max(-(-B * T // PARTS), PART_TOKENS[0]), PART_TOKENS[1])
    return max(C, tokens // B // C * C), PARTS


class Lanes:
    """
    Order between the stages of successive segments, whose tiles take turns in `slots` slots.

    Beside each other, stage 1 runs in the caller's stream and stage 2 in one of higher priority: its programs need more
    room than one of stage 1 leaves behind, so without priority they would wait until all of these have started.
    """

    def __init__(self, device: torch.device, beside: bool, slots: int) -> None:
        self._main = torch.cuda.current_stream(device) if beside else None
        self._side = _side_stream(device, self._main.cuda_stream) if beside else None
        self._free: list[torch.cuda.Event | None] = [None] * slots

    def wait_for(self, slot: int) -> None:
        """Let stage 1 wait until the tiles that were in `slot` are read."""
        if self._free[slot] is not None:
            self._main.wait_event(self._free[slot])

    @contextmanager
    def second(self, slot: int) -> Iterator[None]:
        """Inside, launches are stage 2's of the segment in `slot`, behind the stage 1 launched last."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield
        self._free[slot] = self._side.record_event()

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: Any) -> None:
        """Let the caller's stream wait for everything, also behind an exception: the tensors may go then."""
        if self._side is not None:
            self._main.wait_stream(self._side)
