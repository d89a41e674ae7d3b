"""Kernels compiled at the same time, in threads, at the first call of a kind."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .launching import launching_on

_COMPILED: set[Hashable] = set()
_COMPILING = threading.Lock()


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


def compile_side_by_side(kind: Hashable, device: torch.device, *compiles: Callable[[], None]) -> None:
    """
    Call all of `compiles` in threads, once for a `kind` of call.

    A kind that says too little is no mistake: what it misses is compiled at its launch. While a CUDA graph is captured
    nothing may be loaded by other threads, so there everything is.
    """
    if kind in _COMPILED or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    with _COMPILING:
        if kind not in _COMPILED:
            run_in_threads(device, *compiles)
            _COMPILED.add(kind)


__all__ = ["compile_side_by_side", "run_in_threads"]
