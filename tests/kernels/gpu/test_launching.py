"""Kernels are launched on the GPU of their tensors; two real ones are in tests/gpu/test_two_gpus.py."""

from types import SimpleNamespace

import torch

from kimi_linear.kernels.gpu import launching as gpu_launching

SECOND = torch.device("cuda", 1)


def test_the_first_argument_decides(current):
    @gpu_launching.launches_beside_first_argument
    def where(x, *, extra):
        """Its docstring."""
        return list(current), extra

    assert where(SimpleNamespace(device=SECOND), extra=1) == ([SECOND], 1)
    assert where(torch.zeros(1), extra=2) == ([], 2)
    assert not current and where.__doc__ == "Its docstring."
