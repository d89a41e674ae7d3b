"""Threads that compile: on which device, what they raise, and what is compiled side by side; no GPU is needed."""

import contextlib
import threading

import pytest
import torch

from kimi_linear.kernels.gpu import compile_threads as gpu_compile_threads

GPU, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


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


def test_threads_have_the_device_and_their_errors_are_raised(current):
    seen = []
    gpu_compile_threads.run_in_threads(SECOND, lambda: seen.append(1), lambda: seen.append(current[-1]))
    assert sorted(map(str, seen)) == ["1", "cuda:1"]

    def fail():
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        gpu_compile_threads.run_in_threads(SECOND, fail, lambda: seen.append(2))
    assert seen[-1] == 2
