"""Where a benchmark's result is recorded."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kimi_linear.hub_card.measure.record import device_name, write_record

_RESULTS = Path(__file__).parent / "results"


def write(path: Path | None, benchmark: str, **parts: Any) -> None:
    """Write what `python -m benchmarks.BENCHMARK` has measured so far, if there is a path to write it to."""
    if path is not None:
        write_record(path, f"python -m benchmarks.{benchmark}", **parts)


def default_path(benchmark: str) -> Path:
    """BENCHMARK_DEVICE_DATE.json among the results."""
    device = device_name().split()[-1].lower()
    return _RESULTS / f"{benchmark}_{device}_{datetime.now(timezone.utc).date().isoformat()}.json"
