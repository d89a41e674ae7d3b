"""Names and shapes of packed weights on disk and in memory, and the way between them, for transformers' loader."""

import re
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from ..layers.moe import KimiSparseMoeBlock
from .packed_modules import KimiPackedExperts, KimiPackedLinear
from .packing_on_load import packing_converters
from .refusals import Header, read_headers


def packed_modules(model: nn.Module) -> dict[str, KimiPackedLinear | KimiPackedExperts]:
    """The packed modules of a model by their names in it."""
    kinds = (KimiPackedLinear, KimiPackedExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


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


def experts_conversions(model: Any, dense: Any, files: list[str] | None = None) -> list[Any]:
    """Converters between the released layout of the experts and the stacks of `model`, dense and packed.

    Args:
        model: whose experts count.
        dense: function that makes the converters of dense experts below a name pattern.
        files: the checkpoint's, when it is loaded: packed experts may have to be made from dense ones.
    """
    if files and model.config.packed_experts and experts_are_dense(read_headers(files)):
        experts = next((x for x in packed_modules(model).values() if isinstance(x, KimiPackedExperts)), None)
        return [] if experts is None else packing_converters("block_sparse_moe.experts", experts)
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


_APART = re.compile(r"(\.experts\.\d+\.)(gate_proj|up_proj|down_proj)\.")
_RELEASED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def released_name(name: str) -> str:
    """Name of a tensor in the released layout: llm-compressor calls the projections of experts otherwise."""
    return _APART.sub(lambda found: f"{found[1]}{_RELEASED[found[2]]}.", name)


def experts_are_dense(header: Header) -> bool:
    """Whether a checkpoint's experts are floating-point numbers without scales."""
    return any(name.endswith(".w2.weight") and dtype in ("BF16", "F16", "F32") for name, (_, dtype) in header.items())


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
    "experts_are_dense",
    "experts_conversions",
    "packed_modules",
    "plain_names",
    "released_name",
]
