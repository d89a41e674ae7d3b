"""GPU classes, which the tables of launch configurations go by."""

from functools import lru_cache

import torch

CLASSES = ("sm_80", "sm_90", "sm_100", "gfx942")


def gpu_class(capability: tuple[int, int], hip: bool) -> str:
    """The table's class of a device: gfx942 for every AMD GPU; NVIDIA's by architecture, desktop Blackwell as sm_80.

    Desktop GPUs (sm_86, sm_89, sm_120) have 99 KiB of shared memory; the sm_80 choices stay below that for bf16.
    """
    if hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")


@lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> str:
    """The table's class of `device`; Triton's interpreter on a CPU takes sm_90's choices."""
    if device.type != "cuda":
        return "sm_90"
    return gpu_class(torch.cuda.get_device_capability(device), torch.version.hip is not None)
