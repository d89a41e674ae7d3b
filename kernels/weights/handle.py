"""A weight as a handle: data, scales, zero points, format, shape. Launchers ask it for numbers, never for a tensor.

`tiles.py` says which formats kernels read; `dequantize` is the exact slow path for all of them, on any device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .formats import WeightFormat

# E2M1 by its four bits: sign, two of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class WeightHandle:
    """One quantised weight [rows, columns].

    Args:
        format: how it is stored.
        shape: (rows, columns).
        data: the numbers, as `format.data_shape` and `format.data_dtype` say.
        scale: as one of `format.scale_shapes`.
        zero_point: as one of `format.zero_point_shapes`, or None.
        global_scale: one number that the scales are divided by, or None.
    """

    format: WeightFormat
    shape: tuple[int, int]
    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The weight [rows, columns] in `dtype`: exact in float64, else computed in fp32 and rounded once."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        numbers = self._numbers().to(compute)
        if self.zero_point is not None:
            numbers = numbers - self._spread(self._zero_points().to(compute))
        return (numbers * self._spread(self._scales(compute))).to(dtype)

    def _numbers(self) -> torch.Tensor:
        """The stored numbers [rows, columns]: integers, or E4M3 as it is, or E2M1 as fp32."""
        columns = self.shape[1]
        if self.format.storage == "int32":
            return unpack_words(self.data, self.format.bits, columns)
        if self.format.storage == "fp4":
            table = torch.tensor(_E2M1, device=self.data.device)
            codes = torch.stack([self.data & 15, self.data >> 4], dim=-1).flatten(-2)[..., :columns]
            return table[codes.long()]
        return self.data

    def _scales(self, compute: torch.dtype) -> torch.Tensor:
        if self.scale.dtype == torch.uint8:
            scale = torch.exp2(self.scale.to(compute) - 127)
        else:
            scale = self.scale.to(compute)
        return scale if self.global_scale is None else scale / self.global_scale.to(compute).reshape(())

    def _zero_points(self) -> torch.Tensor:
        assert self.zero_point is not None
        if self.zero_point.dtype != torch.int32:
            return self.zero_point
        return unpack_words(self.zero_point.t(), self.format.bits, self.shape[0]).t()

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of tensor, rows, groups or blocks, to a shape that goes with [rows, columns]."""
        if self.format.strategy == "tensor":
            return values.reshape(1, 1)
        if self.format.strategy == "channel":
            return values.reshape(-1, 1)
        assert self.format.block is not None
        for dim, (block, size) in enumerate(zip(self.format.block, self.shape)):
            if block > 1:
                values = values.repeat_interleave(block, dim).narrow(dim, 0, size)
        return values


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` signed numbers of `bits` bits out of each row of int32 words [rows, W]; [rows, count] int32.

    Numbers lie one after the other from the lowest bit on, across the borders of words, biased by 2^(bits - 1).
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        numbers = (words[:, :, None] >> shifts) & (2**bits - 1)
        return numbers.flatten(1)[:, :count] - 2 ** (bits - 1)
    start = torch.arange(count, device=words.device) * bits
    word, offset = start // 32, start % 32
    wide = F.pad(words.long() & 0xFFFFFFFF, (0, 1))
    numbers = (wide[:, word] >> offset) | (wide[:, word + 1] << (32 - offset))
    return ((numbers & (2**bits - 1)) - 2 ** (bits - 1)).int()


__all__ = ["WeightHandle", "unpack_words"]
