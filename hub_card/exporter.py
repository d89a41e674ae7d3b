"""Write a Hub folder: flat code, config, tokenizer, card, and weights that are linked, copied or random."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from ..modeling.checkpoint.refusals import refuse_method
from ..modeling.checkpoint.schemes import quantization_fields
from .code_flattening import flatten_sources, third_party_packages, write_flat_sources
from .hub_files import (
    has_chat_template,
    read_config,
    write_code_licence,
    write_config,
    write_generation_config,
    write_tokenizer,
)
from .model_card import CardFacts, build_card, guess_base_model
from .random_weights import write_random_weights
from .staging import Staging, settle_failure
from .weight_files import INDEX_FILE, PART_SUFFIX, WeightFile, bytes_to_copy, find_weights, place_weights, possible_mode

SMALL_CHECKPOINT = Path(__file__).with_name("small_checkpoint")
# Markdown about a checkpoint, taken into its card.
NOTES_FILE = "card_notes.md"

_SMALL_FILES_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Args:
        out: the folder to write. It must not exist, or be empty.
        checkpoint: released folder with weights, whose code is replaced.
        config: released config.json, to export without a checkpoint. With neither, the small trained checkpoint of
            this package is exported.
        random: with `config`, write random weights.
        seed: of the random weights.
        weights: how the checkpoint's weights get there: "auto", "hardlink", "symlink" or "copy".
        base_model: Hub id for the card; by default what the checkpoint's path tells.
        repo_id: what the card's usage loads; by default the name of `out`.
    """

    out: Path
    checkpoint: Path | None = None
    config: Path | None = None
    random: bool = False
    seed: int = 0
    weights: str = "auto"
    base_model: str | None = None
    repo_id: str | None = None


@dataclass(frozen=True)
class ExportReport:
    """What was exported: names of the code files, how the weights got there, and their bytes."""

    out: Path
    code_files: list[str]
    weights: str
    weight_bytes: int


def export(request: ExportRequest) -> ExportReport:
    """Write the folder that `request` asks for, all of it or nothing.

    An interrupted copy of weights is kept in `OUT.partial`, and the same request goes on with it.

    Raises:
        ValueError: for what the user can mend; the message says how.
        OSError: when reading or writing fails; after a full disk nothing is left behind.
    """
    request, source, files = _checked(request)
    config, fields = read_config(source / "config.json" if request.config is None else request.config)
    if (quantisation := quantization_fields(config)) is not None:
        refuse_method(quantisation, f"quantization_config of {source}")
    texts = flatten_sources()
    staging = Staging(request.out, _identity(request, source, files))
    mode = "none"
    try:
        _keep_only_copies(staging.folder, files)
        if files:
            mode = possible_mode(files, staging.folder, request.weights)
            _check_free_space(files, staging.folder, mode)
        size = sum(file.size for file in files)
        if request.random:
            mode, config.dtype = "random", "bfloat16"
            size = write_random_weights(config, staging.folder, seed=request.seed)
        given = source if request.config is None else None
        tokenizer = write_all_but_weights(given, config, fields, texts, staging.folder)
        facts = CardFacts(
            repo_id=request.repo_id or request.out.name,
            base_model=request.base_model,
            licence=licence_of(source) if request.config is None else "mit",
            weights="checkpoint" if files else mode,
            tokenizer=tokenizer,
            packages=third_party_packages(texts.values()),
            notes=_notes(source) if request.config is None else "",
        )
        build_card(facts, config).save(staging.folder / "README.md")
        place_weights(files, staging.folder, mode)
        staging.publish()
    except BaseException as error:
        needed = _SMALL_FILES_BYTES + (sum(file.size for file in files) if mode == "copy" else 0)
        settle_failure(error, staging, needed, keep=_kept_copies(staging.folder, mode))
        raise
    return ExportReport(request.out, list(texts), mode, size)


def _checked(request: ExportRequest) -> tuple[ExportRequest, Path, list[WeightFile]]:
    """The request with defaults filled in, the folder it reads, and that folder's checked weights."""
    values = {**vars(request), "out": Path(os.path.abspath(request.out))}
    if request.checkpoint is not None and request.config is not None:
        raise ValueError("--checkpoint and --config exclude one another: a checkpoint brings its own config.json")
    if request.random and request.config is None:
        raise ValueError("--random needs --config: it makes weights for a config")
    if request.config is not None:
        return ExportRequest(**values), Path(request.config).parent, []
    source = request.checkpoint
    if source is None:
        source = SMALL_CHECKPOINT
        if not (source / "config.json").is_file():
            raise ValueError("this installation has no small checkpoint; give --checkpoint or --config")
        # A link would let an edit of the exported folder change the installed package.
        values["weights"] = "copy"
    source = checked_source(Path(source), "--checkpoint")
    if request.base_model is None:
        values["base_model"] = guess_base_model(source)
    return ExportRequest(**values), source, find_weights(source)


def checked_source(source: Path, called: str) -> Path:
    """The folder of a checkpoint, or ValueError if it is none.

    Args:
        source: as the user gave it.
        called: what the message calls it.
    """
    if not source.is_dir():
        raise ValueError(f"{called} {source} is not a folder; download the model first and give its folder")
    if not (source / "config.json").is_file():
        hint = "; give one of the folders below its snapshots/" if (source / "snapshots").is_dir() else ""
        raise ValueError(f"{called} {source} has no config.json{hint}")
    return source


def _identity(request: ExportRequest, source: Path, files: list[WeightFile]) -> dict[str, Any]:
    """What makes two requests the same, so that one may go on with the other's copies."""
    return {
        "source": str((request.config or source).resolve()),
        "weights": request.weights,
        "random": [request.random, request.seed],
        "files": [[file.name, file.size, file.source.stat().st_mtime_ns] for file in files],
    }


def _keep_only_copies(folder: Path, files: list[WeightFile]) -> None:
    """Remove what an interrupted export left, but for weights that were copied in part or whole."""
    kept = {file.name + suffix for file in files for suffix in ("", PART_SUFFIX)}
    for path in folder.iterdir():
        if path.name not in kept or path.is_symlink():
            path.unlink()


def _check_free_space(files: list[WeightFile], folder: Path, mode: str) -> None:
    needed = _SMALL_FILES_BYTES + (bytes_to_copy(files, folder) if mode == "copy" else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free} bytes are free")


def write_all_but_weights(
    source: Path | None, config: KimiLinearConfig, fields: dict[str, Any], texts: dict[str, str], folder: Path
) -> str:
    """Write code, configs, tokenizer and licences; the index comes with the weights, the card last.

    Args:
        source: folder of the checkpoint, or None.
        config, fields: as for `write_config`.
        texts: the code, from `flatten_sources`.
        folder: where to write.

    Returns:
        What the tokenizer can do, as in `CardFacts`.
    """
    write_flat_sources(texts, folder)
    write_config(config, fields, folder)
    write_generation_config(source, config, folder)
    write_code_licence(folder)
    if source is None:
        return "none"
    for name in (INDEX_FILE, "LICENSE"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not write_tokenizer(source, config, folder):
        return "none"
    return "chat" if has_chat_template(folder) else "text"


def licence_of(source: Path) -> str:
    """The licence that the source's card names, else that of the released checkpoints."""
    card = source / "README.md"
    return ((metadata_load(card) if card.is_file() else None) or {}).get("license", "mit")


def _notes(source: Path) -> str:
    path = source / NOTES_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _kept_copies(folder: Path, mode: str) -> bool:
    """Whether weights that were copied in part or whole are there."""
    kept_names = (".safetensors", PART_SUFFIX)
    return mode == "copy" and folder.is_dir() and any(path.name.endswith(kept_names) for path in folder.iterdir())


__all__ = [
    "SMALL_CHECKPOINT",
    "ExportReport",
    "ExportRequest",
    "checked_source",
    "export",
    "licence_of",
    "write_all_but_weights",
]
