"""Which tensors a quantised checkpoint in the released layout holds, from its config and the names it has."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from ..modeling.checkpoint.schemes import PACKED_METHODS, Schemes, quantization_fields

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpectedTensors:
    """What a checkpoint should hold.

    Args:
        shapes: by name, the shapes that a tensor may have.
        unjudged: linear layers whose tensors, under whatever names, say nothing: the format is not known here.
        notes: what is worth knowing.
    """

    shapes: dict[str, tuple[Shape, ...]]
    unjudged: frozenset[str]
    notes: list[str]


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
    linear = {name.removesuffix(".weight"): shape for name, shape in released.items() if _is_linear(name, shape)}
    method = fields["quant_method"] or "one that is not named"
    try:
        schemes = Schemes(fields) if method in PACKED_METHODS else None
    except ValueError as reason:
        schemes, method = None, f"{method} ({reason})"
    if schemes is None:
        shapes = {name: shape for name, shape in plain.items() if name.removesuffix(".weight") not in linear}
        note = f"the quantisation method is {method}: its tensors were not looked at"
        return ExpectedTensors(shapes, frozenset(linear), [note])
    shapes, left_plain = dict(plain), []
    for layer, shape in linear.items():
        format = schemes.format_of(layer)
        if format is None:
            continue
        if f"{layer}.{format.disk_name(format.scale_name)}" not in present and f"{layer}.weight" in present:
            left_plain.append(layer)
            continue
        del shapes[f"{layer}.weight"]
        for name, (allowed, _) in format.tensors(*shape).items():
            shapes[f"{layer}.{format.disk_name(name)}"] = allowed
    notes = [f"weights are quantised ({method}): whether an engine has kernels for the format was not looked into"]
    if left_plain:
        notes.append(
            f"quantization_config calls {len(left_plain)} layers quantised that the checkpoint holds unquantised, the "
            f"first is {left_plain[0]}; its ignore list should name them"
        )
    return ExpectedTensors(shapes, frozenset(), notes)


def _is_linear(name: str, shape: Shape) -> bool:
    """Whether a tensor is the weight of what other implementations hold as a linear layer."""
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(("embed_tokens.weight", ".gate.weight"))


__all__ = ["ExpectedTensors", "expected_tensors"]
