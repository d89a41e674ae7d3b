"""What the figures share."""

from pathlib import Path
from typing import Any

import matplotlib

COLOURS = ("#9aa0a6", "#1a73e8", "#e8710a", "#188038")


def save(figure: Any, out: Path) -> None:
    """Write `figure` as SVG; the same records give the same file."""
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    matplotlib.rcParams["svg.hashsalt"] = "kda"
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
