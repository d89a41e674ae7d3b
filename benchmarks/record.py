"""What a recorded result says of its run."""

import json
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("triton", "transformers", "flash-linear-attention")


def write(path: Path | None, benchmark: str, **parts: Any) -> None:
    """Write what `python -m benchmarks.BENCHMARK` has measured so far, if there is a path to write it to."""
    if path is not None:
        path.write_text(json.dumps({**header(benchmark), **parts}, indent=1) + "\n")


def header(benchmark: str) -> dict[str, Any]:
    """Date, command line (of paths only the last part), device and versions."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    versions: dict[str, Any] = {"python": platform.python_version()}
    versions |= {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join([f"python -m benchmarks.{benchmark}", *words]),
        "device": _device(),
        "versions": versions,
    }


def default_path(benchmark: str) -> Path:
    """BENCHMARK_DEVICE_DATE.json among the results."""
    device = _device().split()[-1].lower()
    return _RESULTS / f"{benchmark}_{device}_{datetime.now(timezone.utc).date().isoformat()}.json"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
