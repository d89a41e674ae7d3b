"""Dense weights to packed ones while a model is loaded: integers or E4M3, symmetric, one scale a row or a group."""

import torch
import torch.nn.functional as F

from .formats import WeightFormat


@torch.no_grad()
def pack_weight(weight: torch.Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Quantise to the nearest number.

    Args:
        weight: [rows, columns], floating point.
        format: symmetric, without levels of scales; rows or groups of columns.
        scale_dtype: of the scales. The numbers are chosen for the scales as rounded to it.

    Returns:
        The tensors of `format.tensors(rows, columns)`.

    Raises:
        ValueError: for a format that nothing is packed to.
    """
    packable = format.storage in ("int8", "fp8") or (format.storage == "int32" and 32 % format.bits == 0)
    if not packable or not format.symmetric or format.two_level or format.strategy not in ("channel", "group"):
        raise ValueError(f"weights cannot be quantised to {format.name} while loading; int4, int8 and fp8 are written")
    rows, columns = weight.shape
    size = columns if format.strategy == "channel" else format.block[1]
    groups = F.pad(weight.float(), (0, -columns % size)).unflatten(1, (-1, size))
    # The largest number; integers reach half a step further down than up.
    largest = 448.0 if format.storage == "fp8" else 2.0 ** (format.bits - 1) - 0.5
    scale = (groups.abs().amax(-1) / largest).to(scale_dtype).clamp_min(torch.finfo(scale_dtype).tiny)
    numbers = (groups / scale.float()[..., None]).flatten(1)[:, :columns]
    held = {"packed": _stored(numbers, format), format.scale_name: scale}
    if format.has_shape:
        held["shape"] = torch.tensor([rows, columns], device=weight.device)
    return held


def _stored(numbers: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    if format.storage == "fp8":
        return numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
    half = 2 ** (format.bits - 1)
    integers = numbers.round().clamp(-half, half - 1)
    if format.storage == "int8":
        return integers.to(torch.int8)
    per_word = 32 // format.bits
    unsigned = F.pad(integers.int() + half, (0, -integers.shape[1] % per_word)).unflatten(1, (-1, per_word))
    shifts = torch.arange(0, 32, format.bits, device=numbers.device, dtype=torch.int32)
    return (unsigned << shifts).sum(-1, dtype=torch.int32)


__all__ = ["pack_weight"]
