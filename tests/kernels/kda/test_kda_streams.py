"""Segments of an input, their order in two streams, and what is compiled side by side; no GPU is needed."""

import contextlib
import threading

import pytest
import torch

from kimi_linear.kernels.gpu import compile_threads as gpu_compile_threads
from kimi_linear.kernels.kda import streams as lanes

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 8192), (1, 131072), (3, 5000), (7, 12345), (200, 300)])
def test_segments_are_whole_chunks_and_fit(B, T, beside):
    length, slots = lanes.segments(B, T, 32, beside)
    assert length % 32 == 0
    assert length >= 32
    assert slots * B * length <= lanes.WORKSPACE_TOKENS
    if beside and T >= 8192:
        assert -(-T // length) >= 2


class Stream:
    """Notes what it is told, in the one list that the streams of a test share."""

    def __init__(self, name, told):
        self.name, self.told, self.cuda_stream, self.recorded = name, told, 0, 0

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.recorded += 1
        return f"stage 2 of segment {self.recorded - 1}"


def test_a_slot_is_written_when_it_was_read(monkeypatch):
    told = []
    main, side = Stream("main", told), Stream("side", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(lanes, "_side_stream", lambda device, stream: side)
    with lanes.Lanes(GPU, True, 2) as order:
        for i in range(4):
            order.wait_for(i % 2)
            told.append(f"stage 1 of segment {i}")
            with order.second(i % 2):
                told.append(f"stage 2 of segment {i}")
    expected = []
    for i in range(4):
        expected += [f"main waits for stage 2 of segment {i - 2}"] if i >= 2 else []
        expected += [f"stage 1 of segment {i}", "side waits for main", f"stage 2 of segment {i}"]
    assert told == [*expected, "main waits for side"]


@pytest.fixture
def pretended_gpu(monkeypatch):
    capturing = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(gpu_compile_threads, "_COMPILED", set())
    return capturing


def test_kernels_are_compiled_at_the_same_time_and_once(pretended_gpu):
    meet, calls = threading.Barrier(2, timeout=20), []

    def compile_one():
        meet.wait()  # breaks unless the other is compiled meanwhile
        calls.append(1)

    for _ in range(3):
        gpu_compile_threads.compile_side_by_side("kind", GPU, compile_one, compile_one)
    assert len(calls) == 2


def test_nothing_is_compiled_ahead_during_a_capture_or_without_a_gpu(pretended_gpu):
    def fail():
        raise AssertionError

    gpu_compile_threads.compile_side_by_side("kind", torch.device("cpu"), fail)
    pretended_gpu.append(1)
    gpu_compile_threads.compile_side_by_side("kind", GPU, fail)


def test_an_error_of_a_compiler_is_raised_and_not_remembered(pretended_gpu):
    def fail():
        raise RuntimeError("no such instruction")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such instruction"):
            gpu_compile_threads.compile_side_by_side("kind", GPU, fail)


@pytest.mark.parametrize(
    ("programs", "tokens", "expected"), [(64, 8192, True), (66, 8192, True), (67, 8192, False), (64, 8191, False)]
)
def test_stages_run_beside_each_other_where_stage_2_leaves_half_idle(programs, tokens, expected, monkeypatch):
    monkeypatch.setattr(lanes, "_multiprocessors", lambda device: 132)
    assert lanes.runs_beside(GPU, programs, tokens) is expected
    assert not lanes.runs_beside(torch.device("cpu"), programs, tokens)
