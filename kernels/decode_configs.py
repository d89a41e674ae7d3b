"""
Launch configurations of the decode kernels: a committed table, no search at run time.

The one-token choices, the grouped experts and the attention over latents were measured on an H200
(benchmarks/decode_notes.md); the other products of several tokens were not searched.
"""

from typing import NamedTuple

from .kda_triton_configs import padded

GROUP = 16  # pairs of token and expert that a block holds: the tokens of one expert are few


class GemvConfig(NamedTuple):
    """One token. BN: rows of the weights a program takes, BK: columns at a time, UNROLL: such blocks in flight."""

    BN: int
    BK: int
    UNROLL: int
    num_warps: int


class SkinnyConfig(NamedTuple):
    """Up to 64 tokens. BM: tokens, BN: rows of the weights, BK: columns at a time, num_stages: blocks in flight."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


class LatentConfig(NamedTuple):
    """Attention over latent rows. BH: padded heads, BL: rows at a time, num_stages: blocks in flight."""

    BH: int
    BL: int
    num_warps: int
    num_stages: int


def overlap_options(pdl: bool) -> dict[str, bool]:
    """Launch keywords; only NVIDIA's backend knows `launch_pdl`."""
    return {"launch_pdl": True} if pdl else {}


def _unroll(blocks: int) -> int:
    return next(u for u in (8, 7, 6, 5, 4, 3, 2, 1) if blocks % u == 0)


def gemv_config(columns: int, rows: int) -> GemvConfig:
    """One token times weights of `rows` rows in all, `columns` wide."""
    if rows <= 512:
        BN, BK = 1, min(512, padded(columns))
    elif rows <= 4096:
        BN, BK = 4, min(1024 if columns % 1024 == 0 else 256, padded(columns))
    else:
        BN, BK = 16, min(256, padded(columns))
    warps = max(1, min(4, BN * BK // 256))  # 16 bytes a thread and load
    return GemvConfig(BN, BK, _unroll(max(-(-columns // BK) - 4, 1)), warps)


def experts_config(columns: int) -> GemvConfig:
    """One token times one expert's gate and up projections, `columns` wide."""
    BK = min(256, padded(columns))
    return GemvConfig(16, BK, _unroll(max(-(-columns // BK) - 2, 1)), 8)


def down_config(columns: int) -> GemvConfig:
    """One token's hidden activations times the down projections of its experts, `columns` wide."""
    BK = min(512, padded(columns))
    return GemvConfig(4, BK, _unroll(-(-columns // BK)), 4)


def _stages(gpu: str) -> int:
    # Blocks in flight: an AMD workgroup has 64 KiB of shared memory, a desktop GPU 99, sm_90 227.
    return {"gfx942": 2, "sm_80": 3}.get(gpu, 4)


def skinny_config(tokens: int, columns: int, rows: int, itemsize: int, gpu: str = "sm_90") -> SkinnyConfig:
    """Several tokens times weights of `rows` rows, `columns` wide, of `itemsize` bytes an element."""
    BM = min(64, padded(tokens))
    BN = 16 if rows <= 2560 else 32 if rows <= 16384 else 64
    BK = min(256 // itemsize, padded(columns))
    return SkinnyConfig(BM, BN, BK, 4 if BM * BN >= 1024 else 2, _stages(gpu))


def grouped_configs(columns: int, hidden: int, itemsize: int, gpu: str = "sm_90") -> tuple[SkinnyConfig, SkinnyConfig]:
    """Routed experts of several tokens: up (rows of `columns`) and down (rows of `hidden`)."""
    BK, stages = 256 // itemsize, _stages(gpu)
    up, down = min(BK, padded(columns)), min(BK, padded(hidden))
    return SkinnyConfig(GROUP, 32, up, 2, stages), SkinnyConfig(GROUP, 64, down, 2, stages)


def latent_config(heads: int, width: int, itemsize: int, gpu: str = "sm_90") -> LatentConfig:
    """Attention of `heads` heads over rows whose latent has `width` elements."""
    block = 1 << 16 if gpu in ("sm_90", "sm_100") else 1 << 15  # bytes
    BL = max(16, min(64, block // (padded(width) * itemsize)))
    return LatentConfig(padded(heads), BL, 4 if gpu in ("sm_90", "sm_100") else 8, 2)


__all__ = [
    "GROUP",
    "GemvConfig",
    "LatentConfig",
    "SkinnyConfig",
    "down_config",
    "experts_config",
    "gemv_config",
    "grouped_configs",
    "latent_config",
    "overlap_options",
    "skinny_config",
]
