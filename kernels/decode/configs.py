"""
Launch configurations of the decode kernels: a committed table, no search at run time.

Measured on an H200 (benchmarks/decode_notes.md). The one-token choices keep all programs of a launch on the GPU at once
where they can: what does not fit waits for the slowest of the first.
"""

from typing import NamedTuple

from ..gpu.sizes import padded

# Most tokens of the products that read each weight once and hold all tokens; more go to the library (products.py).
SKINNY_TOKENS = 64
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
    """
    Attention over latent rows. BT: tokens of a sequence that a program takes, BH: padded heads, BL: rows at a time,
    num_stages: blocks in flight.
    """

    BT: int
    BH: int
    BL: int
    num_warps: int
    num_stages: int


def _one_token_config(columns: int, BN: int, BK: int, warps: int, ahead: int) -> GemvConfig:
    """`ahead` blocks of columns are loaded before the loop. 16 bytes a thread and load, so 256 columns a warp."""
    BK = min(BK, padded(columns))
    blocks = max(-(-columns // BK) - ahead, 1)
    unroll = next(u for u in (8, 7, 6, 5, 4, 3, 2, 1) if blocks % u == 0)
    return GemvConfig(BN, BK, unroll, max(1, min(warps, BK // 256)))


def gemv_config(columns: int, rows: int) -> GemvConfig:
    """One token times weights of `rows` rows in all, `columns` wide."""
    if rows <= 512:
        return _one_token_config(columns, 1, 1024, 4, 4)
    if columns <= 256:
        return _one_token_config(columns, 8, 256, 1, 4)
    if rows <= 4096:
        return _one_token_config(columns, 2, 1024, 4, 4)
    return _one_token_config(columns, 4, 256, 1, 4)


def experts_config(columns: int) -> GemvConfig:
    """One token times one expert's gate and up projections, `columns` wide."""
    return _one_token_config(columns, 2, 256, 1, 2)


def down_config(columns: int) -> GemvConfig:
    """One token's hidden activations times the down projections of its experts, `columns` wide."""
    return _one_token_config(columns, 2, 1024, 4, 0)


def packed_experts_configs(columns: int) -> tuple[GemvConfig, GemvConfig]:
    """As `experts_config`, for packed weights: of the routed experts, and of the shared one."""
    return _one_token_config(columns, 4, 256, 1, 2), experts_config(columns)


def packed_down_config(columns: int, choices: int) -> GemvConfig:
    """As `down_config`, for packed weights. UNROLL is in choices, of which four are on their way (decode_notes.md)."""
    return _one_token_config(columns, 2, 1024, 4, 0)._replace(UNROLL=next(n for n in (4, 3, 2, 1) if choices % n == 0))


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


def latent_config(tokens: int, heads: int, width: int, itemsize: int, gpu: str = "sm_90") -> LatentConfig:
    """Attention of `heads` heads and `tokens` tokens a sequence over rows whose latent has `width` elements."""
    large = gpu in ("sm_90", "sm_100")
    row, block = padded(width) * itemsize, 1 << 16 if large else 1 << 15  # bytes
    BH, BL = padded(heads), max(16, min(64, block // row))
    BT = 1
    # Several tokens a program: as many queries as the long side of sm_90's products, where shared memory holds them.
    while gpu == "sm_90" and tokens > BT and 2 * BT * BH <= 64 and 2 * BT * BH * row <= block:
        BT *= 2
    return LatentConfig(BT, BH, BL, 4 if large and BT == 1 else 8, 2)


def skinny_constants(config: SkinnyConfig) -> dict[str, int]:
    """Keywords of the launch of a kernel that multiplies blocks of tokens."""
    return {
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "STAGES": config.num_stages, "num_warps": config.num_warps,
    }  # fmt: skip


__all__ = [
    "GROUP",
    "SKINNY_TOKENS",
    "GemvConfig",
    "LatentConfig",
    "SkinnyConfig",
    "down_config",
    "experts_config",
    "gemv_config",
    "grouped_configs",
    "latent_config",
    "packed_down_config",
    "packed_experts_configs",
    "skinny_config",
    "skinny_constants",
]
