"""How kernels are launched: on the GPU of their tensors, and with which keywords.

Triton launches on the current device, whatever pointers it is given, and a model that accelerate has spread over
several GPUs calls its layers with the first of them current. Each thread has a current device of its own.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

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


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [M, D] whose rows lie densely; a view where the strides allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_options(config: NamedTuple) -> dict[str, int]:
    """Keyword arguments of a launch; AMD's compiler knows no `maxnreg`, so it appears only where it is set."""
    bound = getattr(config, "maxnreg", None)
    return {"num_warps": config.num_warps} if bound is None else {"num_warps": config.num_warps, "maxnreg": bound}


def launch(kernel: Any, grid: tuple[int, ...], compile_only: bool, *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, or all of it but the launch itself: compile, load, build the launcher."""
    compiled = kernel.run(*args, grid=grid, warmup=compile_only, **options)
    if compile_only:
        _ = compiled.run  # Triton loads when this is first asked for


def overlap_options(pdl: bool) -> dict[str, bool]:
    """Launch keywords; only NVIDIA's backend knows `launch_pdl`."""
    return {"launch_pdl": True} if pdl else {}


__all__ = [
    "dense_rows",
    "launch",
    "launch_options",
    "launches_beside_first_argument",
    "launching_on",
    "overlap_options",
]
