"""One file of the quantised checkpoint: read its tensors, quantise them in batches, write it whole or not at all."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..weight_files import PART_SUFFIX
from .least_squares import BLOCK_NUMBERS, quantise_rows
from .plan import Job, OutputFile

# Sums of squares by kind of layer: of the weights, of the errors, of the errors of round to nearest.
Squares = dict[str, list[float]]
Batch = tuple[list[Job], torch.Tensor]


def make_file(
    output: OutputFile, folder: Path, record: Path, device: torch.device, progress: Callable[[int], Any]
) -> None:
    """Write `folder / output.name`, and beforehand what was measured of it to `record`.

    The file appears under its name when it is complete and on the disk. One that is there is therefore whole.

    Args:
        output: the file and what it is made from.
        folder, record: where to write.
        device: that computes.
        progress: called with bytes of the source that have been dealt with.

    Raises:
        ValueError: for NaN or infinity in the source; the message names the tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    squares: Squares = {}
    for jobs, weights in _read_ahead(output):
        tensors |= _made(jobs, weights, device, squares)
        progress(sum(job.read_bytes for job in jobs))
    _write(record, lambda part: part.write_text(json.dumps(squares), encoding="utf-8"))
    _write(folder / output.name, lambda part: save_file(tensors, part, {"format": "pt"}))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(path.name + PART_SUFFIX)
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.rename(path)


def _batches(output: OutputFile) -> Iterator[list[Job]]:
    """Weights of one format and width together, up to a block of numbers: few large launches for many small experts."""
    waiting: dict[Any, list[Job]] = {}
    for job in output.jobs:
        if job.format is None:
            yield [job]
            continue
        batch = waiting.setdefault((job.format, job.shape[1]), [])
        if batch and sum(other.shape[0] for other in (*batch, job)) * job.shape[1] > BLOCK_NUMBERS["cuda"]:
            yield list(batch)
            batch.clear()
        batch.append(job)
    yield from (batch for batch in waiting.values() if batch)


def _read_ahead(output: OutputFile) -> Iterator[Batch]:
    """Batches with their tensors, one below the other; the next is read while the caller works on one."""
    with ExitStack() as stack:
        files = {
            source: stack.enter_context(safe_open(source, framework="pt"))
            for source in dict.fromkeys(job.source for job in output.jobs)
        }

        def read(jobs: list[Job]) -> torch.Tensor:
            tensors = [files[job.source].get_tensor(job.name) for job in jobs]
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise ValueError(f"weights of one checkpoint have several dtypes, among them {jobs[0].name}")
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        reader = stack.enter_context(ThreadPoolExecutor(1))
        previous = None
        for jobs in _batches(output):
            following = jobs, reader.submit(read, jobs)
            if previous is not None:
                yield previous[0], previous[1].result()
            previous = following
        if previous is not None:
            yield previous[0], previous[1].result()


def _made(jobs: list[Job], weights: torch.Tensor, device: torch.device, squares: Squares) -> dict[str, torch.Tensor]:
    """What comes of a batch, by name; its sums of squares are added to `squares`."""
    format = jobs[0].format
    moved = weights if format is None else weights.to(device)
    if moved.is_floating_point() and not moved.isfinite().all():
        _name_the_broken(jobs, moved)
    if format is None:
        return {jobs[0].released: weights}
    made = quantise_rows(moved, format)
    held = {name: tensor.cpu() for name, tensor in made.tensors.items()}
    sums_of_rows, start, result = made.squares.cpu(), 0, {}
    for job in jobs:
        rows, layer = slice(start, start + job.shape[0]), job.released.removesuffix(".weight")
        start = rows.stop
        parts = {name: tensor[rows].clone() for name, tensor in held.items()}
        if format.has_shape:
            parts["shape"] = torch.tensor(job.shape)
        result |= {f"{layer}.{format.disk_name(name)}": tensor for name, tensor in parts.items()}
        before = squares.get(kind_of(layer), [0.0] * 3)
        squares[kind_of(layer)] = [a + b for a, b in zip(before, sums_of_rows[rows].sum(0).tolist())]
    return result


def _name_the_broken(jobs: list[Job], weights: torch.Tensor) -> None:
    start = 0
    for job in jobs:
        rows = weights if job.format is None else weights[start : start + job.shape[0]]
        start += 0 if job.format is None else job.shape[0]
        if not rows.isfinite().all():
            raise ValueError(f"{job.name} of {job.source} holds NaN or infinity; download the file again")


def kind_of(layer: str) -> str:
    """The row of the card's table that a layer counts in."""
    if ".block_sparse_moe.experts." in layer:
        return "routed experts"
    return "attention projections" if ".self_attn." in layer else "shared experts and dense MLP"


__all__ = ["Squares", "kind_of", "make_file"]
