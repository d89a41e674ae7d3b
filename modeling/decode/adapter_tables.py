"""What the launches of adapters read: of linears that share an input, one table (kernels/decode/adapters.py)."""

from typing import Any, NamedTuple

import torch

from ...kernels.decode.adapters import adapter_splits
from ..plain_adapters import adapter_of, wraps


class AdapterTable(NamedTuple):
    """Arguments of `decode_adapters`."""

    factors: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor
    columns: int
    most_rank: int
    most_rows: int


@torch.inference_mode(False)
def adapter_table(modules: list[Any], x_columns: tuple[int, ...] | None, device: torch.device) -> AdapterTable | None:
    """The table of the adapters of `modules`, whose outputs lie side by side; None if they have none.

    Args:
        modules: linears of equal input width, wrapped or not.
        x_columns: first column of the input of each; 0 for all if None.
        device: where the table is to be.
    """
    entries, scales, factors, y_column, t_column = [], [], [], 0, 0
    for module, x_column in zip(modules, x_columns or [0] * len(modules)):
        adapter = adapter_of(module)
        if adapter is not None:
            (rank, _), rows = adapter.down.shape, adapter.up.shape[0]
            entries.append((adapter.down.data_ptr(), adapter.up.data_ptr(), rank, rows, x_column, t_column, y_column))
            scales.append(adapter.scale)
            factors.append(adapter)
            t_column += rank
        y_column += module.weight.shape[0]
    if not entries:
        return None
    held = AdapterTable(
        factors[0].down.detach(),
        torch.tensor(entries, dtype=torch.int64, device=device),
        torch.tensor(scales, dtype=torch.float32, device=device),
        factors[0].down.shape[1],
        max(rank for _, _, rank, *_ in entries),
        max(rows for _, _, _, rows, *_ in entries),
    )
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read it too
    return held


def workspace_elements(modules: Any, tokens: int, topk: int) -> int:
    """fp32 elements that one launch's inner products take at most, of any group of linears or experts of `modules`.

    Args:
        modules: of one layer, or of the head.
        tokens: of the step.
        topk: experts of each.
    """
    ranks, experts = 0, 0
    for module in modules:
        adapter = adapter_of(module) if wraps(module) else None
        if adapter is None:
            continue
        if hasattr(module, "num_experts"):
            experts = max(experts, adapter.down.shape[0] // module.num_experts)
        else:
            ranks += adapter.down.shape[0]
    return max(ranks * tokens * adapter_splits(tokens, 1 << 20), experts * tokens * topk)


__all__ = ["AdapterTable", "adapter_table", "workspace_elements"]
