"""The oracle of packed weights: one number after the other in float64, from the bits. No code is shared."""

import torch

from .formats import WeightFormat


def dequantize_reference(
    format: WeightFormat,
    shape: tuple[int, int],
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight [rows, columns] in float64. For small weights: it is a loop.

    Args:
        format: says what the tensors mean.
        shape: (rows, columns).
        data, scale, zero_point, global_scale: as in `WeightHandle`.
    """
    rows, columns = shape
    result = torch.empty(rows, columns, dtype=torch.float64)
    whole = 1.0 if global_scale is None else float(global_scale.double().reshape(()))
    for row in range(rows):
        numbers = _row_of_numbers(format, data[row], columns)
        for column in range(columns):
            number = numbers[column]
            if zero_point is not None:
                number -= _zero_point(format, zero_point, row, column)
            result[row, column] = number * (_scale(format, scale, row, column) / whole)
    return result


def _row_of_numbers(format: WeightFormat, row: torch.Tensor, columns: int) -> list[float]:
    if format.storage == "int32":
        return _integers(row, format.bits, columns)
    if format.storage == "fp4":
        codes = [(int(byte) >> shift) & 15 for byte in row for shift in (0, 4)]
        return [_small_float(code, exponent_bits=2, mantissa_bits=1, bias=1) for code in codes[:columns]]
    if format.storage == "fp8":
        return [_small_float(int(byte), exponent_bits=4, mantissa_bits=3, bias=7) for byte in row.view(torch.uint8)]
    return [float(number) for number in row.tolist()]


def _integers(words: torch.Tensor, bits: int, count: int) -> list[float]:
    """The row as one long integer, cut into numbers from its lowest bit on."""
    whole = sum((int(word) % 2**32) << (32 * i) for i, word in enumerate(words.tolist()))
    return [float((whole >> (bits * i)) % 2**bits - 2 ** (bits - 1)) for i in range(count)]


def _small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """A float without infinities; NaN is not decoded, since no checkpoint may hold it."""
    mantissa = code % 2**mantissa_bits
    exponent = (code >> mantissa_bits) % 2**exponent_bits
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def _at(format: WeightFormat, values: torch.Tensor, row: int, column: int) -> torch.Tensor:
    if format.strategy == "tensor":
        return values.flatten()[0]
    if format.strategy == "channel":
        return values.flatten()[row]
    assert format.block is not None
    return values[row // format.block[0], column // format.block[1]]


def _scale(format: WeightFormat, scale: torch.Tensor, row: int, column: int) -> float:
    value = _at(format, scale, row, column)
    return 2.0 ** (int(value) - 127) if value.dtype == torch.uint8 else float(value.double())


def _zero_point(format: WeightFormat, zero_point: torch.Tensor, row: int, column: int) -> float:
    if zero_point.dtype != torch.int32:
        return float(_at(format, zero_point, row, column))
    column = 0 if format.strategy == "channel" else column // format.block[1]
    return _integers(zero_point[:, column], format.bits, row + 1)[row]


__all__ = ["dequantize_reference"]
