"""Formats of quantised weights: which tensors hold a weight [rows, columns], in which dtypes and shapes.

A format says how the numbers are stored, how wide they are, and how far one scale reaches. Names of tensors are those
of compressed-tensors, without the leading `weight_`: `packed` (the numbers), `scale`, `zero_point`, `shape`,
`global_scale`. transformers' block FP8 calls its scale `scale_inv`; it is multiplied all the same.

    w[r, c] = (q[r, c] - zero_point[g(r, c)]) * scale[g(r, c)] / global_scale

with q the stored number and g the tensor, row, group or block that (r, c) lies in.
"""

from dataclasses import dataclass

import torch

# The shapes and the dtypes that a tensor may have, usual ones first.
Allowed = tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Storage -> dtype of the tensor that holds the numbers.
_DATA_DTYPES = {
    "int32": torch.int32,  # unsigned numbers of `bits` bits, biased by 2^(bits - 1), the first one lowest
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp4": torch.uint8,  # two E2M1 numbers a byte, the first one lowest
}


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored.

    Args:
        name: for messages and `decode_path`, such as "pack-quantized int4, groups of 32".
        storage: "int32" (integers packed into words), "int8", "fp8" (E4M3) or "fp4" (E2M1).
        bits: of a stored number.
        strategy: "tensor", "channel" (a row), "group" (of columns of one row) or "block".
        block: (rows, columns) that a scale covers; for "group" (1, size).
        symmetric: whether there are no zero points.
        scale_dtypes: what the scales may be stored in. uint8 holds exponents, 2^(s - 127).
        two_level: whether the scales are themselves divided by a global scale.
        scale_name: "scale", or "scale_inv" in transformers' block FP8.
        has_shape: whether the file holds the shape beside each weight.
        activations: further tensors that the file holds for the activations. They are kept and saved, not used.
    """

    name: str
    storage: str
    bits: int
    strategy: str
    block: tuple[int, int] | None = None
    symmetric: bool = True
    scale_dtypes: tuple[torch.dtype, ...] = FLOATS
    two_level: bool = False
    scale_name: str = "scale"
    has_shape: bool = False
    activations: tuple[str, ...] = ()

    @property
    def data_dtype(self) -> torch.dtype:
        """Of the tensor that holds the numbers."""
        return _DATA_DTYPES[self.storage]

    def data_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the tensor that holds the numbers of a weight [rows, columns]."""
        width = {"int32": _tiles(columns * self.bits, 32), "fp4": _tiles(columns, 2)}
        return rows, width.get(self.storage, columns)

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Shapes that the scale may have; the first is the usual one.

        transformers before 5.23 saved [rows] where [rows, 1] was loaded, and libraries write one number in three ways.
        """
        if self.strategy == "tensor":
            return (1,), (), (1, 1)
        if self.strategy == "channel":
            return (rows, 1), (rows,)
        assert self.block is not None
        return ((_tiles(rows, self.block[0]), _tiles(columns, self.block[1])),)

    def zero_point_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Shapes that the zero points may have: packed along the rows, as compressed-tensors does, or as the scale."""
        if self.storage != "int32" or self.strategy == "tensor":
            return self.scale_shapes(rows, columns)
        groups = 1 if self.strategy == "channel" else self.scale_shapes(rows, columns)[0][1]
        return ((_tiles(rows * self.bits, 32), groups),)

    def tensors(self, rows: int, columns: int) -> dict[str, Allowed]:
        """For each tensor of a weight [rows, columns]: the shapes and the dtypes that it may have."""
        one: tuple[tuple[int, ...], ...] = ((1,), (), (1, 1))
        held = {
            "packed": ((self.data_shape(rows, columns),), (self.data_dtype,)),
            self.scale_name: (self.scale_shapes(rows, columns), self.scale_dtypes),
        }
        if not self.symmetric:
            dtypes = (torch.int32,) if self._packs_zero_points else (torch.int8,)
            held["zero_point"] = (self.zero_point_shapes(rows, columns), dtypes)
        if self.two_level:
            held["global_scale"] = (one, FLOATS)
        if self.has_shape:
            held["shape"] = (((2,),), (torch.int64, torch.int32))
        for name in self.activations:
            held[name] = (one, (*FLOATS, torch.int8))
        return held

    def disk_name(self, name: str) -> str:
        """Name on disk, below the linear layer's, of one of `tensors`."""
        if name in self.activations:
            return name
        plain = name == "packed" and self.storage in ("int8", "fp8")
        return "weight" if plain else f"weight_{name}"

    def by_rows(self, name: str) -> bool:
        """Whether a tensor has a part for each row, so that weights one below the other put it one below the other."""
        return name == "packed" or (name in (self.scale_name, "zero_point") and self.strategy != "tensor")

    @property
    def _packs_zero_points(self) -> bool:
        return self.storage == "int32" and self.strategy != "tensor"


__all__ = ["FLOATS", "Allowed", "WeightFormat"]
