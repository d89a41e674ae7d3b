"""Between GPUs: who waits for what. These GPUs are stand-ins that note it; tests/gpu/test_two_gpus.py has real ones."""

from contextlib import contextmanager

import pytest
import torch

from kimi_linear.modeling.decode import hand_over
from kimi_linear.modeling.decode.hand_over import HandOver
from kimi_linear.modeling.prompt import carrying

GPUS = [torch.device("cuda", i) for i in range(2)]


class Stream:
    def __init__(self, device, name=None):
        self.device, self.name = device, name or f"stream {device.index}"
        self.cuda_stream = 100 + device.index

    def wait_event(self, event):
        NOTES.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, stream):
        NOTES.append(f"{self.name} waits for {stream.name}")


class Event:
    def __init__(self):
        self.name = f"event {sum(isinstance(x, Event) for x in MADE)}"
        MADE.append(self)

    def record(self, stream):
        NOTES.append(f"{stream.name} records {self.name}")


class Tensor:
    is_cuda, shape, dtype = True, (1,), torch.float32

    def __init__(self, name, device):
        self.name, self.device = name, device

    def copy_(self, other, non_blocking):
        assert non_blocking
        NOTES.append(f"{current()}: {other.name} to {self.name}")

    def to(self, device, non_blocking):
        assert non_blocking and device != self.device
        NOTES.append(f"{current()}: {self.name} leaves")
        return Tensor("copy", device)

    def record_stream(self, stream):
        NOTES.append(f"{self.name} is used in {stream.name}")


NOTES, MADE, ENTERED = [], [], []


def current():
    return " and ".join(stream.name for stream in ENTERED) or "default"


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    @contextmanager
    def entered(stream):
        ENTERED.append(stream)
        yield
        ENTERED.pop()

    for held in (NOTES, MADE, ENTERED):
        held.clear()
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: Tensor("pinned", torch.device("cpu")))


def test_a_copy_through_the_host_waits_for_the_reader_before_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    move = HandOver(Tensor("source", GPUS[0]), Tensor("target", GPUS[1]))
    move()
    assert NOTES == [
        "stream 0 waits for event 1",
        "stream 0: source to pinned",
        "stream 0 records event 0",
        "stream 1 waits for event 0",
        "stream 1: pinned to target",
        "stream 1 records event 1",
    ]


@pytest.mark.parametrize("target", GPUS)
def test_gpus_that_reach_one_another_copy_at_once(monkeypatch, target):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a != b)
    HandOver(Tensor("source", GPUS[0]), Tensor("target", target))()
    assert NOTES == ["default: source to target"] and hand_over._reaches(*GPUS)


def test_what_is_carried_lets_the_source_go_on(monkeypatch):
    """Only the copy's own streams and the target's wait: never the source's stream for the target's."""
    monkeypatch.setattr(
        carrying, "_streams_between", lambda *_: (Stream(GPUS[0], "leaving"), Stream(GPUS[1], "arriving"))
    )
    with torch.no_grad():
        there = carrying.carried(Tensor("x", GPUS[0]), GPUS[1])
    assert there.device == GPUS[1]
    assert NOTES == [
        "leaving waits for stream 0",
        "leaving and arriving: x leaves",
        "x is used in leaving",
        "stream 1 waits for arriving",
        "copy is used in stream 1",
    ]
