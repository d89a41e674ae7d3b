"""Segments of an input, and their order in two streams; no GPU is needed."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from kimi_linear.kernels.kda import inter, intra
from kimi_linear.kernels.kda import operators as kda_operators
from kimi_linear.kernels.kda import streams as kda_streams

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 8192), (1, 131072), (3, 5000), (7, 12345), (200, 300)])
def test_segments_are_whole_chunks_and_fit(B, T, beside):
    length, slots = kda_streams.segments(B, T, 32, beside)
    assert length % 32 == 0
    assert length >= 32
    assert slots * B * length <= kda_streams.WORKSPACE_TOKENS
    if beside and T >= 8192:
        assert -(-T // length) >= 2


class Stream:
    """Knows what happened before the point that it has reached: its own launches, and those that it waited for."""

    cuda_stream = 0

    def __init__(self):
        self.past = set()

    def wait_stream(self, other):
        self.past |= other.past

    def wait_event(self, event):
        self.past |= event

    def record_event(self):
        return frozenset(self.past)


@pytest.mark.parametrize("slots", [2, 3])
def test_the_forward_reads_tiles_before_they_are_overwritten(slots, monkeypatch):
    """The operator itself, of six segments, with launches that only note what happened before them."""
    main, side = Stream(), Stream()
    current, before = [main], {}

    @contextlib.contextmanager
    def within(stream):
        current.append(stream)
        yield
        current.pop()

    def launches(stage):
        def run(*args, **options):
            launch = (stage, sum(known == stage for known, _ in before))
            before[launch] = frozenset(current[-1].past)
            current[-1].past.add(launch)

        return run

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(kda_streams, "_side_stream", lambda device, stream: side)
    monkeypatch.setattr(intra.kda_intra_fwd_kernel, "run", launches(1))
    monkeypatch.setattr(inter.kda_inter_fwd_kernel, "run", launches(2))
    monkeypatch.setattr(kda_operators, "_check_device", lambda x: None)
    monkeypatch.setattr(kda_operators, "runs_beside", lambda *args: True)
    monkeypatch.setattr(kda_operators, "segments", lambda B, T, C, beside: (C, slots))
    x = torch.zeros(1, 6 * 32, 1, 16)
    kda_operators.chunk_kda(x, x, x, x, x[..., 0], A_log=torch.zeros(1), dt_bias=torch.zeros(16))
    assert set(before) == {(stage, i) for stage in (1, 2) for i in range(6)}
    for i in range(6):
        assert (1, i) in before[2, i], "stage 2 reads what stage 1 wrote"
        assert i == 0 or (2, i - 1) in before[2, i], "the state goes from segment to segment"
        assert i < slots or (2, i - slots) in before[1, i], "tiles are overwritten after they were read"
        assert i == 0 or (2, i - 1) not in before[1, i], "stage 1 doesn't wait for the stage 2 beside it"
    assert set(before) <= main.past, "the caller's stream waits for everything"


@pytest.mark.parametrize(
    ("programs", "tokens", "expected"), [(64, 8192, True), (66, 8192, True), (67, 8192, False), (64, 8191, False)]
)
def test_stages_run_beside_each_other_where_stage_2_leaves_half_idle(programs, tokens, expected, monkeypatch):
    monkeypatch.setattr(kda_streams, "_multiprocessors", lambda device: 132)
    assert kda_streams.runs_beside(GPU, programs, tokens) is expected
    assert not kda_streams.runs_beside(torch.device("cpu"), programs, tokens)
