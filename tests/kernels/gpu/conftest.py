import contextlib

import pytest
import torch


@pytest.fixture
def current(monkeypatch):
    """The devices that were made current, innermost last."""
    devices = []

    @contextlib.contextmanager
    def device(wanted):
        devices.append(wanted)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices
