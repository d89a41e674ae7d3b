"""Whether the kernels may run: here, on a device, in place of PyTorch's operators on given tensors."""

from functools import lru_cache

import torch

from .arithmetic import rounded_dot

try:
    import triton
except ImportError:
    triton = None

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def serves(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of `device`: a GPU, or any device in Triton's interpreter."""
    return is_available() and (device.type == "cuda" or interpreted())


@lru_cache(maxsize=16)
def is_first_choice(device: torch.device) -> bool:
    """Whether "auto" takes these kernels on `device`: NVIDIA GPUs from sm_80 on. AMD's are compiled but never run."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    return not isinstance(rounded_dot, triton.JITFunction)


def fused_path_serves(*tensors: torch.Tensor | None, differentiable: bool = False) -> bool:
    """Whether the fused kernels may compute on these tensors; None counts for nothing.

    A compiled graph keeps PyTorch's operators, which Inductor fuses by itself. Subclasses (sharded, quantised) and what
    is not on an NVIDIA GPU from sm_80 on go through PyTorch.

    Args:
        tensors: all inputs of the kernel that hold numbers of the model.
        differentiable: whether the kernel's operator has a backward (kernels/training). Without one, no gradient may be
            wanted.
    """
    if torch.compiler.is_compiling():
        return False
    held = [tensor for tensor in tensors if tensor is not None]
    if not differentiable and gradients_wanted(*held):
        return False
    plain = all(type(tensor) in _PLAIN and tensor.dtype in _DTYPES for tensor in held)
    return plain and len({tensor.device for tensor in held}) == 1 and device_serves(held[0].device)


def gradients_wanted(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is computed of these tensors; None counts for nothing."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def device_serves(device: torch.device) -> bool:
    """Whether Triton is installed and `device` is one that the kernels were measured on."""
    return device.type == "cuda" and is_available() and is_first_choice(device)


__all__ = [
    "device_serves",
    "fused_path_serves",
    "gradients_wanted",
    "interpreted",
    "is_available",
    "is_first_choice",
    "serves",
]
