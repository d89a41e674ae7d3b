"""Which tensor goes into which file, in which form: settled from headers, before a number is read."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...kernels.weights.formats import WeightFormat
from ...modeling.checkpoint.packed_names import released_name
from ...modeling.checkpoint.schemes import Schemes
from ..quantised_tensors import is_linear
from ..released_tensors import released_shapes
from ..weight_files import SINGLE_FILE, WeightFile

# A file is held in memory, twice while it is written.
FILE_BYTES = 10**9
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Job:
    """One tensor of the source.

    Args:
        name: in the source.
        released: the name it is written under.
        source: the file that holds it.
        shape: its shape.
        format: to quantise it to; None to copy it.
        read_bytes: its bytes in the source.
        written_bytes: those of everything that comes of it.
    """

    name: str
    released: str
    source: Path
    shape: tuple[int, ...]
    format: WeightFormat | None
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class OutputFile:
    """A file to write and what it is made from, in the source's order."""

    name: str
    jobs: tuple[Job, ...]


def plan_files(files: list[WeightFile], config: KimiLinearConfig, schemes: Schemes) -> list[OutputFile]:
    """The files of the quantised checkpoint.

    Args:
        files: of the source, from `find_weights`.
        config: of the model.
        schemes: the format of each layer.

    Raises:
        ValueError: for a source that is no whole, unquantised checkpoint of this model, and for weights that groups
            don't divide; the message names the tensor.
    """
    jobs = [job for file in files for job in _jobs_of(file, config, schemes)]
    _check_complete({job.released: job.shape for job in jobs}, config)
    parts: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if parts[-1] and size + job.written_bytes > FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(job)
        size += job.written_bytes
    names = [f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors" for index in range(len(parts))]
    names = [SINGLE_FILE] if len(parts) == 1 else names
    return [OutputFile(name, tuple(part)) for name, part in zip(names, parts)]


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file that `check_safetensors` has seen, without its metadata."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _jobs_of(file: WeightFile, config: KimiLinearConfig, schemes: Schemes) -> list[Job]:
    header = read_header(file.source)
    linear = {name for name, shape in released_shapes(config).items() if is_linear(name, shape)}
    jobs = []
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        entry, released = header[name], released_name(name)
        shape, size = tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
        format = schemes.format_of(released.removesuffix(".weight")) if released in linear else None
        written = size
        if format is not None:
            if entry["dtype"] not in _FLOATS or len(shape) != 2:
                raise ValueError(
                    f"{name} in {file.name} is {list(shape)} of {entry['dtype']}, not an unquantised weight: quantize "
                    "takes checkpoints in bf16, fp16 or fp32"
                )
            _check_divides(name, shape, format)
            written = _quantised_bytes(shape, format, _FLOATS[entry["dtype"]])
        jobs.append(Job(name, released, file.source, shape, format, size, written))
    return jobs


def _check_divides(name: str, shape: tuple[int, ...], format: WeightFormat) -> None:
    if format.strategy == "group" and format.block is not None and shape[1] % format.block[1]:
        raise ValueError(
            f"{name} is {list(shape)}: its {shape[1]} columns don't divide into groups of {format.block[1]}, which "
            "every scale of int4 weights covers (vLLM wants whole groups); use --recipe fp8, one scale a row"
        )


def _quantised_bytes(shape: tuple[int, ...], format: WeightFormat, dtype: torch.dtype) -> int:
    total = 0
    for name, (shapes, dtypes) in format.tensors(*shape).items():
        number = {"packed": dtypes[0], "shape": torch.int64}.get(name, dtype)
        total += math.prod(shapes[0]) * number.itemsize
    return total


def _check_complete(present: Mapping[str, tuple[int, ...]], config: KimiLinearConfig) -> None:
    released = released_shapes(config)
    lacking = sorted(released.keys() - present.keys())
    if lacking:
        raise ValueError(
            f"the checkpoint lacks {len(lacking)} tensors, the first is {lacking[0]}; give a whole checkpoint in the "
            "released layout"
        )
    for name, shape in released.items():
        if present[name] != shape:
            raise ValueError(f"{name} is {list(present[name])}, but the config says {list(shape)}")


__all__ = ["FILE_BYTES", "Job", "OutputFile", "plan_files", "read_header"]
