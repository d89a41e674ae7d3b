"""`python -m kimi_linear.hub_card bench`: arguments are those of `cli`."""

import json
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...modeling.prompt.segments import SEGMENT_TOKENS
from ..measure.machine import device_kind, look_at_machine
from ..measure.record import header
from .cases import DEFAULTS, MODELS, PATHS, cases_of
from .models import check_room, find_source
from .plot import draw, has_matplotlib
from .report import estimate_lines, note_lines, problem_lines, table
from .running import Row, run_cases


@dataclass(frozen=True)
class BenchRequest:
    """What to measure; None leaves the choice to the machine (see `cases.DEFAULTS`).

    Args:
        folder: with weights, or None for random ones.
        config: config.json of random weights; with neither, the released shape.
        layers: only the first so many, of random weights.
        contexts, batches, segments: sizes.
        models, paths: names of `cases.MODELS` and `cases.PATHS`.
        device: "auto", "cuda" or "cpu".
        repeats: timed runs of each case.
        out: the JSON to write, or None for a name with device and time.
        estimate: whether to stop after the estimate.
        draw: a JSON of an earlier run, whose plot to draw instead.
    """

    folder: Path | None = None
    config: Path | None = None
    layers: int | None = None
    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    segments: tuple[int, ...] = ()
    models: tuple[str, ...] = MODELS
    paths: tuple[str, ...] | None = None
    device: str = "auto"
    repeats: int = 3
    out: Path | None = None
    estimate: bool = False
    draw: Path | None = None


def bench(request: BenchRequest) -> int:
    """Estimate, measure, print, record, draw; returns the exit code.

    Raises:
        ValueError: for what the user can mend.
    """
    if request.draw is not None:
        return _draw_again(request.draw)
    _check(request)
    source = find_source(request.folder, request.config, request.layers)
    kind = device_kind(request.device)
    contexts, batches = DEFAULTS[kind]
    paths = request.paths or (PATHS if kind == "cuda" else PATHS[1:])
    cases = cases_of(request.models, request.contexts or contexts, request.batches or batches, request.segments, paths)
    machine = look_at_machine(kind)
    if source.folder is None:
        check_room(source.weights, machine, source.config.num_hidden_layers)
    print(machine, *estimate_lines(cases, source, machine, request.repeats), sep="\n", flush=True)
    if request.estimate:
        return 0
    out = request.out or Path(f"kimi-bench-{_slug(machine.names[0])}-{datetime.now(timezone.utc):%Y%m%d-%H%M}.json")
    if out.exists():
        raise ValueError(f"{out} exists: give another --out, or remove it")
    rows: list[Row] = []
    about: dict[str, Any] = {
        **header("python -m kimi_linear.hub_card"),
        "model": _said(request, source.config.num_hidden_layers),
        "machine": machine.as_record(),
        "segment_tokens": SEGMENT_TOKENS,
    }

    def keep(row: Row) -> None:
        rows.append(row)
        out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    interrupted = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        run_cases(cases, source, machine, request.repeats, keep)
    except KeyboardInterrupt:
        interrupted = True
    _show(rows, about, out, interrupted)
    if interrupted:
        return 130
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def _check(request: BenchRequest) -> None:
    if request.folder is not None and request.config is not None:
        raise ValueError("FOLDER and --config exclude one another: a folder brings its own config.json")
    for name in ("contexts", "batches", "segments"):
        wrong = [value for value in getattr(request, name) or () if value < 1]
        if wrong:
            raise ValueError(f"--{name} must be positive, got {wrong[0]}")
    if request.repeats < 1:
        raise ValueError(f"--repeats must be positive, got {request.repeats}")
    wrong = [size for size in request.segments if size % 64]
    if wrong:
        raise ValueError(f"--segments must be multiples of 64, the chunk of KDA, got {wrong[0]}")


def _said(request: BenchRequest, layers: int) -> str:
    if request.folder is not None:
        return request.folder.resolve().name
    name = "released shape" if request.config is None else f"shape of {request.config.name}"
    return f"{name}, {layers} layers, random weights"


def _slug(name: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    return "-".join(words[:4])


def _show(rows: list[Row], about: dict[str, Any], out: Path, interrupted: bool) -> None:
    if interrupted:
        print(f"interrupted after {len(rows)} cases; what was measured is kept", file=sys.stderr)
    if not rows:
        return
    print("", table(rows), "", sep="\n")
    has_fla = about["versions"]["flash-linear-attention"] is not None
    for line in [*problem_lines(rows), *note_lines(rows, has_fla)]:
        print(line)
    print(f"wrote {out}")
    if any(row["status"] == "measured" for row in rows):
        _draw_beside({**about, "rows": rows}, out)


def _draw_beside(record: dict[str, Any], out: Path) -> None:
    picture = out.with_suffix(".png")
    if not has_matplotlib():
        print(
            f"no plot: matplotlib is missing. pip install matplotlib, then "
            f"python -m kimi_linear.hub_card bench --draw {out}"
        )
        return
    draw(record, picture)
    print(f"wrote {picture}")


def _draw_again(path: Path) -> int:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["rows"], record["machine"]["names"], record["model"], record["date"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--draw {path} is not a JSON that bench wrote ({error})") from error
    picture = path.with_suffix(".png")
    draw(record, picture)
    print(table(record["rows"]), f"wrote {picture}", sep="\n\n")
    return 0


__all__ = ["BenchRequest", "bench"]
