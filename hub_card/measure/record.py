"""What a recorded result says of its run."""

import json
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("triton", "transformers", "flash-linear-attention")


def write_record(path: Path, command: str, **parts: Any) -> None:
    """Write what `command` has measured so far."""
    path.write_text(json.dumps({**header(command), **parts}, indent=1) + "\n", encoding="utf-8")


def header(command: str, words: Sequence[str] | None = None) -> dict[str, Any]:
    """Date, command line (of paths only the last part), device and versions.

    Args:
        command: as a user types it, without its arguments.
        words: the arguments; by default those of the process.
    """
    words = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if words is None else words)]
    versions: dict[str, Any] = {"python": platform.python_version()}
    versions |= {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join([command, *words]),
        "device": device_name(),
        "versions": versions,
    }


def device_name() -> str:
    """Of the current GPU, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


__all__ = ["device_name", "header", "write_record"]
