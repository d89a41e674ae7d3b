"""
Bars of the KDA forward from records of `python -m benchmarks.kda`:

    python -m benchmarks.plot_kda OUT.svg LABEL=RECORD.json[:KEY] [LABEL=RECORD.json[:KEY] ...]

One bar a record and case (milliseconds as a share of the first record's, so that short and long cases share an axis),
the goal as a line across, one panel a gate regime. Records name the case, the regime, "ms" and "goal_ms"; a case that a
record lacks has no bar. KEY is the column of the record, "ms" if not given; "fla_ms" is fla's.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.figures import COLOURS, save


def read(record: str) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(case, regime) -> (median ms, goal in ms) of a RECORD.json[:KEY]."""
    path, _, key = record.partition(":")
    rows = json.loads(Path(path).read_text())["forward"]
    return {(row["case"], row["regime"]): (row[key or "ms"][0], row["goal_ms"]) for row in rows if (key or "ms") in row}


def draw(records: dict[str, dict], out: Path) -> None:
    """Write the figure to `out`; the first of `records` sets the scale and the cases."""
    first = next(iter(records.values()))
    cases = list(dict.fromkeys(case for case, _ in first))
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    width = 0.8 / len(records)
    for panel, regime in zip(panels, ("tame", "released")):
        for i, (label, rows) in enumerate(records.items()):
            for j, case in enumerate(cases):
                if (case, regime) not in rows:
                    continue
                ms, share = rows[case, regime][0], rows[case, regime][0] / first[case, regime][0]
                x = j + (i - (len(records) - 1) / 2) * width
                panel.bar(x, share, width * 0.92, color=COLOURS[i], label=label if j == 0 else None)
                panel.annotate(f"{ms:.2f}", (x, share), ha="center", va="bottom", fontsize=7)
        for j, case in enumerate(cases):
            ms, goal = first[case, regime]
            if goal is not None:
                panel.plot(
                    [j - 0.42, j + 0.42],
                    [goal / ms] * 2,
                    color="black",
                    lw=1.2,
                    ls="--",
                    label="goal" if j == 0 else None,
                )
        panel.set_xticks(range(len(cases)), [case.replace(" packed", "\npacked") for case in cases], fontsize=7)
        panel.set_title(f"{regime} gates: ms (bars: share of {next(iter(records))})", fontsize=9)
    panels[0].set_xlabel("batch x tokens x heads, K = V = 128, bf16", fontsize=8)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="lower right", ncols=len(labels))
    save(figure, out)


def main() -> None:
    if len(sys.argv) < 3 or any("=" not in argument for argument in sys.argv[2:]):
        raise SystemExit(__doc__)
    named = (argument.split("=", 1) for argument in sys.argv[2:])
    draw({label: read(record) for label, record in named}, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
