"""
Launch configurations of the KDA kernels by GPU class and shape: a committed table, no search at run time.

`benchmarks/kda.py --tune` measures the candidates this table was chosen from (recorded in benchmarks/kda_notes.md).
Classes that were not measured take the sm_90 choice where it fits their shared memory; all entries are compiled
offline in the tests.
"""

from typing import NamedTuple

from ..gpu.sizes import padded


class KdaIntraConfig(NamedTuple):
    """
    Stage 1. C: tokens per chunk, NG: groups of tokens (rows of one load), BKW: wild channels at a time, precision: of
    products of fp32 tiles, maxnreg: registers a thread may take, None for no bound.
    """

    C: int
    NG: int
    BKW: int
    num_warps: int
    precision: str
    maxnreg: int | None = None


class KdaInterConfig(NamedTuple):
    """Stage 2. BV: value channels of a program, num_stages: chunks in flight, precision: of products of fp32 tiles."""

    BV: int
    num_warps: int
    num_stages: int
    precision: str


class KdaStepConfig(NamedTuple):
    """Decode step. BK, BV: padded K and V, maxnreg: registers a thread may take, None for no bound."""

    BK: int
    BV: int
    num_warps: int
    maxnreg: int | None = None


def _precision(gpu: str, dtype: str) -> str:
    # Tiles of fp16 inputs are fp32 (their factors need the exponents): tf32 has fp16's mantissa.
    return "ieee" if gpu == "gfx942" else "tf32x3" if dtype == "float32" else "tf32"


def intra_config(gpu: str, K: int, dtype: str) -> KdaIntraConfig:
    """Stage 1 for head size K and inputs of `dtype` ("float32", "float16", "bfloat16")."""
    # Short chunks and two warps at heads of 128 in bf16, so that a thread holds 64 values of a tile: with fewer of them
    # more of the scans and sums cross warps, with more the registers don't suffice.
    BK, size, C = padded(K), 4 if dtype == "float32" else 2, 32
    num_warps = max(1, BK * (2 if dtype == "bfloat16" else 4) // 128)
    loaded = num_warps * 32 * 16 // (BK * size)  # rows: 16 bytes a thread
    return KdaIntraConfig(C, min(C, loaded), 16, num_warps, _precision(gpu, dtype))


def inter_config(gpu: str, K: int, V: int, dtype: str) -> KdaInterConfig:
    """Stage 2 for head sizes K, V and inputs of `dtype`."""
    BK, wide = padded(K), dtype != "bfloat16"
    # The state, its rounded copy and the sums share the registers; the old tensor cores also take operands from them.
    BV = min(padded(V), 16 if wide and BK > 64 else 32 if wide or BK > 128 or gpu == "sm_80" else 64)
    stages = 1 if gpu == "gfx942" else 2 if wide or BK > 128 or gpu == "sm_80" else 3
    return KdaInterConfig(BV, 4, stages, _precision(gpu, dtype))


def step_config(K: int, V: int) -> KdaStepConfig:
    """Decode step: one program holds a head's whole state in registers, 128 of a thread's where heads are large."""
    BK, BV = padded(K), padded(V)
    return KdaStepConfig(BK, BV, min(16, max(1, BK * BV // 4096)))
