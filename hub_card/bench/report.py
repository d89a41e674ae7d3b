"""What the user reads: the estimate before, the table after."""

from collections.abc import Sequence
from typing import Any

from ...modeling.prompt.segments import SEGMENT_TOKENS
from ..measure.machine import Machine
from .cases import Case, expect
from .models import NAMES, Source
from .running import Row

_GIB = 2**30
_SHORT = {"out of memory": "no memory", "failed": "failed", "not measured": "-"}


def estimate_lines(cases: Sequence[Case], source: Source, machine: Machine, repeats: int) -> list[str]:
    """Time and memory that the cases are expected to take, by model."""
    lines, total = [], 0.0
    for name in dict.fromkeys(case.model for case in cases):
        config, weights = source.config_of(name), source.weights_of(name)
        mine = [case for case in cases if case.model == name]
        found = [expect(case, config, weights, machine, repeats) for case in mine]
        total += sum(one.seconds for one in found)
        most = max(found, key=lambda one: one.nbytes)
        reason = source.why_not(name)
        said = (
            f"not measured: {reason}"
            if reason
            else f"{len(mine)} cases, {duration(sum(one.seconds for one in found))}, weights {weights / _GIB:.3g} GiB, "
            f"at most {most.nbytes / _GIB:.3g} GiB in all ({mine[found.index(most)]})"
        )
        lines.append(f"  {NAMES[name]}: {said}")
    over = sum(machine.memory)
    return [f"estimate: {duration(total)}, besides loading; {over / _GIB:.3g} GiB are free", *lines]


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} minutes"


def column_of(row: Row) -> str:
    """Heading of the column that a row belongs to."""
    name = {"ours": "ours", "all_mla": "all MLA", "native": "native"}[row["model"]]
    if row["what"] == "decode" and row["model"] == "ours":
        return f"ours, {'captured' if row['path'] == 'captured' else 'by layers'}"
    if row["segment"] not in (0, SEGMENT_TOKENS):
        return f"{name}, segments of {row['segment']}"
    return name


def table(rows: Sequence[Row]) -> str:
    """The rows as two tables, of decoding and of prompts; empty if nothing was measured."""
    parts = [_table(rows, "decode", "ms a token", 1.0), _table(rows, "prompt", "seconds", 1e3)]
    return "\n\n".join(part for part in parts if part)


def _table(rows: Sequence[Row], what: str, named: str, unit: float) -> str:
    mine = [row for row in rows if row["what"] == what]
    if not mine:
        return ""
    columns = list(dict.fromkeys(column_of(row) for row in mine))
    lines = [[f"{what}, {named}: context x rows", *columns, "limit", "of limit", "tokens/s"]]
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in mine):
        at = {column_of(row): row for row in mine if (row["context"], row["batch"]) == (context, batch)}
        ours = next((row for row in at.values() if row["model"] == "ours" and row.get("ms")), {})
        first = ours or next(iter(at.values()))
        limit = first.get("limit_ms")
        share = f"{limit / ours['ms']:.0%}" if ours and limit else "-"
        speed = f"{ours['tokens_a_second']:,.0f}" if ours else "-"
        cells = [_cell(at[column], unit) if column in at else "" for column in columns]
        lines.append([f"{context:,} x {batch}", *cells, number(limit / unit) if limit else "-", share, speed])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def _cell(row: dict[str, Any], unit: float) -> str:
    return number(row["ms"] / unit) if row["status"] == "measured" else _SHORT[row["status"]]


def number(x: float) -> str:
    """With three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def note_lines(rows: Sequence[Row], has_fla: bool) -> list[str]:
    """What a reader of the table should know."""
    if not any(row["model"] == "native" and row["status"] == "measured" for row in rows) or has_fla:
        return []
    return ["note: transformers' own class ran without flash-linear-attention, which it uses for KDA where installed"]


def problem_lines(rows: Sequence[Row]) -> list[str]:
    """What was not measured and why, the same reasons together."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            case = Case(*(row[name] for name in ("model", "what", "context", "batch", "path", "segment")))
            found.setdefault((row["status"], row["why"]), []).append(str(case))
    return [
        f"{status}: {cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''} ({why})"
        for (status, why), cases in found.items()
    ]


__all__ = ["column_of", "duration", "estimate_lines", "note_lines", "number", "problem_lines", "table"]
