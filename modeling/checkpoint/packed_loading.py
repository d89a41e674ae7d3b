"""Quantised checkpoints: packed modules in place of dense ones, and the way of their tensors from disk and back.

A model is packed when it is built, so that `device_map="auto"` counts packed bytes. Before the weights are read their
headers are compared with what the config says; after it the values are looked at.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils import logging

from ..layers.moe import KimiExperts, KimiSparseMoeBlock
from .packed_dequantise import settle_dequantisation
from .packed_modules import KimiPackedExperts, KimiPackedLinear
from .packed_state_dict import adopt
from .refusals import read_headers, refuse_unannounced
from .schemes import PACKED_METHODS, Schemes, quantization_fields

logger = logging.get_logger(__name__)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


# Building


def pack_modules(model: Any) -> None:
    """Replace the layers that `config.quantization_config` calls quantised by packed ones; others stay.

    Runs at the end of every `__init__`, and again once transformers' quantizer has replaced modules of its own.

    Raises:
        ValueError: for a config that cannot be read; the message names the field.
    """
    fields = quantization_fields(model.config)
    if fields is None or fields["quant_method"] not in PACKED_METHODS:
        return
    schemes = Schemes(fields)
    for name, module in list(model.named_modules()):
        if isinstance(module, KimiSparseMoeBlock):
            _pack_experts(module, _released(model, f"{name}.experts"), schemes, model)
        elif isinstance(module, nn.Linear) and not isinstance(module, KimiPackedLinear):
            released = _released(model, name)
            # Heads of other tasks (`score`) are not in the checkpoint.
            format = schemes.format_of(released) if released.startswith(("model.", "lm_head")) else None
            sizes = module.in_features, module.out_features
            if format is not None:
                model.set_submodule(name, KimiPackedLinear(*sizes, format, model.dtype, model.device))
            elif type(module) is not nn.Linear or hasattr(module, "quantization_scheme"):
                # The quantizer goes by names in the model, where the decoder on its own lacks the prefix.
                plain = nn.Linear(*sizes, bias=False, dtype=model.dtype, device=model.device)
                model.set_submodule(name, plain)
    if any(isinstance(module, KimiPackedExperts) for module in model.modules()):
        # The exact path reads which experts were chosen back from the device.
        model._can_compile_fullgraph = False


def _pack_experts(block: KimiSparseMoeBlock, name: str, schemes: Schemes, model: Any) -> None:
    experts, config = block.experts, model.config
    if isinstance(experts, KimiPackedExperts):
        return
    formats = {}
    for projection in ("gate_up_proj", "down_proj"):
        leaves = KimiPackedExperts.leaves(projection)
        names = [f"{name}.{expert}.{leaf}" for expert in range(config.num_experts) for leaf in leaves]
        formats[projection] = schemes.format_of_all(names)
    if not any(formats.values()):
        if not isinstance(experts, KimiExperts):  # transformers' FP8 quantizer has replaced them
            with model.device:
                block.experts = KimiExperts(config).to(model.dtype)
        return
    if not all(formats.values()):
        raise ValueError(
            f"quantization_config quantises only some of w1, w3 and w2 in {name}: this package holds all or none packed"
        )
    sizes = config.num_experts, config.hidden_size, config.moe_intermediate_size
    block.experts = KimiPackedExperts(*sizes, formats, model.dtype, model.device)


def _released(model: Any, name: str) -> str:
    """Released name of a module: the decoder on its own lacks the prefix."""
    return name if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}.{name}"


def packed_modules(model: nn.Module) -> dict[str, KimiPackedLinear | KimiPackedExperts]:
    """The packed modules of a model by their names in it."""
    kinds = (KimiPackedLinear, KimiPackedExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


# Loading


def prepare_packed(model: Any, files: list[str] | None, load_config: Any) -> None:
    """Compare the checkpoint's headers with what the model is going to read, and make room for its dtypes.

    Raises:
        ValueError: for a tensor of a wrong shape or dtype, and for quantised tensors that nobody would read; the
            message names tensor and rule.
        NotImplementedError: for tensor parallelism.
    """
    modules = packed_modules(model)
    fields = quantization_fields(model.config)
    if fields is not None and fields["quant_method"] not in PACKED_METHODS:
        return  # bitsandbytes and torchao have tensors of their own
    if modules and load_config.device_mesh is not None:
        raise NotImplementedError(
            "quantised checkpoints cannot be loaded with tensor parallelism: packed weights have no plan for cutting "
            "groups. Leave tp_plan and distributed_config out, and use device_map"
        )
    header = read_headers(files)
    understood = set()
    for name, module in modules.items():
        released = _released(model, name)
        adopted = set()
        for place in module.places():
            full = f"{released}.{place.released}"
            key = next((key for key in (full, full.removeprefix(f"{model.base_model_prefix}.")) if key in header), None)
            if key is None:
                continue
            understood.add(key)
            shape, dtype = header[key]
            if (place.attribute, shape, dtype) not in adopted:
                adopt(module, place, shape, _DTYPES.get(dtype, torch.bool), key)
                adopted.add((place.attribute, shape, dtype))
    refuse_unannounced(header, understood)


def finish_packed(model: Any, load_config: Any, missing: set[str]) -> None:
    """Freeze packed weights, look at their values, and take compressed-tensors' hook off the model.

    Raises:
        ValueError: for missing tensors, and for scales or shapes that cannot be right; the message names the tensor.
    """
    modules = packed_modules(model)
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        _check_complete(model, name, module, missing)
        _check_values(_released(model, name), module)
    quantizer = load_config.hf_quantizer
    if hasattr(model, "ct_decompress_hook"):
        # compressed-tensors would unpack what it had packed at the first forward. It has packed nothing here.
        quantizer.compressor.remove_decompression_hook(model)
    if modules and quantizer is not None:
        settle_dequantisation(model, quantizer)


def _check_complete(model: Any, name: str, module: Any, missing: set[str]) -> None:
    for place in module.places():
        if f"{name}.{place.attribute}" in missing:
            raise ValueError(
                f"the checkpoint lacks {_released(model, name)}.{place.released}, though its quantization_config says "
                f"that the layer is quantised ({module.extra_repr()}); add the layer to the config's ignore list "
                "(modules_to_not_convert for fp8) if its weight is stored unquantised"
            )


def _check_values(released: str, module: Any) -> None:
    """Scales are finite, and shapes are those of the layer. Tensors that are offloaded have been left on disk."""
    wrong = {}
    for place in module.places():
        if place.attribute in wrong:
            continue
        held = getattr(module, place.attribute)
        if held.is_meta or place.name in ("packed", "zero_point"):
            wrong[place.attribute] = False
        elif place.name == "shape":
            format = module.formats[place.projection] if place.projection else module.format
            wrong[place.attribute] = _first_wrong_shape(released, module, place.attribute, format)
        else:
            wrong[place.attribute] = not bool(_finite(held))
    for place in module.places():
        if wrong[place.attribute] and not bool(_finite(module.room(place))):
            raise ValueError(
                f"{released}.{place.released} is damaged: a scale of a quantised weight is NaN or infinite. Download "
                "the file again, or quantise the layer again"
            )


def _finite(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.uint8:
        return (values != 255).all()
    return values.float().isfinite().all()


def _first_wrong_shape(released: str, module: Any, attribute: str, format: Any) -> bool:
    held = getattr(module, attribute)
    places = [place for place in module.places() if place.attribute == attribute]
    sizes = module.shape_of(places[0].projection) if places[0].projection else (module.out_features, module.in_features)
    if bool((held == torch.tensor(sizes, device=held.device)).all()):
        return False
    for place in places:
        said = module.room(place).tolist()
        if said != list(sizes):
            raise ValueError(
                f"{released}.{place.released} says {said}, but the layer, quantised as {format.name}, is {list(sizes)}"
            )
    return False


# Names


class StackExperts(ConversionOps):
    """Tensors of single experts, w1 and w3 or w2, to one stack: each tensor is copied once, into its place.

    Args:
        by_rows: whether the tensors of w1 and w3 are put one below the other; else side by side, as [E, 2, ...].
    """

    def __init__(self, by_rows: bool) -> None:
        self.by_rows = by_rows

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """{source pattern: tensors of all experts} -> {target pattern: the stack}."""
        lists = [input_dict.pop(pattern, []) for pattern in source_patterns]
        counts = {len(tensors) for tensors in lists}
        if len(counts) != 1 or counts == {0}:
            held = {pattern: len(tensors) for pattern, tensors in zip(source_patterns, lists)}
            raise ValueError(f"the checkpoint holds quantised tensors of some experts only: {held}")
        first = lists[0][0]
        parts, experts = len(lists), len(lists[0])
        shape = (parts * first.shape[0], *first.shape[1:]) if self.by_rows else (parts, *first.shape)
        stack = first.new_empty(experts, *shape)
        for index, tensors in enumerate(lists):
            for expert in range(experts):
                room = stack[expert].chunk(parts, dim=0)[index] if self.by_rows else stack[expert, index]
                room.copy_(tensors[expert])
                tensors[expert] = None  # its memory is free as soon as it is copied
        return {target_patterns[0]: stack}

    @property
    def reverse_op(self) -> ConversionOps:
        """Unstacks."""
        return UnstackExperts(self.by_rows)


class UnstackExperts(ConversionOps):
    """The reverse of `StackExperts`, shapes included: transformers' own squeezes [rows, 1] before 5.23."""

    def __init__(self, by_rows: bool) -> None:
        self.by_rows = by_rows

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """{stack's pattern: the stack} -> {pattern of w1, w3 or w2 with the expert's number: tensor}."""
        (stack,) = input_dict.values()
        stack = stack[0] if isinstance(stack, list) else stack
        result = {}
        for index, pattern in enumerate(target_patterns):
            for expert, both in enumerate(stack):
                part = both.chunk(len(target_patterns), dim=0)[index] if self.by_rows else both[index]
                result[pattern.replace("*", str(expert))] = part.clone()
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        """Stacks."""
        return StackExperts(self.by_rows)


class PlainNames(WeightRenaming):
    """`X.weight` on disk <-> `X.weight_packed` in memory, for the linear layers whose numbers are stored so."""

    __slots__ = ("layers", "on_disk")

    def __init__(self, layers: frozenset[str], on_disk: str = "weight", in_memory: str = "weight_packed") -> None:
        super().__init__(source_patterns=on_disk, target_patterns=in_memory)
        self.layers, self.on_disk = layers, on_disk

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The other side's name of `source_key`, and the pattern if there is one."""
        layer, _, name = source_key.rpartition(".")
        if name != self.on_disk or layer.removeprefix("model.") not in self.layers:
            return source_key, None
        self._was_used = True
        return f"{layer}.{self.target_patterns[0]}", self.source_patterns[0]

    def reverse_transform(self) -> "PlainNames":
        """From memory to disk."""
        return PlainNames(self.layers, self.target_patterns[0], self.source_patterns[0])


def experts_conversions(model: Any, dense: Any) -> list[Any]:
    """Converters between the released layout of the experts and the stacks of `model`, dense and packed.

    Args:
        model: whose experts count.
        dense: function that makes the converters of dense experts below a name pattern.
    """
    found = {
        name.removeprefix("model."): module.experts
        for name, module in model.named_modules()
        if isinstance(module, KimiSparseMoeBlock)
    }
    kinds = [getattr(experts, "formats", None) for experts in found.values()]
    if all(kind == kinds[0] for kind in kinds):
        return _converters("block_sparse_moe.experts", next(iter(found.values()), None), dense)
    # Layers differ: each has patterns of its own.
    return [entry for name, experts in found.items() for entry in _converters(f"{name}.experts", experts, dense)]


def _converters(pattern: str, experts: Any, dense: Any) -> list[Any]:
    if not isinstance(experts, KimiPackedExperts):
        return dense(pattern)
    result = []
    for projection, format in experts.formats.items():
        names = sorted(format.tensors(*experts.shape_of(projection)), key=lambda name: -len(format.disk_name(name)))
        for name in names:  # longest first: before 5.21 `w1.weight` matches `w1.weight_scale`
            sources = [f"{pattern}.*.{leaf}.{format.disk_name(name)}" for leaf in experts.leaves(projection)]
            operation = StackExperts(format.by_rows(name))
            result.append(WeightConverter(sources, f"{pattern}.{projection}_{name}", operations=[operation]))
    return result


def plain_names(model: Any) -> list[Any]:
    """The renaming of linear layers whose numbers are called `weight` on disk; [] if there are none."""
    layers = frozenset(
        name.removeprefix("model.")
        for name, module in packed_modules(model).items()
        if isinstance(module, KimiPackedLinear) and module.format.disk_name("packed") == "weight"
    )
    return [PlainNames(layers)] if layers else []


__all__ = [
    "PlainNames",
    "experts_conversions",
    "finish_packed",
    "pack_modules",
    "packed_modules",
    "plain_names",
    "prepare_packed",
]
