"""Which tensors a quantised checkpoint in the released layout holds, from its config and the names it has."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from ..modeling.checkpoint.schemes import PACKED_METHODS, Schemes, quantization_fields

Shape = tuple[int, ...]


# Names below a linear layer that a method's files hold, where a config doesn't say which layers have them.
_NAMES = {
    "compressed-tensors": (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale",
        "input_scale", "input_zero_point", "input_global_scale",
    ),
    "fp8": ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "modelopt": ("weight_scale", "weight_scale_2", "input_scale"),
}  # fmt: skip


@dataclass(frozen=True)
class ExpectedTensors:
    """What a checkpoint should hold.

    Args:
        shapes: by name, the shapes that a tensor may have.
        accepted: names that it may hold besides.
        notes: what is worth knowing.
        dtypes: by name, the dtypes that a tensor of a quantised weight may have, where its format is known.
    """

    shapes: dict[str, tuple[Shape, ...]]
    accepted: frozenset[str]
    notes: list[str]
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)


def expected_tensors(
    config: KimiLinearConfig, released: Mapping[str, Shape], present: Mapping[str, Shape]
) -> ExpectedTensors:
    """The released tensors, with those that the config calls quantised in their stored form.

    Args:
        config: with its `quantization_config`, if it has one.
        released: shapes of the unquantised checkpoint.
        present: shapes of the checkpoint at hand.
    """
    plain = {name: (shape,) for name, shape in released.items()}
    fields = quantization_fields(config)
    if fields is None:
        return ExpectedTensors(plain, frozenset(), [])
    linear = {name.removesuffix(".weight"): shape for name, shape in released.items() if is_linear(name, shape)}
    method = fields["quant_method"] or "a method that is not named"
    try:
        described = method in PACKED_METHODS and (method == "fp8" or fields.get("config_groups"))
        schemes = Schemes(fields) if described else None
    except ValueError as reason:
        schemes, method = None, f"{method}; {reason}"
    if schemes is None:
        return _by_names(plain, linear, present, method)
    shapes, left_plain = dict(plain), []
    dtypes: dict[str, tuple[torch.dtype, ...]] = {}
    for layer, shape in linear.items():
        format = schemes.format_of(layer)
        if format is None:
            continue
        if f"{layer}.{format.disk_name(format.scale_name)}" not in present and f"{layer}.weight" in present:
            left_plain.append(layer)
            continue
        del shapes[f"{layer}.weight"]
        for name, (allowed, allowed_dtypes) in format.tensors(*shape).items():
            shapes[f"{layer}.{format.disk_name(name)}"] = allowed
            dtypes[f"{layer}.{format.disk_name(name)}"] = allowed_dtypes
    notes = [_KNOWN.format(method)]
    if left_plain:
        notes.append(
            f"quantization_config calls {len(left_plain)} layers quantised that the checkpoint holds unquantised, the "
            f"first is {left_plain[0]}; its ignore list should name them"
        )
    return ExpectedTensors(shapes, frozenset(), notes, dtypes)


_KNOWN = "quantised ({}): names were checked, not the numbers in its scales"


def _by_names(
    plain: dict[str, tuple[Shape, ...]], linear: Mapping[str, Shape], present: Mapping[str, Shape], method: str
) -> ExpectedTensors:
    """What goes by the names of a method alone: a layer has its weight, or packed numbers with their scales."""
    leaves = _NAMES.get(method, ())
    accepted = {f"{layer}.{leaf}" for layer in linear for leaf in leaves}
    shapes = dict(plain)
    for layer in linear:
        packed = all(f"{layer}.{leaf}" in present for leaf in ("weight_packed", "weight_scale") if leaf in leaves)
        packed = packed and "weight_packed" in leaves
        if packed or ("qweight" in leaves and f"{layer}.qweight" in present):
            del shapes[f"{layer}.weight"]
    if not leaves:
        shapes = {name: shape for name, shape in plain.items() if name.removesuffix(".weight") not in linear}
        accepted = {name for name in present if name.rpartition(".")[0] in linear}
    looked = _KNOWN.format(method) if method in PACKED_METHODS else None
    note = looked or f"quantised ({method}): whether an engine reads that format was not looked into"
    return ExpectedTensors(shapes, frozenset(accepted), [note])


def is_linear(name: str, shape: Shape) -> bool:
    """Whether a tensor is the weight of what other implementations hold as a linear layer."""
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(("embed_tokens.weight", ".gate.weight"))


__all__ = ["ExpectedTensors", "expected_tensors", "is_linear"]
