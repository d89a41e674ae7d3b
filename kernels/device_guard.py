"""Kernels launched where their tensors are: Triton launches on the current device, whatever pointers it is given.

A model that accelerate has spread over several GPUs calls its layers with the first GPU current.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def launches_beside_first_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function whose first argument is a tensor: that one's GPU, if it is on one, is current inside."""

    @functools.wraps(function)
    def guarded(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cuda":
            return function(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return function(x, *args, **kwargs)

    return guarded


__all__ = ["launches_beside_first_argument"]
