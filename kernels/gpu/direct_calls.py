"""Custom operators called without PyTorch's dispatcher, where nothing listens there.

The dispatcher takes 14 us of the host for an operator in Python (torch 2.13), ten times what the rest of a small pass
does besides its launch, and a prompt that goes layer by layer calls a dozen a layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def needs_dispatcher() -> bool:
    """Whether something may want to see an operator: autograd, a compiler, a tracer, a mode or a transform."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def called_directly(operator: Any) -> Callable[..., Any]:
    """Decorates a custom operator, whose arguments callers know to be plain tensors (`fused_path_serves`)."""
    function = operator._init_fn

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return operator(*args) if needs_dispatcher() else function(*args)

    call._init_fn = function
    call.register_fake, call.register_autograd = operator.register_fake, operator.register_autograd
    return call


__all__ = ["called_directly", "needs_dispatcher"]
