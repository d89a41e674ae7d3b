"""Streams that steps are captured in: one graph each, and used again when it is gone."""

import gc

import torch

from kimi_linear.modeling.decode import step_part


class Part:
    """Stands for a `StepPart`."""


def test_streams_come_back_when_their_parts_are_gone(monkeypatch):
    device, made = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or f"stream {len(made)}")
    monkeypatch.setattr(step_part, "_idle_streams", {})
    first, second = Part(), Part()
    assert step_part.capture_stream(first, device) == "stream 1"
    assert step_part.capture_stream(second, device) == "stream 2"
    del first
    gc.collect()
    third = Part()
    assert step_part.capture_stream(third, device) == "stream 1" and len(made) == 2
    assert step_part.capture_stream(Part(), torch.device("cuda", 1)) == "stream 3"
