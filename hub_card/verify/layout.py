"""Names, shapes, dtypes and bytes of every tensor against the released layout, from the headers of the files alone."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..quantised_tensors import ExpectedTensors, expected_tensors
from ..released_tensors import released_shapes
from ..weight_files import INDEX_FILE, WeightFile, find_weights
from .report import Report

# Of the released checkpoint (docs/checkpoint.md).
RELEASED_TENSORS, RELEASED_PARAMETERS, RELEASED_BYTES = 20_493, 49_122_681_728, 98_245_528_576
_FP32 = ("A_log", "dt_bias")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BITS = {
    "F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16, "U16": 16, "I8": 8,
    "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip
# torch's names of what quantised formats allow, as safetensors writes them.
_TORCH_NAMES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "int8": "I8",
    "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor, and the file that holds it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_headers(files: list[WeightFile]) -> tuple[dict[str, StoredTensor], list[str]]:
    """(tensors by name, names that several files hold) of files that `find_weights` has checked."""
    found: dict[str, StoredTensor] = {}
    twice = []
    for file in files:
        with file.source.open("rb") as reader:
            header = json.loads(reader.read(struct.unpack("<Q", reader.read(8))[0]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in found:
                twice.append(name)
            begin, end = entry["data_offsets"]
            found[name] = StoredTensor(file.source, entry["dtype"], tuple(entry["shape"]), end - begin)
    return found, twice


def check_layout(folder: Path, config: KimiLinearConfig, report: Report) -> dict[str, StoredTensor]:
    """Compare the headers with what the config calls for; returns what the files hold, {} if they are damaged."""
    try:
        files = find_weights(folder)
        stored, twice = read_headers(files)
    except (ValueError, OSError) as error:
        report.wrong(f"weight files: {' '.join(str(error).split())}")
        return {}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = expected_tensors(config, released_shapes(config), shapes)
    _judge_names(stored, expected, twice, report)
    _judge_each(
        "shapes", stored, expected, report,
        lambda name, tensor: tensor.shape in expected.shapes[name],
        lambda name, tensor: f"is {list(tensor.shape)}, {_listed(expected.shapes[name])} is called for",
    )  # fmt: skip
    wanted = {name: _wanted_dtypes(name, expected, config) for name in expected.shapes}
    _judge_each(
        "dtypes", stored, expected, report,
        lambda name, tensor: tensor.dtype in wanted[name],
        lambda name, tensor: f"is {tensor.dtype}, {' or '.join(wanted[name])} is called for",
    )  # fmt: skip
    _judge_bytes(folder, stored, report)
    for note in expected.notes:
        report.note(note)
    _compare_with_release(config, stored, bool(expected.dtypes), report)
    return stored


def _judge_names(stored: dict[str, StoredTensor], expected: ExpectedTensors, twice: list[str], report: Report) -> None:
    groups = {
        "missing": sorted(set(expected.shapes) - set(stored)),
        "unknown": sorted(set(stored) - set(expected.shapes) - expected.accepted),
        "in several files": sorted(twice),
    }
    for what, names in groups.items():
        if names:
            report.wrong(f"names: {len(names)} tensors are {what}, the first is {names[0]}")
    if not any(groups.values()):
        report.right(f"names: {len(stored):,} tensors, none missing, none unknown")


def _judge_each(
    what: str,
    stored: dict[str, StoredTensor],
    expected: ExpectedTensors,
    report: Report,
    fits: Callable[[str, StoredTensor], bool],
    said: Callable[[str, StoredTensor], str],
) -> None:
    both = {name: stored[name] for name in expected.shapes if name in stored}
    wrong = [name for name, tensor in both.items() if not fits(name, tensor)]
    if wrong:
        report.wrong(
            f"{what}: {len(wrong)} tensors differ, the first is {wrong[0]}, which {said(wrong[0], both[wrong[0]])}"
        )
    else:
        report.right(f"{what}: of {len(both):,} tensors as the config calls for")


def _wanted_dtypes(name: str, expected: ExpectedTensors, config: KimiLinearConfig) -> tuple[str, ...]:
    if name in expected.dtypes:
        return tuple(_TORCH_NAMES[str(dtype).removeprefix("torch.")] for dtype in expected.dtypes[name])
    if name.endswith(_FP32):
        return ("F32",)
    return (_DTYPES.get(str(config.dtype or "bfloat16").removeprefix("torch."), "BF16"),)


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def _judge_bytes(folder: Path, stored: dict[str, StoredTensor], report: Report) -> None:
    wrong = [
        name
        for name, tensor in stored.items()
        if tensor.dtype in _BITS and tensor.nbytes * 8 != math.prod(tensor.shape) * _BITS[tensor.dtype]
    ]
    total = sum(tensor.nbytes for tensor in stored.values())
    if wrong:
        report.wrong(f"bytes: {len(wrong)} tensors have other sizes than shape and dtype say, the first is {wrong[0]}")
        return
    index = folder / INDEX_FILE
    said: Any = None
    if index.is_file():
        said = (json.loads(index.read_text(encoding="utf-8")).get("metadata") or {}).get("total_size")
    if said is not None and int(said) != total:
        report.wrong(f"bytes: the tensors have {total:,}, and {INDEX_FILE} says {int(said):,}: download both again")
    else:
        report.right(f"bytes: {total:,} ({total / 2**30:.2f} GiB), each tensor as long as shape and dtype say")


def _compare_with_release(
    config: KimiLinearConfig, stored: dict[str, StoredTensor], is_quantised: bool, report: Report
) -> None:
    differing = differing_fields(config)
    if differing:
        report.note(f"not the released shape: {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}")
        return
    if is_quantised:
        report.note("the released shape, quantised: counts of tensors and bytes differ from the release")
        return
    counts = (
        len(stored),
        sum(math.prod(tensor.shape) for tensor in stored.values()),
        sum(tensor.nbytes for tensor in stored.values()),
    )
    wanted = (RELEASED_TENSORS, RELEASED_PARAMETERS, RELEASED_BYTES)
    said = "{:,} tensors, {:,} parameters, {:,} bytes".format(*counts)
    if counts == wanted:
        report.right(f"released counts: {said}")
    else:
        report.wrong(f"released counts: {said}; the release has " + "{:,}, {:,} and {:,}".format(*wanted))


def differing_fields(config: KimiLinearConfig) -> list[str]:
    """Fields that decide shapes and arithmetic and that aren't as released, in words."""
    released = KimiLinearConfig()
    ignored = {"dtype", "transformers_version", "architectures", "kda_backend", "packed_experts", "use_cache",
               "output_router_logits", "initializer_range", "model_max_length", "bos_token_id", "pad_token_id",
               "eos_token_id"}  # fmt: skip
    names = [name for name in KimiLinearConfig.__annotations__ if name not in ignored]
    differing = [
        name for name in names if hasattr(released, name) and getattr(config, name, None) != getattr(released, name)
    ]
    return [_named(name, getattr(config, name, None), getattr(released, name)) for name in differing]


def _named(name: str, found: Any, released: Any) -> str:
    return name if isinstance(released, dict) else f"{name} {found} (released {released})"


__all__ = ["StoredTensor", "check_layout", "differing_fields", "read_headers"]
