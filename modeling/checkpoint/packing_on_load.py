"""bitsandbytes and torchao quantise linear layers and leave the experts in bf16: here the experts are packed, too."""

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from ...kernels.weights.formats import WeightFormat
from ...kernels.weights.packing import pack_weight
from .packed_modules import KimiPackedExperts
from .schemes import compressed_format

logger = logging.get_logger(__name__)

_GROUPS = (32, 16, 8)


def experts_format(config: Any, fields: dict[str, Any] | None) -> WeightFormat | None:
    """The format that experts are packed in while a bf16 checkpoint is loaded; None to leave them dense.

    `config.packed_experts` decides: False leaves them, a group of compressed-tensors is what they get (and what a
    checkpoint says that was saved so), None takes the width of the library's config, which is noted there.

    Args:
        config: of the model; changed in the last case.
        fields: of its quantization_config, or None.

    Raises:
        ValueError: for a `packed_experts` that is none of these.
    """
    given = config.packed_experts
    if given is False or not config.num_experts:
        return None
    if given is None:
        given = _group_of_same_width(config, fields)
        if given is None:
            return None
        config.packed_experts = given
    if not isinstance(given, dict) or "weights" not in given:
        raise ValueError(
            f"packed_experts={given!r} must be None, False, or a group of compressed-tensors (`format`, `weights`)"
        )
    return compressed_format(given, None)


def _group_of_same_width(config: Any, fields: dict[str, Any] | None) -> dict[str, Any] | None:
    kind = _width(fields or {})
    skipped = (fields or {}).get("llm_int8_skip_modules") or (fields or {}).get("modules_to_not_convert")
    sparse = [i for i, name in enumerate(config.mlp_layer_types) if name == "sparse"]
    if kind is None or not sparse:
        return None
    if skipped and not should_convert_module(f"model.layers.{sparse[0]}.block_sparse_moe.experts", list(skipped)):
        return None
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    format = "int-quantized"
    if kind == "fp8":
        weights, format = {**weights, "type": "float"}, "float-quantized"
    if kind == "int4":
        widths = config.hidden_size, config.moe_intermediate_size
        size = next((size for size in _GROUPS if all(width % size == 0 for width in widths)), None)
        reach = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
        weights, format = {**weights, "num_bits": 4, **reach}, "pack-quantized"
    group = {"format": format, "weights": weights}
    logger.warning_once(
        f"{fields['quant_method']} leaves the routed experts as they are; they are packed as "
        f"{compressed_format(group, None).name} while they are loaded. packed_experts=False keeps them dense."
    )
    return group


def _width(fields: dict[str, Any]) -> str | None:
    """How a bitsandbytes or torchao config quantises weights: "int8", "int4", "fp8", or None for another way."""
    if fields.get("quant_method") == "bitsandbytes":
        return "int8" if fields.get("load_in_8bit") else "int4"
    if fields.get("quant_method") != "torchao":
        return None
    given = (fields.get("quant_type") or {}).get("default") or {}
    name = str(given.get("_type", ""))
    widths = {
        "Int8WeightOnlyConfig": "int8",
        "Int8DynamicActivationInt8WeightConfig": "int8",
        "Int4WeightOnlyConfig": "int4",
        "Float8WeightOnlyConfig": "fp8",
        "Float8DynamicActivationFloat8WeightConfig": "fp8",
        "Float8DynamicActivationInt4WeightConfig": "int4",
    }
    return widths.get(name)


class PackExperts(ConversionOps):
    """Dense tensors of single experts to the packed stacks, expert by expert.

    Args:
        format: to pack in.
        target: pattern of the stacks' names before `_packed`, `_scale`, ...
    """

    def __init__(self, format: WeightFormat, target: str) -> None:
        self.format, self.target = format, target

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """{source pattern: tensors of all experts} -> {name of each stack: the stack}."""
        lists = [input_dict.pop(pattern, []) for pattern in source_patterns]
        if len({len(tensors) for tensors in lists}) != 1 or not lists[0]:
            raise ValueError(f"the checkpoint lacks tensors of some experts: {[len(tensors) for tensors in lists]}")
        stacks: dict[str, torch.Tensor] = {}
        for index, tensors in enumerate(lists):
            for expert, weight in enumerate(tensors):
                for name, part in pack_weight(weight, self.format, weight.dtype).items():
                    self._place(stacks, name, part, expert, index, (len(tensors), len(lists)))
                tensors[expert] = None
        return {f"{self.target}_{name}": stack for name, stack in stacks.items()}

    def _place(
        self,
        stacks: dict[str, torch.Tensor],
        name: str,
        part: torch.Tensor,
        expert: int,
        index: int,
        counts: tuple[int, int],
    ) -> None:
        by_rows = self.format.by_rows(name)
        if name not in stacks:
            shape = (counts[1] * part.shape[0], *part.shape[1:]) if by_rows else (counts[1], *part.shape)
            stacks[name] = part.new_empty(counts[0], *shape)
        room = stacks[name][expert].chunk(counts[1], dim=0)[index] if by_rows else stacks[name][expert, index]
        room.copy_(part)


def packing_converters(pattern: str, experts: KimiPackedExperts) -> list[Any]:
    """Converters from the released dense layout to packed experts.

    The only target that transformers is told of is the scale, because it casts what it reads to the target's dtype;
    the operation brings the other names.
    """
    result = []
    for projection, format in experts.formats.items():
        sources = [f"{pattern}.*.{leaf}.weight" for leaf in experts.leaves(projection)]
        target = f"{pattern}.{projection}"
        operation = PackExperts(format, target)
        result.append(WeightConverter(sources, f"{target}_{format.scale_name}", operations=[operation]))
    return result


__all__ = ["PackExperts", "experts_format", "packing_converters"]
