"""The weights of a released snapshot: check them without reading them, and link or copy them into an export."""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

WEIGHT_MODES = ("auto", "hardlink", "symlink", "copy")
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PART_SUFFIX = ".part"

_BLOCK = 16 * 2**20
_COMPARED_TAIL = 2**20
# safetensors refuses headers beyond this.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its name in the folder, where its bytes are (links resolved), and how many."""

    name: str
    source: Path
    size: int


def find_weights(folder: Path) -> list[WeightFile]:
    """The checked weight files of a released folder.

    Headers and sizes are read, tensor data is not: truncated, missing and mixed-up files are found within milliseconds
    a file, flipped bits are not.

    Raises:
        ValueError: no weights, or a shard that is missing, cut or not what the index says; the message names it.
    """
    index_path = folder / INDEX_FILE
    if index_path.is_file():
        tensors_of = _read_index(index_path)
    elif (folder / SINGLE_FILE).exists():
        tensors_of = {SINGLE_FILE: set()}
    else:
        raise ValueError(
            f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}; give the folder of a complete download, or use "
            "--config to export without weights"
        )
    missing = [name for name in tensors_of if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(tensors_of)} weight files are missing in {folder}, the first is {missing[0]}; "
            "complete the download"
        )
    files = []
    for name, tensors in tensors_of.items():
        # Snapshots of the Hugging Face cache are links to files with other names.
        source = (folder / name).resolve()
        present = check_safetensors(source, shown=folder / name)
        if absent := sorted(tensors - present):
            raise ValueError(
                f"{folder / name} lacks {len(absent)} tensors that {INDEX_FILE} places there, the first is "
                f"{absent[0]}; the files are not of one revision: download both again"
            )
        files.append(WeightFile(name, source, source.stat().st_size))
    return files


def _read_index(path: Path) -> dict[str, set[str]]:
    """Tensor names by file, from model.safetensors.index.json."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        tensors_of: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            tensors_of.setdefault(name, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files ({error}); download it again") from error
    for name in tensors_of:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}, which is not the name of a safetensors file in this folder")
    if not tensors_of:
        raise ValueError(f"{path} lists no tensors; download it again")
    return dict(sorted(tensors_of.items()))


def check_safetensors(path: Path, *, shown: Path | None = None) -> set[str]:
    """The tensor names of a safetensors file whose header is valid and whose size is what the header says.

    Args:
        path: the file.
        shown: what error messages call it.

    Raises:
        ValueError: for anything else; the message names the file.
    """
    shown = shown or path
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError(f"{shown} is a Git LFS pointer, not weights; fetch the file itself (git lfs pull)")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, max(size - 8, 0)):
            raise ValueError(f"{shown} ({size} bytes) is cut or not a safetensors file; download it again")
        header_bytes = file.read(length)
    try:
        header: dict[str, Any] = json.loads(header_bytes)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        expected = 8 + length + end
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{shown} has a damaged safetensors header; download it again") from error
    if size != expected:
        raise ValueError(f"{shown} has {size} bytes, but its header says {expected}; download it again")
    return set(header)


def bytes_to_copy(files: Sequence[WeightFile], folder: Path) -> int:
    """What copying would still have to write, given what an interrupted copy left in `folder`."""
    missing = 0
    for file in files:
        target, part = folder / file.name, folder / (file.name + PART_SUFFIX)
        present = next((path.stat().st_size for path in (target, part) if path.is_file()), 0)
        missing += max(file.size - present, 0)
    return missing


def possible_mode(files: Sequence[WeightFile], folder: Path, mode: str) -> str:
    """What "auto" means here: "hardlink", else "symlink", else "copy"; other modes are returned as they are."""
    if mode != "auto":
        return mode
    for attempt in ("hardlink", "symlink"):
        try:
            for file in files:
                probe = folder / (file.name + PART_SUFFIX + ".probe")
                _link(file.source, probe, attempt)
                probe.unlink()
        except OSError:
            continue
        return attempt
    return "copy"


def place_weights(files: Sequence[WeightFile], folder: Path, mode: str) -> None:
    """Put the weight files into `folder`.

    Args:
        files: from `find_weights`.
        folder: existing folder; whole files of an interrupted copy are kept, begun ones continued.
        mode: "hardlink", "symlink" or "copy".

    Raises:
        OSError: when writing fails, or when the chosen kind of link is not possible.
    """
    if mode == "copy":
        _copy_all(files, folder)
        return
    for file in files:
        target = folder / file.name
        target.unlink(missing_ok=True)
        try:
            _link(file.source, target, mode)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot {mode} {file.source} to {target} ({error.strerror}); use --weights auto or copy"
            ) from error


def _link(source: Path, target: Path, mode: str) -> None:
    if mode == "hardlink":
        target.hardlink_to(source)
    else:
        target.symlink_to(source)


def _copy_all(files: Sequence[WeightFile], folder: Path) -> None:
    total = sum(file.size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="weights", disable=None) as bar:
        for file in files:
            target = folder / file.name
            if target.is_file() and not target.is_symlink() and target.stat().st_size == file.size:
                bar.update(file.size)
                continue
            target.unlink(missing_ok=True)
            part = folder / (file.name + PART_SUFFIX)
            copy_resumable(file.source, part, bar)
            try:
                check_safetensors(part, shown=target)
            except ValueError:
                part.unlink()  # or the next run would go on with it
                raise
            part.rename(target)


def copy_resumable(source: Path, part: Path, bar: tqdm) -> None:
    """Copy `source` to `part`, going on after what `part` already holds if its end is what the source has there."""
    with source.open("rb") as reader, part.open("ab+") as writer:
        start = _resume_offset(reader, writer)
        writer.truncate(start)
        reader.seek(start)
        bar.update(start)
        while block := reader.read(_BLOCK):
            writer.write(block)
            bar.update(len(block))
        writer.flush()
        # Some file systems report a full disk only here.
        os.fsync(writer.fileno())


def _resume_offset(reader: Any, writer: Any) -> int:
    """Bytes of an interrupted copy that can be kept: all of them, or none if the last MiB differs from the source."""
    written = writer.seek(0, os.SEEK_END)
    compared = min(written, _COMPARED_TAIL)
    for file in (reader, writer):
        file.seek(written - compared)
    return written if writer.read(compared) == reader.read(compared) else 0


__all__ = [
    "WEIGHT_MODES",
    "WeightFile",
    "bytes_to_copy",
    "check_safetensors",
    "find_weights",
    "place_weights",
    "possible_mode",
]
