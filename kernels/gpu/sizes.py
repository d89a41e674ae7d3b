"""Sizes that kernels round to: blocks of a power of two, and what strides are multiples of."""

import math
from typing import Any


def alignment(*tensors: Any) -> int:
    """What the strides of [B, T, ...] tensors between tokens, and between rows (if several), are multiples of."""
    return math.gcd(16, *(x.stride(i) for x in tensors for i in (0, 1) if i == 1 or x.shape[0] > 1))


def power_of_two(size: int, at_least: int = 1) -> int:
    """The smallest power of two that is neither below `size` nor below `at_least`, itself one."""
    return max(at_least, 1 << max(size - 1, 0).bit_length())


def padded(size: int) -> int:
    """A width as blocks of matrix products hold it: a power of two, at least the 16 that tensor cores want."""
    return power_of_two(size, at_least=16)
