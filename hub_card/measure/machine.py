"""The machine at hand: its memory, and the rates at which it reads memory and multiplies matrices, measured."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..random_weights import available_memory

_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What limits are counted with.

    Args:
        kind: "cuda" or "cpu".
        names: of the GPUs, or of the processor.
        memory: bytes free on each GPU, or of main memory.
        read_rate: bytes a second that one of them reads.
        matmul_rate: bf16 operations a second of large matrix products on one of them.
    """

    kind: str
    names: tuple[str, ...]
    memory: tuple[int, ...]
    read_rate: float
    matmul_rate: float

    def as_record(self) -> dict[str, Any]:
        """For a JSON record."""
        return asdict(self)

    def __str__(self) -> str:
        count = f"{len(self.names)} x " if len(self.names) > 1 else ""
        free = " + ".join(f"{memory / _GIB:.1f}" for memory in self.memory)
        return (
            f"{count}{self.names[0]}, {free} GiB free, reads {self.read_rate / 1e9:,.0f} GB/s, "
            f"multiplies {self.matmul_rate / 1e12:,.3g} TFLOP/s in bf16 (both measured now)"
        )


def device_kind(asked: str) -> str:
    """The kind of device, "cuda" or "cpu", that "auto", "cuda" or "cpu" asks for.

    Raises:
        ValueError: where a GPU is asked for and torch sees none.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; install a CUDA build of torch, or use --device cpu")
    return "cuda"


def look_at_machine(kind: str) -> Machine:
    """Measure the machine, in about a second."""
    if kind == "cuda":
        indices = range(torch.cuda.device_count())
        names = tuple(torch.cuda.get_device_name(index) for index in indices)
        memory = tuple(torch.cuda.mem_get_info(index)[0] for index in indices)
    else:
        names, memory = (_processor(),), (available_memory() or 0,)
    return Machine(kind, names, memory, _read_rate(kind, memory[0]), _matmul_rate(kind))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        found = ""
    return f"CPU {found}".strip() + f", {torch.get_num_threads()} threads"


def _read_rate(kind: str, memory: int) -> float:
    """Bytes a second of a sum over more than any cache holds."""
    size = min(2 * _GIB if kind == "cuda" else _GIB // 4, memory // 4)
    numbers = torch.ones(max(size // 4, 1), dtype=torch.float32, device=kind)
    return numbers.nbytes / _fastest(kind, lambda: numbers.sum())


def _matmul_rate(kind: str) -> float:
    """Operations a second of a bf16 product, large on a GPU; on a CPU of a size that takes a moment on any."""
    size = 8192 if kind == "cuda" else 512
    left, right = (torch.randn(size, size, device=kind).bfloat16() for _ in range(2))
    return 2 * size**3 / _fastest(kind, lambda: left @ right)


def _fastest(kind: str, work: Any, repeats: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that isn't counted."""
    seconds = []
    for _ in range(repeats + 1):
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


__all__ = ["Machine", "device_kind", "look_at_machine"]
