"""Parameters that stay in fp32 when the model is cast: rounding A_log to bf16 changes exp(A_log) by up to 0.9%."""

from collections.abc import Callable

import torch


def keeping_fp32(
    fn: Callable[[torch.Tensor], torch.Tensor], *exact: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of a module's `_apply` (`.to`, `.half`, `.cuda` ...), with the cast below fp32 left out for `exact`.

    `_keep_in_fp32_modules_strict` says the same, but transformers heeds it only while loading.

    Args:
        fn: what is to be applied to each tensor of the module.
        exact: the tensors to keep in fp32; their gradients stay with them.
    """
    kept = {id(tensor) for tensor in exact} | {id(tensor.grad) for tensor in exact if tensor.grad is not None}

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        applied = fn(tensor)
        casts_down = applied.is_floating_point() and applied.dtype.itemsize < 4 <= tensor.dtype.itemsize
        if id(tensor) in kept and casts_down:
            return tensor.to(device=applied.device, dtype=torch.float32)
        return applied

    return apply


__all__ = ["keeping_fp32"]
