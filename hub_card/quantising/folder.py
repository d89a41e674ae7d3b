"""`quantize`: a Hub folder with quantised weights from a checkpoint in the released layout.

The weights are made file by file in `OUT.partial`. A file that stands there under its name is whole; the same command
goes on after the last of them and makes the same bytes on the same kind of device.
"""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...modeling.checkpoint.schemes import Schemes
from ..code_flattening import flatten_sources, third_party_packages
from ..exporter import checked_source, licence_of, write_all_but_weights
from ..hub_files import read_config
from ..model_card import CardFacts, build_card, guess_base_model
from ..staging import Staging, settle_failure
from ..weight_files import INDEX_FILE, WeightFile, check_safetensors, find_weights
from .measure import check
from .notes import card_notes
from .plan import OutputFile, plan_files, read_header
from .recipes import RECIPES, Recipe, quantization_config
from .shards import Squares, make_file

_SMALL_FILES_BYTES = 64 * 2**20


@dataclass(frozen=True)
class QuantiseRequest:
    """What to quantise.

    Args:
        checkpoint: folder with an unquantised checkpoint, released or exported.
        out: the folder to write. It must not exist, or be empty.
        recipe: one of `RECIPES`.
        check: whether to run both models on held-out text afterwards.
        base_model: Hub id for the card; by default what the checkpoint's path tells.
    """

    checkpoint: Path
    out: Path
    recipe: str = "w4a16"
    check: bool = False
    base_model: str | None = None


@dataclass(frozen=True)
class QuantiseReport:
    """What was written: the bytes of the weights, before and after, and relative errors by kind of layer.

    `errors` has (ours, round to nearest): root of the summed squares of the errors by that of the weights.
    """

    read_bytes: int
    written_bytes: int
    errors: dict[str, tuple[float, float]]
    check: dict[str, Any] | None


def quantise(request: QuantiseRequest) -> QuantiseReport:
    """Write the folder that `request` asks for, all of it or nothing under its name.

    Raises:
        ValueError: for what the user can mend; the message says how.
        OSError: when reading or writing fails; what was finished stays in `OUT.partial`.
    """
    recipe = _recipe(request.recipe)
    source, out = checked_source(Path(request.checkpoint), "checkpoint"), Path(os.path.abspath(request.out))
    config, fields = read_config(source / "config.json")
    if fields.get("quantization_config") is not None:
        raise ValueError(f"{source} is quantised already: give the bf16 checkpoint that it was made from")
    described = quantization_config(recipe)
    files = find_weights(source)
    outputs = plan_files(files, config, Schemes(described))
    staging = Staging(out, _identity(described, source, files))
    needed = _SMALL_FILES_BYTES + sum(job.written_bytes for output in outputs for job in output.jobs)
    try:
        left = _keep_whole_files(staging, outputs)
        _check_free_space(staging.folder, needed - left)
        errors = _make_files(outputs, staging)
        report = _finish(request, source, config, {**fields, "quantization_config": described}, staging, errors)
        staging.publish()
    except BaseException as error:
        settle_failure(error, staging, needed, keep=any(staging.folder.glob("*.safetensors")))
        raise
    return report


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"--recipe {name!r} is none of {', '.join(RECIPES)}")
    return RECIPES[name]


def _identity(described: dict[str, Any], source: Path, files: list[WeightFile]) -> dict[str, Any]:
    """What makes two runs the same, so that one may go on with the other's files."""
    return {
        "quantization_config": described,
        "source": str(source.resolve()),
        "files": [[file.name, file.size, file.source.stat().st_mtime_ns] for file in files],
    }


def _record(staging: Staging, output: OutputFile) -> Path:
    return staging.root / f"{output.name}.json"


def _keep_whole_files(staging: Staging, outputs: list[OutputFile]) -> int:
    """Remove what an interrupted run left, but for files that are whole; returns the bytes of those."""
    whole = {output.name for output in outputs if _record(staging, output).is_file()}
    kept = 0
    for path in staging.folder.iterdir():
        if path.name in whole and _is_whole(path):
            kept += path.stat().st_size
        else:
            path.unlink()
    return kept


def _is_whole(path: Path) -> bool:
    """Whether a file's size is what its header says; others than this program may have cut it."""
    try:
        check_safetensors(path)
    except ValueError:
        return False
    return True


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free} bytes are free")


def _make_files(outputs: list[OutputFile], staging: Staging) -> dict[str, tuple[float, float]]:
    """Make the files that are not there yet; relative errors of all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {output.name: sum(job.read_bytes for job in output.jobs) for output in outputs}
    squares: Squares = {}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="quantising", disable=None) as bar:
        for output in outputs:
            record = _record(staging, output)
            if (staging.folder / output.name).is_file():
                bar.update(sizes[output.name])
            else:
                make_file(output, staging.folder, record, device, bar.update)
            for kind, sums in json.loads(record.read_text(encoding="utf-8")).items():
                squares[kind] = [a + b for a, b in zip(squares.get(kind, [0.0] * 3), sums)]
    return {kind: _relative(sums) for kind, sums in sorted(squares.items())}


def _relative(sums: list[float]) -> tuple[float, float]:
    energy, ours, nearest = sums
    return ((ours / energy) ** 0.5, (nearest / energy) ** 0.5) if energy else (0.0, 0.0)


def _finish(
    request: QuantiseRequest,
    source: Path,
    config: KimiLinearConfig,
    fields: dict[str, Any],
    staging: Staging,
    errors: dict[str, tuple[float, float]],
) -> QuantiseReport:
    """Write everything but the weights; the card comes last, because it says what was measured."""
    folder, texts, recipe = staging.folder, flatten_sources(), RECIPES[request.recipe]
    tokenizer = write_all_but_weights(source, config, fields, texts, folder)
    written = _write_index(folder)
    checked = check(source, folder) if request.check else None
    read_bytes = sum(file.size for file in find_weights(source))
    facts = CardFacts(
        repo_id=staging.out.name,
        base_model=request.base_model or guess_base_model(source),
        licence=licence_of(source),
        weights="checkpoint",
        tokenizer=tokenizer,
        packages=third_party_packages(texts.values()),
        notes=card_notes(recipe, fields["quantization_config"], errors, checked, (read_bytes, written)),
        quantised=recipe.summary,
    )
    build_card(facts, config).save(folder / "README.md")
    return QuantiseReport(read_bytes, written, errors, checked)


def _write_index(folder: Path) -> int:
    """Write the index of several files, or remove the source's if there is one file; returns the bytes of the files."""
    (folder / INDEX_FILE).unlink(missing_ok=True)
    files = sorted(folder.glob("*.safetensors"))
    headers = {file.name: read_header(file) for file in files}
    if len(files) > 1:
        total = sum(
            entry["data_offsets"][1] - entry["data_offsets"][0] for h in headers.values() for entry in h.values()
        )
        weight_map = {name: file for file, header in headers.items() for name in header}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in files)


__all__ = ["QuantiseReport", "QuantiseRequest", "quantise"]
