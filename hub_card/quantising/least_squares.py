"""Scales by least squares: for each row or group w the scale s that makes |w - s q|^2 small, q the nearest numbers.

The largest number of a group says little about the scale that suits the other 31. So several scales are tried, from
those that clip the largest to those that leave room; for each, the numbers q are rounded and s = <w, q> / <q, q>
follows in closed form; then the numbers once more, for s as it is stored. The best is kept. The scale that the largest
number gives (round to nearest) is the first try, so nothing gets worse. Sums are in fp32, of groups divided by their
largest number, so that no square over- or underflows.
"""

from dataclasses import dataclass

import torch

from ...kernels.weights.formats import WeightFormat
from .recipes import pack_to_int32

# Numbers that are worked on at once: a few copies in fp32 of as many, and far below 2^31, where 32-bit indices end.
BLOCK_NUMBERS = {"cpu": 2**18, "cuda": 2**25}
# Tries, in units of the scale that round to nearest takes. Of int4, 15/16 and 15/14 put the largest number on 8 and 7,
# which is where weights lie that have been int4 before.
_INT4_TRIES = (1.0, 15 / 16, 15 / 14, 1.14, 1.035, 0.97, 0.9, 0.86, 0.82, 0.77, 0.72, 0.66)
# A float has the same relative error at any scale, but for where in its binade the numbers lie, and for the largest.
_FP8_TRIES = (1.0, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83, 0.95, 0.9)


@dataclass(frozen=True)
class Quantised:
    """Quantised rows.

    Args:
        tensors: `packed` and `scale` of `WeightFormat.tensors`, for all rows.
        squares: sums of squares for each row, [rows, 3] fp64: of the weights, of the errors, and of the errors that
            round to nearest would have made with scales of the same dtype.
    """

    tensors: dict[str, torch.Tensor]
    squares: torch.Tensor


@torch.no_grad()
def quantise_rows(weight: torch.Tensor, format: WeightFormat) -> Quantised:
    """Quantise `weight` [rows, columns], whose rows are independent of each other; scales in its dtype.

    Args:
        weight: floating point, finite, on any device.
        format: int4 packed into words in groups, or FP8 by row.
    """
    assert (format.storage, format.bits, format.strategy) in (("int32", 4, "group"), ("fp8", 8, "channel"))
    columns = weight.shape[1]
    size = columns if format.block is None else format.block[1]
    step = max(1, BLOCK_NUMBERS["cpu" if weight.device.type == "cpu" else "cuda"] // max(columns, 1))
    packed, scales, squares = [], [], []
    for block in weight.split(step):
        groups = block.float().unflatten(1, (-1, size))
        scale, sums = _fit(groups, format, weight.dtype)
        numbers = _rounded(groups / scale, format).flatten(1)
        packed.append(_stored(numbers, format))
        scales.append(scale.squeeze(-1).to(weight.dtype))
        squares.append(sums.sum(1))
    return Quantised({"packed": torch.cat(packed), "scale": torch.cat(scales)}, torch.cat(squares))


def _fit(groups: torch.Tensor, format: WeightFormat, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [rows, groups, 1] fp32, and sums of squares [rows, groups, 3] fp64 of groups [rows, groups, size]."""
    largest, tries = (7.5, _INT4_TRIES) if format.storage == "int32" else (448.0, _FP8_TRIES)
    top = groups.abs().amax(-1, keepdim=True)
    unit = torch.where(top > 0, top, 1)
    groups = groups / unit
    best = _storable(top / largest, dtype)
    error = nearest = _error(groups, best / unit, format)
    for factor in tries:
        trial = _storable(top * (factor / largest), dtype) / unit
        numbers = _rounded(groups / trial, format)
        length = numbers.square().sum(-1, keepdim=True)
        solved = (groups * numbers).sum(-1, keepdim=True) / length
        trial = _storable(torch.where(length > 0, solved, trial) * unit, dtype)
        trial_error = _error(groups, trial / unit, format)
        best = torch.where(trial_error < error, trial, best)
        error = torch.minimum(trial_error, error)
    energy = groups.square().sum(-1, keepdim=True)
    return best, torch.cat([energy, error, nearest], -1).double() * unit.double().square()


def _error(groups: torch.Tensor, scale: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    return (groups - scale * _rounded(groups / scale, format)).square_().sum(-1, keepdim=True)


def _storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as they read when they are stored; 1 for groups of zeros, whose numbers are zero at any scale."""
    stored = scale.to(dtype).float()
    return torch.where(stored > 0, stored, 1)


def _rounded(numbers: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """The nearest numbers that the format has, in fp32."""
    if format.storage == "fp8":
        return numbers.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return numbers.round_().clamp_(-8, 7)


def _stored(numbers: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    if format.storage == "fp8":
        return numbers.to(torch.float8_e4m3fn)
    return pack_to_int32(numbers.to(torch.int8), format.bits)


__all__ = ["BLOCK_NUMBERS", "Quantised", "quantise_rows"]
