"""Modules that hold quantised weights as they are stored: a linear layer, and the stacked experts.

Numbers are a parameter named `..._packed`. Scales, zero points and the rest are buffers: PEFT's
`prepare_model_for_kbit_training` turns every bf16 parameter to fp32, which would change what is saved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels.weights.formats import Allowed, WeightFormat
from ...kernels.weights.handle import WeightHandle
from ...kernels.weights.linear import packed_linear
from ...kernels.weights.tiles import PackedStack
from ..plain_modules import peft_looks_for_parameters, reads_packed
from .packed_adapters import ExpertAdapters
from .packed_state_dict import read_released_tensors

try:
    # compressed-tensors' own mark for modules that its quantizer leaves alone, whatever their names and classes are.
    from compressed_tensors.utils.internal import InternalModule
except ImportError:
    InternalModule = nn.Module


@dataclass(frozen=True)
class Place:
    """Where a tensor of a quantised weight is, on disk and in memory.

    Args:
        released: name on disk, below the module's.
        attribute: of the module, which holds it or, for experts, the stack of all.
        name: in `WeightFormat.tensors`.
        allowed: shapes and dtypes that it may have.
        projection, expert, index: of an expert's weight: `gate_up_proj` or `down_proj`, and which of its leaves.
    """

    released: str
    attribute: str
    name: str
    allowed: Allowed
    projection: str = ""
    expert: int = 0
    index: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that the tensor may have, the usual one first."""
        return self.allowed[0]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes that the tensor may have, the usual one first."""
        return self.allowed[1]


class _PackedTensors(nn.Module):
    """Tensors that keep their dtypes, whatever the module is moved or cast to."""

    def _hold(self, name: str, tensor: torch.Tensor) -> None:
        """Make `tensor` the parameter or buffer `name`, whose shape and dtype may change with what a file holds."""
        if name.endswith("_packed"):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        elif name in self._buffers:
            setattr(self, name, tensor)
        else:
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "_PackedTensors":
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


class NoDenseWeight(torch.Tensor):
    """Stands where other libraries look for `weight`: it has a shape, a dtype and a device, and no numbers.

    PEFT asks these of a base layer. Merging an adapter would write to it, and that must not be lost in silence.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what has to do with no numbers, else raise."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotImplementedError(
            "packed weights have no dense numbers to read or write: adapters cannot be merged into them, and "
            "handle(...).dequantize(dtype) makes a dense copy. Load the checkpoint with dequantize=True to merge"
        )


def no_dense_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> NoDenseWeight:
    """What stands for a dense weight of this shape; it takes no memory."""
    return torch.empty((), dtype=dtype, device=device).expand(shape).as_subclass(NoDenseWeight)


_METADATA = (
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.shape.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.is_meta.__get__,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
)


@reads_packed
class KimiPackedLinear(nn.Linear, _PackedTensors, InternalModule):
    """A linear layer without bias whose weight is packed, under the names it has on disk but for `weight_packed`.

    Args:
        in_features, out_features: as in `nn.Linear`.
        format: of the weight.
        dtype: of the dense layer that this one stands for; and of floating-point scales, until a file says otherwise.
        device: of the tensors, which are zero.
    """

    def __init__(
        self, in_features: int, out_features: int, format: WeightFormat, dtype: torch.dtype, device: torch.device
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format, self.dense_dtype = in_features, out_features, format, dtype
        self.register_parameter("bias", None)
        for place in self.places():
            self.make_room(place, place.shapes[0], dtype if dtype in place.dtypes else place.dtypes[0], device)
        self.register_load_state_dict_pre_hook(read_released_tensors)

    def places(self) -> Iterator[Place]:
        """Where the tensors of this layer's weight are."""
        for name, allowed in self.format.tensors(self.out_features, self.in_features).items():
            attribute = name if name in self.format.activations else f"weight_{name}"
            yield Place(self.format.disk_name(name), attribute, name, allowed)

    def room(self, place: Place) -> torch.Tensor:
        """The tensor of a place."""
        return getattr(self, place.attribute)

    def make_room(self, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Replace the tensor of a place by zeros of another shape or dtype."""
        self._hold(place.attribute, torch.zeros(shape, dtype=dtype, device=device))

    def handle(self) -> WeightHandle:
        """The weight, for whoever computes with it."""
        return WeightHandle(
            self.format,
            (self.out_features, self.in_features),
            self.weight_packed,
            getattr(self, f"weight_{self.format.scale_name}"),
            getattr(self, "weight_zero_point", None),
            getattr(self, "weight_global_scale", None),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return packed_linear(x, self.handle())

    @property
    def weight(self) -> "NoDenseWeight":
        """Shape, dtype and device of a dense weight; whoever wants its numbers gets an error (see `NoDenseWeight`)."""
        return no_dense_weight((self.out_features, self.in_features), self.dense_dtype, self.weight_packed.device)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.in_features}, {self.out_features}, {self.format.name}"


@reads_packed
class KimiPackedExperts(_PackedTensors, InternalModule):
    """Routed experts, stacked as in `KimiExperts`, with packed weights.

    `gate_up_proj_packed` [E, 2 I, ...] has gate (w1, I rows) before up (w3), `down_proj_packed` [E, ...] is w2;
    `..._scale` and `..._zero_point` are stacked alike. What has no rows (scales of whole tensors, shapes, global
    scales) is [E, 2, ...] and [E, 1, ...].

    Args:
        num_experts, hidden_dim, intermediate_dim: sizes.
        formats: of `gate_up_proj` and `down_proj`.
        dtype: of the dense experts that these stand for; and of floating-point scales, until a file says otherwise.
        device: of the tensors, which are zero.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        formats: dict[str, WeightFormat],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_dim, intermediate_dim
        self.formats, self.dense_dtype = formats, dtype
        self.act_fn = nn.SiLU()
        for place in self.places():
            if place.expert == place.index == 0:
                self.make_room(place, place.shapes[0], dtype if dtype in place.dtypes else place.dtypes[0], device)
        self.register_load_state_dict_pre_hook(read_released_tensors)

    def shape_of(self, projection: str) -> tuple[int, int]:
        """(rows, columns) of one weight: gate and up count for themselves."""
        inner, hidden = self.intermediate_dim, self.hidden_dim
        return (hidden, inner) if projection == "down_proj" else (inner, hidden)

    @staticmethod
    def leaves(projection: str) -> tuple[str, ...]:
        """Released names of the weights in a stack, in order."""
        return ("w2",) if projection == "down_proj" else ("w1", "w3")

    def places(self) -> Iterator[Place]:
        """Where the tensors of every expert's weights are."""
        for projection, format in self.formats.items():
            for name, allowed in format.tensors(*self.shape_of(projection)).items():
                for index, leaf in enumerate(self.leaves(projection)):
                    for expert in range(self.num_experts):
                        released = f"{expert}.{leaf}.{format.disk_name(name)}"
                        yield Place(released, f"{projection}_{name}", name, allowed, projection, expert, index)

    def room(self, place: Place) -> torch.Tensor:
        """View of the part of a stack that a place names."""
        stacked = getattr(self, place.attribute)[place.expert]
        if not self.formats[place.projection].by_rows(place.name):
            return stacked[place.index]
        return stacked.chunk(len(self.leaves(place.projection)), dim=0)[place.index]

    def make_room(self, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Replace the stack of a place by zeros in which one weight's tensor has another shape or dtype."""
        count = len(self.leaves(place.projection))
        if self.formats[place.projection].by_rows(place.name):
            stacked = (self.num_experts, count * shape[0], *shape[1:])
        else:
            stacked = (self.num_experts, count, *shape)
        self._hold(place.attribute, torch.zeros(stacked, dtype=dtype, device=device))

    def stack(self, projection: str) -> PackedStack:
        """One projection of all experts, for kernels that choose experts themselves."""
        format = self.formats[projection]
        scale = getattr(self, f"{projection}_{format.scale_name}")
        return PackedStack(format, getattr(self, f"{projection}_packed"), scale)

    def handle(self, projection: str, expert: int, index: int = 0) -> WeightHandle:
        """One weight of one expert, for whoever computes with it."""
        format = self.formats[projection]
        tensors: list[torch.Tensor | None] = []
        for name in ("packed", format.scale_name, "zero_point", "global_scale"):
            stacked = getattr(self, f"{projection}_{name}", None)
            if stacked is not None and format.by_rows(name):
                stacked = stacked[expert].chunk(len(self.leaves(projection)), dim=0)[index]
            elif stacked is not None:
                stacked = stacked[expert, index]
            tensors.append(stacked)
        return WeightHandle(format, self.shape_of(projection), *tensors)

    @property
    def gate_up_proj(self) -> NoDenseWeight:
        """Shape, dtype and device of the dense stack [E, 2 R, hidden_dim], as PEFT asks for them."""
        shape = self.num_experts, 2 * self.intermediate_dim, self.hidden_dim
        return no_dense_weight(shape, self.dense_dtype, self.gate_up_proj_packed.device)

    @property
    def down_proj(self) -> NoDenseWeight:
        """As `gate_up_proj`: [E, hidden_dim, R]."""
        shape = self.num_experts, self.hidden_dim, self.intermediate_dim
        return no_dense_weight(shape, self.dense_dtype, self.down_proj_packed.device)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """As torch's; PEFT's search for `target_parameters` also finds the two dense stacks, which are no parameters.

        Nobody else may: accelerate moves, FSDP cuts and transformers loads what this method names.
        """
        named = super().named_parameters(*args, **kwargs)
        if peft_looks_for_parameters():
            return iter([*named, ("gate_up_proj", self.gate_up_proj), ("down_proj", self.down_proj)])
        return named

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: ExpertAdapters | None = None,
    ) -> torch.Tensor:
        """As `KimiExperts.forward`; only the experts that were chosen are dequantised, one at a time.

        Args:
            hidden_states, top_k_index, top_k_weights: as there.
            adapters: to add to the experts' products, from `adapters_over_packed`.
        """
        adapters = ExpertAdapters() if adapters is None else adapters
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            x = hidden_states[token]
            gate = packed_linear(x, self.handle("gate_up_proj", expert, 0))
            up = packed_linear(x, self.handle("gate_up_proj", expert, 1))
            gate = adapters.added(gate, "gate_up_proj", expert, x)
            up = adapters.added(up, "gate_up_proj", expert, x, start=self.intermediate_dim)
            inner = self.act_fn(gate) * up
            expert_output = packed_linear(inner, self.handle("down_proj", expert))
            expert_output = adapters.added(expert_output, "down_proj", expert, inner)
            output.index_add_(0, token, expert_output.float() * top_k_weights[token, slot, None])
        return output.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Sizes and formats."""
        said = sorted({format.name for format in self.formats.values()})
        return f"{self.num_experts} x ({self.hidden_dim}, {self.intermediate_dim}), {' and '.join(said)}"


def packed_formats(model: nn.Module) -> list[str]:
    """Names of the formats of a model's packed weights; [] if it has none."""
    found = set()
    for module in model.modules():
        if isinstance(module, KimiPackedLinear):
            found.add(module.format.name)
        elif isinstance(module, KimiPackedExperts):
            found |= {format.name for format in module.formats.values()}
    return sorted(found)


__all__ = ["KimiPackedExperts", "KimiPackedLinear", "NoDenseWeight", "Place", "packed_formats"]
