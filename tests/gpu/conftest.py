import pytest

from kimi_linear.modeling.decode import path as decode_path


@pytest.fixture
def by_layers(monkeypatch):
    """Calls a function without steps."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(decode_path, "gpu_has_kernels", lambda model: False)
            return function()

    return call
