"""Nothing half-written under the final name: an export grows in `DIR.partial` and is renamed when it is complete.

DIR.partial/export.json    what is being exported, so that the same command can go on after an interruption
DIR.partial/folder/        what becomes DIR
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

_RECORD = "export.json"


class Staging:
    """The staging folder of one export.

    Args:
        out: the final folder. It must not exist, or be empty.
        request: what is exported, as JSON values. Equal requests make equal folders.

    Raises:
        ValueError: `out` is taken, or its staging folder belongs to something else.
    """

    def __init__(self, out: Path, request: dict[str, Any]) -> None:
        self.out = out
        self.root = staging_path(out)
        self.folder = self.root / "folder"
        _refuse_taken(out)
        self.resumed = self.root.exists()
        if self.resumed:
            _refuse_other(self.root, request)
        else:
            self.root.mkdir(parents=True)
        try:
            (self.root / _RECORD).write_text(json.dumps(request), encoding="utf-8")
            self.folder.mkdir(exist_ok=True)
        except OSError:
            self.discard()
            raise

    def publish(self) -> None:
        """Give the complete folder its final name."""
        _refuse_taken(self.out)
        if self.out.exists():
            self.out.rmdir()
        self.folder.rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove the staging folder and everything in it."""
        shutil.rmtree(self.root, ignore_errors=True)


def staging_path(out: Path) -> Path:
    """Where an export to `out` is staged: beside it, so that the final rename stays on one file system."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".partial")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that disk or quota are full; Rust libraries raise their own classes with the OS's text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "os error 28" in str(error)


def _refuse_taken(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out {out} is not a folder; choose another name")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out {out} exists and is not empty; nothing is overwritten: choose another name or remove it"
        )


def _refuse_other(root: Path, request: dict[str, Any]) -> None:
    try:
        found = json.loads((root / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != request:
        reason = "an interrupted export with other arguments" if found else "something that is not an export"
        raise ValueError(f"{root} holds {reason}; remove it or choose another --out")


def settle_failure(error: BaseException, staging: Staging, needed: int, keep: bool) -> None:
    """Keep the staging folder if going on is worthwhile, else remove it.

    Args:
        error: that ended the run.
        staging: of the run.
        needed: bytes that the whole run writes.
        keep: whether weights that a next run can use have been written.

    Raises:
        OSError: in place of one, with what was kept or left behind.
    """
    if is_disk_full(error):
        staging.discard()
        raise OSError(
            errno.ENOSPC,
            f"the disk of {staging.out} is full: the export needs {needed} bytes and "
            f"{shutil.disk_usage(staging.out.parent).free} are free; nothing was left behind",
        ) from error
    # What an earlier run wrote survives a mistake in this run's arguments, too.
    if not (keep and (staging.resumed or isinstance(error, (KeyboardInterrupt, OSError)))):
        staging.discard()
    elif isinstance(error, OSError):
        raise OSError(
            error.errno,
            f"{error}; {staging.root} keeps what was written: run the same command again to go on, or remove it",
        ) from error


__all__ = ["Staging", "is_disk_full", "settle_failure", "staging_path"]
