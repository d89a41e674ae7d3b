"""What the benchmarks that train small models share: options, and a record that an interrupted command goes on with."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import default_path, write

Rows = list[dict[str, Any]]


class SmallRuns:
    """The rows of a benchmark's record, and the time that is left for more.

    Args:
        benchmark: its name.
        minutes: no run is begun after these.
        out: the record, to go on with or to write; None for one among the results.
        table: rows as text.
    """

    def __init__(self, benchmark: str, minutes: float, out: Path | None, table: Callable[[Rows], str]) -> None:
        self.benchmark, self.minutes, self.table = benchmark, minutes, table
        self.out = out or default_path(benchmark)
        self.rows: Rows = json.loads(self.out.read_text())["rows"] if self.out.exists() else []
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._until = time.monotonic() + 60 * minutes

    def over(self) -> bool:
        """Whether no further run may begin, which is printed."""
        if time.monotonic() <= self._until:
            return False
        print(f"{self.minutes:g} minutes are over; the same command goes on with what is left.")
        return True

    def add(self, row: dict[str, Any], **parts: Any) -> None:
        """Record one more row, with the record's other parts."""
        self.rows.append(row)
        write(self.out, self.benchmark, **parts, rows=self.rows)

    def show(self) -> None:
        """Print the table."""
        print(self.table(self.rows))


def add_options(parser: argparse.ArgumentParser, minutes: float) -> None:
    """The options of every such benchmark, with its default of `--minutes`."""
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="no run is begun after these (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to go on with or to write (default: among the results)")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("SVG", "RECORD"), help="draw a record and do no more")


def draw_record(draw: Callable[[Rows, Path], None], plot: tuple[Path, Path]) -> None:
    """What `--plot` asks for."""
    draw(json.loads(plot[1].read_text())["rows"], plot[0])
