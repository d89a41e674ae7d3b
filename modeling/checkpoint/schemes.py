"""What `quantization_config` says of each linear layer: its weight's format, or that it is not quantised.

Fields are those of compressed-tensors and of transformers' FP8 config, as they stand in config.json. The library's
config objects are turned back into these fields, so that a config read by either side gives the same answer.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from ...kernels.weights.formats import FLOATS, WeightFormat

# Methods whose weights are packed when the checkpoint is read. The library quantises linear layers of the others.
PACKED_METHODS = ("compressed-tensors", "fp8")
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def quantization_fields(config: Any) -> dict[str, Any] | None:
    """`config.quantization_config` as a dictionary, whether it is one, an object of transformers, or absent."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    fields = dict(given if isinstance(given, dict) else given.to_dict())
    fields["quant_method"] = method_of(fields)
    return fields


def method_of(fields: dict[str, Any]) -> str:
    """Name of the quantisation method; "" if the fields don't say it."""
    method = fields.get("quant_method")
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(method, "value", method) or "").lower()


class Schemes:
    """The format of each linear layer by its released name.

    Args:
        fields: of a `quantization_config` whose method is one of PACKED_METHODS.
        output_layer: released name of the output layer, which the FP8 method leaves out by default.

    Raises:
        ValueError: for a format, or a part of it, that cannot be read; the message names the field.
    """

    def __init__(self, fields: dict[str, Any], output_layer: str = "lm_head") -> None:
        self._kept_out: list[str] | None = None
        self._groups: list[tuple[str, WeightFormat | None]] = []
        self._ignore = _Names(fields.get("ignore") or [])
        if fields["quant_method"] == "fp8":
            skipped = fields.get("modules_to_not_convert")
            self._kept_out = [output_layer] if skipped is None else list(skipped)
            self._fp8 = fp8_format(fields)
            return
        _refuse_other_parts(fields)
        for group in (fields.get("config_groups") or {}).values():
            if not isinstance(group, dict):
                raise ValueError(
                    f"quantization_config names a preset scheme ({group!r}) in config_groups: write its fields out"
                )
            format = compressed_format(group, fields.get("format"))
            self._groups += [(target, format) for target in group["targets"]]
        # As compressed-tensors: exact names before regular expressions before classes.
        self._groups.sort(key=lambda item: (_kind(item[0]), item[0]))
        self._targets = [(_Names([target]), format) for target, format in self._groups]

    def format_of(self, name: str) -> WeightFormat | None:
        """Format of the linear layer with this released name; None if it is not quantised."""
        if self._kept_out is not None:
            return self._fp8 if should_convert_module(name, self._kept_out) else None
        if self._ignore.match(name):
            return None
        return next((format for target, format in self._targets if target.match(name)), None)

    def format_of_all(self, names: Iterable[str]) -> WeightFormat | None:
        """The one format of several layers that are held in one stack.

        Raises:
            ValueError: if they differ; the message names two of them.
        """
        first, found = None, None
        for name in names:
            format = self.format_of(name)
            if first is None:
                first, found = name, format
            elif format != found:
                raise ValueError(
                    f"quantization_config gives {name} the format {_said(format)} and {first} {_said(found)}: experts "
                    "of a layer are held in one stack, so w1 and w3 of all of them, and w2 of all, need one format"
                )
        return found


def _said(format: WeightFormat | None) -> str:
    return "of unquantised weights" if format is None else repr(format.name)


def _kind(target: str) -> int:
    if target.startswith("re:"):
        return 1
    return 2 if target in _LINEAR_CLASSES else 0


_LINEAR_CLASSES = ("Linear", "LinearBase", "Module")


class _Names:
    """Patterns of compressed-tensors for names of linear layers: exact, `re:...`, or a class."""

    def __init__(self, patterns: list[str]) -> None:
        self._all = any(pattern in _LINEAR_CLASSES for pattern in patterns)
        self._exact = {pattern for pattern in patterns if not pattern.startswith("re:")}
        self._expressions = [re.compile(pattern[3:]) for pattern in patterns if pattern.startswith("re:")]

    def match(self, name: str) -> bool:
        return self._all or name in self._exact or any(expression.match(name) for expression in self._expressions)


def _refuse_other_parts(fields: dict[str, Any]) -> None:
    """Parts of a compressed-tensors config that change what the model computes and that this package cannot follow."""
    reasons = {
        "kv_cache_scheme": "a quantised key-value cache, which MLA latents and KDA states have no form for",
        "sparsity_config": "sparse weights",
        "transform_config": "transforms of weights and activations",
    }
    for name, reason in reasons.items():
        value = fields.get(name)
        if isinstance(value, dict) and value and value.get("format", "") != "dense":
            raise ValueError(
                f"quantization_config has {name}={value!r}: {reason}. This package cannot read that; quantise the "
                "weights alone (llm-compressor, W4A16 or FP8_DYNAMIC)"
            )


def compressed_format(group: dict[str, Any], format: str | None) -> WeightFormat | None:
    """The format that a group of a compressed-tensors config describes; None if it leaves the weights alone.

    Args:
        group: with `weights`, `input_activations`, `output_activations` and maybe `format`.
        format: of the whole config, for groups that name none.

    Raises:
        ValueError: for a format that cannot be read.
    """
    weights = group.get("weights")
    if weights is None:
        return None
    if group.get("output_activations"):
        raise ValueError("quantization_config has output_activations in a group: this package cannot read that")
    named = group.get("format") or format
    named = str(getattr(named, "value", named))
    kind, bits, symmetric = str(weights.get("type", "int")), weights.get("num_bits", 8), weights.get("symmetric", True)
    if named in ("mixed-precision", "naive-quantized", "None"):
        named = _inferred_format(group, naive=named == "naive-quantized")
    strategy, block = _reach(weights)
    size = {"group": f"groups of {block and block[1]}", "block": f"blocks of {block}"}.get(strategy, strategy)
    common = {"bits": bits, "strategy": strategy, "block": block, "activations": _activations(group)}
    name = f"{named} {kind}{bits}, {size}{'' if symmetric else ', asymmetric'}"
    if named == "pack-quantized" and kind == "int" and 1 <= bits <= 8:
        return WeightFormat(name, "int32", symmetric=symmetric, has_shape=True, **common)
    if named == "int-quantized" and kind == "int" and bits <= 8:
        return WeightFormat(name, "int8", symmetric=symmetric, **common)
    if kind == "float" and symmetric:
        if named == "float-quantized" and bits == 8:
            return WeightFormat(name, "fp8", **common)
        if named == "mxfp8-quantized" and bits == 8 and strategy == "group":
            return WeightFormat(name, "fp8", scale_dtypes=_EXPONENTS, **common)
        if named == "nvfp4-pack-quantized" and bits == 4 and strategy == "group":
            return WeightFormat(name, "fp4", scale_dtypes=(torch.float8_e4m3fn,), two_level=True, **common)
        if named == "mxfp4-pack-quantized" and bits == 4 and strategy == "group":
            return WeightFormat(name, "fp4", scale_dtypes=_EXPONENTS, **common)
    raise ValueError(
        f"quantization_config has the format {name!r}, which this package cannot read. It reads pack-quantized, "
        "int-quantized, float-quantized, mxfp8-quantized, nvfp4-pack-quantized and mxfp4-pack-quantized; quantise the "
        "bf16 checkpoint to one of them (llm-compressor)"
    )


def _inferred_format(group: dict[str, Any], naive: bool) -> str:
    """The format of a group that names none, by compressed-tensors' own rules.

    Args:
        group: with `weights` and `input_activations`.
        naive: whether each number is stored in the nearest dtype of its own.
    """
    weights = group["weights"]
    if weights.get("type", "int") == "int":
        return "int-quantized" if naive or group.get("input_activations") else "pack-quantized"
    exponents = weights.get("group_size") == 32 and "uint8" in str(weights.get("scale_dtype"))
    if weights.get("num_bits", 8) == 4:
        return "mxfp4-pack-quantized" if weights.get("group_size") == 32 else "nvfp4-pack-quantized"
    return "mxfp8-quantized" if exponents and not naive else "float-quantized"


def _reach(weights: dict[str, Any]) -> tuple[str, tuple[int, int] | None]:
    """(strategy, block) of compressed-tensors' weight arguments."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    strategy = str(getattr(strategy, "value", strategy)) if strategy is not None else None
    if strategy is None:
        strategy = "tensor" if size is None else ("channel" if size == -1 else "group")
    if strategy in ("group", "tensor_group"):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"quantization_config has group_size={size!r}: strategy {strategy!r} needs a positive one")
        return "group", (1, size)
    if strategy == "block":
        rows, columns = weights["block_structure"]
        return "block", (rows, columns)
    if strategy not in ("tensor", "channel"):
        raise ValueError(f"quantization_config has strategy={strategy!r} for weights, which this package cannot read")
    return strategy, None


def _activations(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the tensors that a group stores for its activations."""
    inputs = group.get("input_activations")
    if not inputs or inputs.get("dynamic") is True:
        return ()
    if inputs.get("strategy") == "tensor_group":
        return ("input_global_scale",)
    return ("input_scale",) if inputs.get("symmetric", True) else ("input_scale", "input_zero_point")


def fp8_format(fields: dict[str, Any]) -> WeightFormat:
    """The format that transformers' FP8 config describes (DeepSeek's blocks, or one scale a weight).

    Raises:
        ValueError: for parts of it that cannot be read.
    """
    for name, plain in (("expert_dtype", "fp8"), ("modules_to_convert", None)):
        if fields.get(name, plain) not in (plain, []):
            raise ValueError(f"quantization_config has {name}={fields[name]!r}, which this package cannot read")
    given = fields.get("weight_block_size", (128, 128))
    block = None if given is None else (int(given[0]), int(given[1]))
    exponents = fields.get("scale_fmt") == "ue8m0"
    return WeightFormat(
        f"fp8, blocks of {block}" if block else "fp8, tensor",
        "fp8",
        bits=8,
        strategy="block" if block else "tensor",
        block=block,
        scale_dtypes=_EXPONENTS if exponents else FLOATS,
        scale_name="scale_inv",
        activations=("activation_scale",) if fields.get("activation_scheme") == "static" else (),
    )


__all__ = ["PACKED_METHODS", "Schemes", "compressed_format", "fp8_format", "method_of", "quantization_fields"]
