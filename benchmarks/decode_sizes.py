"""Captured steps by rows: whether any size lies above the line between its neighbours, and what an adapter costs."""

from typing import Any

import torch

from benchmarks.full_model import random_cache, read_bandwidth, step_bytes
from kimi_linear.hub_card.measure.timing import replay_ms

try:
    import peft
except ImportError:
    peft = None

# Rows that have goals (issue 19), and some of those between them.
NEIGHBOURS = (1, 8, 32, 64, 128, 256, 512)
BETWEEN = (2, 3, 5, 12, 16, 24, 33, 48, 65, 96, 129, 192, 257, 384)
MOST_ABOVE_LINE = 1.15


@torch.no_grad()
def measure_sizes(model: Any, context: int, sizes: list[int]) -> list[dict[str, Any]]:
    """One row a size, in order: ms of a step, the limit's, experts that the last layer read, and `of_line`.

    `of_line` is the time over that of the line between the two nearest of `NEIGHBOURS`, 1 for those themselves.
    """
    rows = [_measure(model, context, size) for size in sorted({*NEIGHBOURS, *sizes})]
    known = {row["rows"]: row["step_ms"] for row in rows}
    for row in rows:
        row["of_line"] = row["step_ms"] / _line(row["rows"], known)
    return rows


def _measure(model: Any, context: int, size: int) -> dict[str, Any]:
    step, cache = model._decode.step(model, size, 1), random_cache(model, size, context)
    return {
        "rows": size,
        "step_ms": replay_ms(step, cache, 24),
        "limit_ms": step_bytes(model, size, context) / read_bandwidth() * 1e3,
        "experts_read": max(int(plan.chosen.unique().numel()) for plan in step.plans),
    }


def _line(size: int, known: dict[int, float]) -> float:
    below = max(n for n in NEIGHBOURS if n <= size)
    above = min((n for n in NEIGHBOURS if n >= size), default=below)
    share = (size - below) / (above - below) if above > below else 0.0
    return known[below] + share * (known[above] - known[below])


def show_sizes(rows: list[dict[str, Any]]) -> None:
    """Print what `measure_sizes` gave."""
    print("rows |   step |  limit | experts | of the line between its neighbours")
    for row in rows:
        mark = "  ABOVE" if row["of_line"] > MOST_ABOVE_LINE else ""
        print(
            f"{row['rows']:4} | {row['step_ms']:6.2f} | {row['limit_ms']:6.2f} | {row['experts_read']:7} | "
            f"{row['of_line']:.2f}{mark}",
            flush=True,
        )


def add_lora(model: Any, rank: int) -> Any:
    """PEFT's LoRA of `rank` on q, k, v, o and both stacked projections of the experts, unmerged, factors random.

    The factors have the model's dtype, as training in it has; PEFT's default for bf16 is fp32.
    """
    if peft is None:
        raise SystemExit("--lora needs peft: pip install peft")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.02)
    return wrapped
