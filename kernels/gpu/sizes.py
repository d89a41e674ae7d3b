"""Sizes that kernels round to: blocks of a power of two, and what strides are multiples of."""

import math
from typing import Any


def alignment(*tensors: Any) -> int:
    """What the strides of [B, T, ...] tensors between tokens, and between rows (if several), are multiples of."""
    return math.gcd(16, *(x.stride(i) for x in tensors for i in (0, 1) if i == 1 or x.shape[0] > 1))


def padded(size: int) -> int:
    """Head size as the kernels' blocks hold it: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
