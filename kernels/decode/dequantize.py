"""
Packed weights to dense ones in the model's dtype, for products that are none of ours.

Computed in fp32 and rounded once, as `WeightHandle.dequantize`; for formats that have tiles (weights/tiles.py).
"""

import torch

from ..gpu.launching import overlap_options
from ..gpu.sizes import padded
from ..weights.tiles import Weight, operands, tiles_of
from .tiles import INT4, row_scales, tile_matrix, tile_rows, tile_scale_rows

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit(do_not_specialize=["first"])
def decode_dequantize_kernel(
    w, scale, y, first,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of BK columns, tile of BN rows, weight): y [weights, ROWS, COLUMNS], from weight `first` on."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    WIDTH: tl.constexpr = (COLUMNS + 7) // 8 if FORMAT == INT4 else COLUMNS
    SCALES: tl.constexpr = ((ROWS + SCALE_ROWS - 1) // SCALE_ROWS) * ((COLUMNS + SCALE_COLUMNS - 1) // SCALE_COLUMNS)
    i_k, i_w = tl.program_id(0) * BK, tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = i_k + tl.arange(0, BK)
    m_n = o_n < ROWS
    p_w = tile_rows(w + (first + i_w) * (ROWS * WIDTH), o_n, COLUMNS, FORMAT)
    p_s = tile_scale_rows(scale + (first + i_w) * SCALES, o_n, COLUMNS, SCALE_ROWS, SCALE_COLUMNS)
    b_w = tile_matrix(p_w, p_s, i_k, m_n, COLUMNS, BK, FORMAT, SCALE_COLUMNS, tl.float32)
    b_w *= row_scales(p_s, m_n, COLUMNS, SCALE_COLUMNS, FORMAT)[:, None]
    p_y = y + i_w * (ROWS * COLUMNS) + o_n.to(tl.int64)[:, None] * COLUMNS + o_k[None, :]
    tl.store(p_y, b_w.to(y.dtype.element_ty), mask=m_n[:, None] & (o_k < COLUMNS)[None, :])


def decode_dequantize(weight: Weight, y: torch.Tensor, first: int = 0, gpu: str = "sm_90", pdl: bool = False) -> None:
    """
    Fill y [weights, rows, columns], or [rows, columns] for one weight; contiguous, of any floating dtype.

    Args:
        weight: packed. A stack counts gate and up projections as weights of their own, [2 E, I, D].
        y: as many weights as are wanted.
        first: of the stack's weights.
        gpu: class of the GPU.
        pdl: launch programmatically dependent (see decode_linear).
    """
    tiles, (rows, columns) = tiles_of(weight, gpu), y.shape[-2:]
    BK = min(256, padded(columns))
    grid = (triton.cdiv(columns, BK), triton.cdiv(rows, 16), y.numel() // (rows * columns))
    decode_dequantize_kernel[grid](
        *operands(weight, tiles), y, first,
        ROWS=rows, COLUMNS=columns, BN=16, BK=BK, **tiles._asdict(), PDL=pdl, num_warps=4, **overlap_options(pdl),
    )  # fmt: skip


__all__ = ["decode_dequantize", "decode_dequantize_kernel"]
