"""`load_state_dict` of experts: the released layout is read into the stacked parameters, row by row.

Trainer's resume, `load_best_model_at_end`, accelerate's loaders without a device map and `load_sharded_checkpoint` all
end in `Module.load_state_dict`, which knows nothing of transformers' conversions. `read_released_experts` is a
pre-hook of the experts module: it takes `{expert}.w1.weight` (gate), `.w3` (up) and `.w2` (down) out of the dictionary
and gives the stacked names back. The names that llm-compressor writes (gate_proj, up_proj, down_proj) are read too.
"""

from typing import Any

import torch
from torch import nn

# Leaf name -> (stacked parameter, which half of its second dimension).
_PLACES = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
_OTHER_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

# A row is (expert, leaf name). It maps to its tensor while it waits for the others, to None once it has been copied.
Rows = dict[tuple[int, str], torch.Tensor | None]


def read_released_experts(
    experts: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Pre-hook for `register_load_state_dict_pre_hook` of a module with `gate_up_proj` and `down_proj`.

    Rows may arrive over several calls, as shards do. Those that have not arrived yet are reported as missing, under
    their released names. Parameters that cannot be filled row by row (on meta, `assign=True`, DTensors) are built when
    their last row has arrived; until then the rows are kept on the module.

    Args:
        experts: the module, which keeps the rows of an unfinished load in `_rows_arrived`.
        state_dict: the dictionary of this module's `load_state_dict`; changed in place.
        prefix: of this module's names in it.
        local_metadata: torch's; says whether tensors are assigned instead of copied.
        strict: torch's, not needed.
        missing_keys: gets the released names of rows that have not arrived.
        unexpected_keys: torch's, not needed: it judges what is left in `state_dict` itself.
        error_msgs: gets a line for each expert tensor that has a wrong shape or that nobody reads; torch raises
            RuntimeError for them, with `strict=False` too.
    """
    rows = _take_rows(experts, state_dict, prefix, error_msgs)
    assign = local_metadata.get("assign_to_params_buffers", False)
    for name in ("gate_up_proj", "down_proj"):
        new = {row: tensor for row, tensor in rows.items() if _PLACES[row[1]][0] == name}
        stacked = prefix + name
        if stacked in state_dict and not (new and _is_own(state_dict[stacked], getattr(experts, name))):
            experts._rows_arrived.pop(name, None)
            if new:
                expert, leaf = next(iter(new))
                error_msgs.append(f"both {stacked} and {prefix}{expert}.{leaf}.weight are given: keep one of them")
        elif new:
            arrived = experts._rows_arrived.get(name, {})
            if arrived.keys() & new.keys():
                arrived = {}  # another load has begun
            state_dict[stacked] = _fill(experts, name, arrived | new, assign)
            missing = _expected_rows(experts, name) - experts._rows_arrived.get(name, {}).keys()
            if name in experts._rows_arrived:
                missing_keys += [f"{prefix}{expert}.{leaf}.weight" for expert, leaf in sorted(missing)]


def _is_own(given: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether `given` is the parameter itself, which torch's `set_model_state_dict` adds to the file's tensors."""
    if given.is_meta or hasattr(parameter, "placements"):
        return given is parameter or given.is_meta
    return given.shape == parameter.shape and given.data_ptr() == parameter.data_ptr()


def _take_rows(experts: nn.Module, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> Rows:
    """Take the released tensors of single experts out of `state_dict`."""
    rows: Rows = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        expert, _, rest = key[len(prefix) :].partition(".")
        if not expert.isdigit():
            continue
        leaf, _, kind = rest.partition(".")
        leaf = _OTHER_NAMES.get(leaf, leaf)
        tensor = state_dict.pop(key)
        if leaf not in _PLACES or kind != "weight" or int(expert) >= experts.num_experts:
            error_msgs.append(
                f"nobody reads {key}: experts are 0..{experts.num_experts - 1} with w1.weight, w2.weight, w3.weight. "
                "Quantised files are loaded by from_pretrained."
            )
        elif tuple(tensor.shape) != _row_shape(experts, leaf):
            error_msgs.append(f"size mismatch for {key}: {list(tensor.shape)}, not {list(_row_shape(experts, leaf))}")
        elif (int(expert), leaf) in rows:
            error_msgs.append(f"{key} is given twice, under {leaf} and its other name")
        else:
            rows[int(expert), leaf] = tensor
    return rows


def _row_shape(experts: nn.Module, leaf: str) -> tuple[int, int]:
    inner, hidden = experts.intermediate_dim, experts.hidden_dim
    return (hidden, inner) if leaf == "w2" else (inner, hidden)


def _expected_rows(experts: nn.Module, name: str) -> set[tuple[int, str]]:
    leaves = [leaf for leaf, (parameter, _) in _PLACES.items() if parameter == name]
    return {(expert, leaf) for expert in range(experts.num_experts) for leaf in leaves}


def _fill(experts: nn.Module, name: str, rows: Rows, assign: bool) -> torch.Tensor:
    """Bring `rows` into the parameter; returns what torch is to load under its stacked name."""
    parameter = getattr(experts, name)
    complete = rows.keys() == _expected_rows(experts, name)
    # torch reports a parameter that finds no tensor; giving it to itself changes nothing.
    loaded: torch.Tensor = parameter
    if not (assign or parameter.is_meta or hasattr(parameter, "placements")):
        with torch.no_grad():
            for (expert, leaf), tensor in rows.items():
                if tensor is not None:
                    _place(parameter, expert, leaf).copy_(tensor)
        rows = dict.fromkeys(rows)
    elif complete:
        loaded = _stack(experts, name, rows)
        if hasattr(parameter, "placements"):
            # Every rank has read the whole file: no rank needs to send its part to another.
            loaded = torch.distributed.tensor.distribute_tensor(
                loaded.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
    experts._rows_arrived[name] = rows
    if complete:
        del experts._rows_arrived[name]
    return loaded


def _place(stacked: torch.Tensor, expert: int, leaf: str) -> torch.Tensor:
    """The view of `stacked` that holds one row."""
    name, half = _PLACES[leaf]
    return stacked[expert] if name == "down_proj" else stacked[expert].chunk(2, dim=0)[half]


def _stack(experts: nn.Module, name: str, rows: Rows) -> torch.Tensor:
    """The stacked tensor of all rows, in their own dtype and on their device."""
    first = next(tensor for tensor in rows.values() if tensor is not None)
    stacked = torch.empty(getattr(experts, name).shape, dtype=first.dtype, device=first.device)
    for (expert, leaf), tensor in rows.items():
        _place(stacked, expert, leaf).copy_(tensor)
    return stacked


def expect_filled(experts: nn.Module) -> None:
    """Raise ValueError if no loader and no initialisation has filled the experts; asked at their first forward.

    Parameters are made as NaN. Loaders that go by names alone, like accelerate's with a device map, leave them so.
    """
    unfilled: set[int] = set()
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(experts, name).detach()
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if local.ndim != 3 or local.is_meta or local.numel() == 0 or not local.is_floating_point():
            continue
        ends = torch.stack([local[:, 0, 0], local[:, -1, -1]], dim=1).float()
        unfilled |= set(ends.isnan().any(dim=1).nonzero().flatten().tolist())
    if unfilled:
        raise ValueError(
            f"experts {sorted(unfilled)} of a layer hold NaN: no tensor of the checkpoint has filled them, or its own "
            "hold NaN, as after a training run that diverged. Load the folder with from_pretrained(..., "
            "device_map=...); accelerate's load_checkpoint_and_dispatch goes by names and skips the released names of "
            "experts"
        )


__all__ = ["expect_filled", "read_released_experts"]
