"""The plot of a record: milliseconds against context, one column of panels for each number of rows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import column_of, number

# One colour a model; ours by layers and in other segments is the same colour, dashed.
_COLOURS = {"ours": "#1a73e8", "all_mla": "#e8710a", "native": "#80868b"}
_MOST_COLUMNS = 4
_LIMIT = "limit of our bytes or operations"
_ORDER = ("ours", "all MLA", "native", _LIMIT)
# What -> title and how many milliseconds its unit has.
_TITLES = {"decode": ("decode, ms a token", 1.0), "prompt": ("prompt, seconds", 1e3)}
_SEGMENT_STYLES = ("--", "-.", ":")
_LABEL_GAP = 9  # points between the numbers at the ends of lines


def has_matplotlib() -> bool:
    """Whether the plot can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the figure of a record; the ending of `out` says the format.

    Raises:
        ValueError: if nothing in it was measured, or matplotlib is missing.
    """
    rows = [row for row in record["rows"] if row["status"] == "measured"]
    if not rows:
        raise ValueError("nothing was measured, so there is nothing to draw")
    if not has_matplotlib():
        raise ValueError("the plot needs matplotlib: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in _TITLES if any(row["what"] == kind for row in rows)]
    batches = _some(sorted({row["batch"] for row in rows}))
    size = (3.6 * len(batches) + 1.2, 3.1 * len(kinds) + 0.7)
    figure, panels = pyplot.subplots(len(kinds), len(batches), figsize=size, squeeze=False, sharey="row", sharex=True)
    for line, kind in zip(panels, kinds):
        for panel, batch in zip(line, batches):
            mine = [row for row in rows if row["what"] == kind and row["batch"] == batch]
            title, unit = _TITLES[kind]
            _draw_panel(panel, mine, unit)
            panel.set_title(f"{title}, {batch} row{'s' if batch > 1 else ''}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("tokens of context", fontsize=8)
    found = {label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels())}
    found = dict(sorted(found.items(), key=lambda item: _ORDER.index(_group(item[0]))))
    height = 0.19 * -(-len(found) // 3) + 0.1
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    machine = record["machine"]["names"]
    heading = f"{record['model']} on {f'{len(machine)} x ' if len(machine) > 1 else ''}{machine[0]}, {record['date']}"
    figure.suptitle(heading, fontsize=10)
    figure.tight_layout(rect=(0, height / size[1], 1, 1))
    figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


def _some(values: Sequence[int]) -> list[int]:
    """At most `_MOST_COLUMNS` of the values, evenly from first to last."""
    last = min(len(values), _MOST_COLUMNS) - 1
    return [values[round(i * (len(values) - 1) / last)] for i in range(last + 1)] if last else list(values)


def _group(label: str) -> str:
    return label.split(",")[0]


def _style(label: str, segments: Sequence[str]) -> str:
    """By layers and in other segments the line is dashed, else drawn through."""
    if "segments" in label:
        return _SEGMENT_STYLES[segments.index(label) % len(_SEGMENT_STYLES)]
    return "--" if "by layers" in label else "-"


def _draw_panel(panel: Any, rows: list[dict[str, Any]], unit: float) -> None:
    labels = list(dict.fromkeys(column_of(row) for row in rows))
    segments = [label for label in labels if "segments" in label]
    ends = []
    for label in labels:
        mine = sorted((row for row in rows if column_of(row) == label), key=lambda row: row["context"])
        model = mine[0]["model"]
        x, y = [row["context"] for row in mine], [row["ms"] / unit for row in mine]
        panel.plot(x, y, _style(label, segments), marker="o", ms=3.5, lw=1.6, color=_COLOURS[model], label=label,
                   zorder=3 if model == "ours" else 2)  # fmt: skip
        ends.append((y[-1], x[-1], _COLOURS[model]))
    limits = sorted({row["context"]: row["limit_ms"] / unit for row in rows if row["model"] == "ours"}.items())
    if limits:
        panel.plot(*zip(*limits), ":", color="#5f6368", lw=1.2, label=_LIMIT, zorder=1)
    _dress(panel, sorted({row["context"] for row in rows}))
    _name_ends(panel, sorted(ends))


def _name_ends(panel: Any, ends: list[tuple[float, float, str]]) -> None:
    """Write the last number of each line beside it, apart from one another."""
    free, last = -math.inf, max(x for _, x, _ in ends)
    for y, x, colour in ends:
        if x < last:  # a line that ends before the others
            panel.annotate(number(y), (x, y), (0, 7), textcoords="offset points", fontsize=7, ha="center", color=colour)
            continue
        at = panel.transData.transform((x, y))[1] * 72 / panel.figure.dpi
        free = max(at, free + _LABEL_GAP)
        panel.annotate(number(y), (x, y), (5, free - at), textcoords="offset points",
                       fontsize=7, va="center", color=colour)  # fmt: skip


def _dress(panel: Any, contexts: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(contexts, [short(context) for context in contexts], fontsize=8)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    panel.tick_params(labelsize=8)
    panel.margins(x=0.16)
    panel.grid(axis="y", lw=0.4, color="#dadce0")
    panel.spines[["top", "right"]].set_visible(False)


def short(tokens: int) -> str:
    """Such as 4k or 1M."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)


__all__ = ["draw", "has_matplotlib", "short"]
