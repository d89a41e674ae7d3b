"""
Milliseconds a token and GiB of cache against context length, from a record of `python -m benchmarks.long_context`:

    python -m benchmarks.plot_long_context OUT.svg RECORD.json

Batch 1: `generate()` of the three models, and as dashes the bytes that a step of ours must move at the copy bandwidth.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figures import COLOURS, save

LABELS = {"native": "transformers' native class", "all_mla": "MLA in every layer, ours", "hybrid": "Kimi Linear, ours"}


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Model -> its rows at batch 1, by context; cases that did not fit are left out, and models without any."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["batch"] == 1 and row["fits"]]
    rows.sort(key=lambda row: row["context"])
    models = {name: [row for row in rows if row["model"] == name] for name in LABELS}
    return {name: rows for name, rows in models.items() if rows}


def draw(models: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write the figure to `out`."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8))
    contexts = sorted({row["context"] for rows in models.values() for row in rows})
    for panel, key, title in zip(
        panels, ("generate_ms", "cache_gib"), ("ms a token, batch 1", "GiB of cache (native's as ours)")
    ):
        for name, rows in models.items():
            colour = dict(zip(LABELS, COLOURS))[name]
            x, y = [row["context"] for row in rows], [row[key] for row in rows]
            panel.plot(x, y, "o-", color=colour, ms=4, label=LABELS[name], zorder=3 if name == "hybrid" else 2)
            if key == "generate_ms" and name != "native":
                panel.plot(x, [row["limit_ms"] for row in rows], "--", color=colour, lw=1, label="limit of its bytes")
            # First and last values, and only one of those that fall together.
            marked = {"native": [0, -1], "hybrid": [0, -1], "all_mla": [-1]} if key == "generate_ms" else {"native": []}
            for i in marked.get(name, [-1]):
                panel.annotate(f"{y[i]:.3g}", (x[i], y[i]), (3, 4), textcoords="offset points", fontsize=7)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(contexts, [_short(context) for context in contexts], fontsize=8)
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.set_xlabel("tokens of context", fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.grid(axis="y", lw=0.4, color="#dadce0")
    panels[0].legend(fontsize=7, frameon=False)
    save(figure, out)


def _short(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 2**10}k"


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(read(Path(sys.argv[2])), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
