"""GPU classes, which the tables of launch configurations go by."""

CLASSES = ("sm_80", "sm_90", "sm_100", "gfx942")


def gpu_class(capability: tuple[int, int], hip: bool) -> str:
    """The table's class of a device: gfx942 for every AMD GPU; NVIDIA's by architecture, desktop Blackwell as sm_80.

    Desktop GPUs (sm_86, sm_89, sm_120) have 99 KiB of shared memory; the sm_80 choices stay below that for bf16.
    """
    if hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")
