"""Which packed weights the decode kernels read as they lie, and how they are handed over.

`tile_format` is the one answer to "is there a launcher for this format?". The kernels' side is decode/tiles.py.
"""

from typing import NamedTuple

import torch

from .formats import WeightFormat
from .handle import WeightHandle

DENSE, INT4, FP8, FP8_BITS = range(4)  # as in decode/tiles.py
# Classes of GPUs with instructions for E4M3 that Triton uses; the others take its bits apart.
_FP8_CLASSES = ("sm_90", "sm_100")


class TileFormat(NamedTuple):
    """What a launch is compiled for, named as the kernels' constants.

    Args:
        FORMAT: one of the numbers above.
        SCALE_ROWS, SCALE_COLUMNS: of the part of a weight that a scale covers; WHOLE where it covers all there are.
    """

    FORMAT: int
    SCALE_ROWS: int
    SCALE_COLUMNS: int


class PackedStack(NamedTuple):
    """One projection of all experts of a layer, packed alike.

    Args:
        format: of each weight.
        data: the numbers, [E, rows, ...], rows of gate before those of up.
        scale: [E, ...], stacked as the numbers are.
    """

    format: WeightFormat
    data: torch.Tensor
    scale: torch.Tensor


Linear = torch.Tensor | WeightHandle  # one weight [rows, columns], dense or packed
Weight = Linear | PackedStack
WHOLE = 1 << 30
DENSE_TILES = TileFormat(DENSE, 1, 1)


def tile_format(format: WeightFormat, gpu: str = "sm_90") -> TileFormat | None:
    """How the decode kernels read weights of `format` on a GPU of class `gpu`; None if they can't."""
    if not format.symmetric or format.two_level or torch.uint8 in format.scale_dtypes:
        return None
    if format.storage == "int32" and format.bits == 4:
        kind = INT4
    elif format.storage == "fp8":
        kind = FP8 if gpu in _FP8_CLASSES else FP8_BITS
    else:
        return None
    covered = {"tensor": (WHOLE, WHOLE), "channel": (1, WHOLE)}.get(format.strategy, format.block)
    assert covered is not None
    # Sums are scaled by pieces of eight columns.
    return None if covered[1] % 8 != 0 else TileFormat(kind, *covered)


def tiles_of(weight: Weight, gpu: str = "sm_90") -> TileFormat:
    """The same for a weight that is known to have a launcher, dense or packed.

    Raises:
        ValueError: if the kernels can't read it; see `tile_format`.
    """
    if isinstance(weight, torch.Tensor):
        return DENSE_TILES
    found = tile_format(weight.format, gpu)
    if found is None:
        raise ValueError(f"the decode kernels cannot read {weight.format.name}: ask tile_format first")
    return found


def numbers_of(weight: Weight, tiles: TileFormat) -> torch.Tensor:
    """What a launch gets as the weight's numbers."""
    if isinstance(weight, torch.Tensor):
        return weight
    return weight.data.view(torch.uint8) if tiles.FORMAT == FP8_BITS else weight.data


def scales_of(weight: Weight) -> torch.Tensor | None:
    """What a launch gets as the weight's scales."""
    return None if isinstance(weight, torch.Tensor) else weight.scale


def operands(weight: Weight, tiles: TileFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers, scales) of a weight; a dense one has no scales, and nothing is read through the second pointer."""
    numbers, scales = numbers_of(weight, tiles), scales_of(weight)
    return numbers, numbers if scales is None else scales


def shared_constants(tiles: TileFormat) -> dict[str, int]:
    """Compile-time keywords for the shared expert's weights, in a launch that has the routed experts' beside them."""
    return {f"SHARED_{name}": value for name, value in tiles._asdict().items()}


__all__ = [
    "DENSE_TILES",
    "WHOLE",
    "Linear",
    "PackedStack",
    "TileFormat",
    "Weight",
    "numbers_of",
    "operands",
    "scales_of",
    "shared_constants",
    "tile_format",
    "tiles_of",
]
