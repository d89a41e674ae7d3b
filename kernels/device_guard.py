"""Kernels launched, and compiled, where their tensors are.

Triton launches on the current device, whatever pointers it is given, and a model that accelerate has spread over
several GPUs calls its layers with the first of them current. Each thread has a current device of its own.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Within it `device` is the current one, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launches_beside_first_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function whose first argument is a tensor: that one's GPU, if it is on one, is current inside."""

    @functools.wraps(function)
    def guarded(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with launching_on(x.device):
            return function(x, *args, **kwargs)

    return guarded


def run_in_threads(device: torch.device, *functions: Callable[[], Any]) -> None:
    """Call all of `functions` at once, each in a thread of its own with `device` current; raise the first error."""
    errors: list[Exception] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            with launching_on(device):
                function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


__all__ = ["launches_beside_first_argument", "launching_on", "run_in_threads"]
