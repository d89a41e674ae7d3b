"""
Decode step: the experts of several tokens, where routed experts or the shared one are packed.

The equations and blocks of pairs are those of grouped_experts.py. A tile of weights is dequantised to the model's dtype
in registers, as the layers do it (tiles.py, `tile_matrix`), and multiplied on tensor cores. Routed and shared experts
may differ in format; the shared expert is one choice at most (NS 0 or 1).
"""

import torch

from ..gpu.arithmetic import rounded_dot, sigmoid
from ..gpu.launching import overlap_options
from ..weights.tiles import Linear, PackedStack, operands, shared_constants, tiles_of
from .configs import SkinnyConfig, skinny_constants
from .grouped_experts import decode_combine_kernel, decode_pairs
from .tiles import DENSE, INT4, row_scales, tile_matrix, tile_rows, tile_scale_rows

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def grouped_products(
    p_x, m_m, first, second, first_scale, second_scale, o_n, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TWO: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x [BM, COLUMNS] at `p_x` times rows `o_n` of one weight, or of two: [BM, BN] twice, the second 0 if not TWO."""
    m_n = o_n < ROWS
    p_1, p_2 = tile_rows(first, o_n, COLUMNS, FORMAT), tile_rows(second, o_n, COLUMNS, FORMAT)
    p_s1, p_s2 = p_1, p_2
    if FORMAT != DENSE:
        p_s1 = tile_scale_rows(first_scale, o_n, COLUMNS, SCALE_ROWS, SCALE_COLUMNS)
        p_s2 = tile_scale_rows(second_scale, o_n, COLUMNS, SCALE_ROWS, SCALE_COLUMNS)
    b_1, b_2 = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for i_k in tl.range(0, COLUMNS, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        b_x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & (o_k < COLUMNS)[None, :], other=0.0)
        b_w = tile_matrix(p_1, p_s1, i_k, m_n, COLUMNS, BK, FORMAT, SCALE_COLUMNS, DTYPE)
        b_1 = rounded_dot(b_x, tl.trans(b_w), b_1, DTYPE, "ieee", UPCAST)
        if TWO:
            b_w = tile_matrix(p_2, p_s2, i_k, m_n, COLUMNS, BK, FORMAT, SCALE_COLUMNS, DTYPE)
            b_2 = rounded_dot(b_x, tl.trans(b_w), b_2, DTYPE, "ieee", UPCAST)
    if FORMAT != DENSE:
        b_1 *= row_scales(p_s1, m_n, COLUMNS, SCALE_COLUMNS, FORMAT)[None, :]
        if TWO:
            b_2 *= row_scales(p_s2, m_n, COLUMNS, SCALE_COLUMNS, FORMAT)[None, :]
    return b_1, b_2


@triton.jit(do_not_specialize=["M"])
def decode_packed_grouped_up_kernel(
    x, pairs, experts, n_blocks, gate_up, scale, shared_gate, shared_gate_scale, shared_up, shared_up_scale, h,
    M, stride_x,
    TOPK: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    SHARED_FORMAT: tl.constexpr, SHARED_SCALE_ROWS: tl.constexpr, SHARED_SCALE_COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN hidden channels, block of pairs)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_block = tl.program_id(1)
    if i_block >= tl.load(n_blocks) + NS * tl.cdiv(M, BM):
        return
    b_row, b_token, m_m, expert, i_shared = decode_pairs(pairs, experts, i_block, M, TOPK, NS, BM)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    p_x = x + b_token[:, None] * stride_x
    DTYPE: tl.constexpr = x.dtype.element_ty
    if i_shared >= 0:
        b_g, b_u = grouped_products(
            p_x, m_m, shared_gate, shared_up, shared_gate_scale, shared_up_scale, o_n, I, D,
            BM, BN, BK, STAGES, True, SHARED_FORMAT, SHARED_SCALE_ROWS, SHARED_SCALE_COLUMNS, DTYPE, UPCAST,
        )  # fmt: skip
    else:
        WIDTH: tl.constexpr = (D + 7) // 8 if FORMAT == INT4 else D
        SCALES: tl.constexpr = ((I + SCALE_ROWS - 1) // SCALE_ROWS) * ((D + SCALE_COLUMNS - 1) // SCALE_COLUMNS)
        p_gate, p_scale = gate_up + expert * (2 * I * WIDTH), scale + expert * (2 * SCALES)
        b_g, b_u = grouped_products(
            p_x, m_m, p_gate, p_gate + I * WIDTH, p_scale, p_scale + SCALES, o_n, I, D,
            BM, BN, BK, STAGES, True, FORMAT, SCALE_ROWS, SCALE_COLUMNS, DTYPE, UPCAST,
        )  # fmt: skip
    b_h = b_g * sigmoid(b_g) * b_u
    tl.store(h + b_row[:, None] * I + o_n[None, :], b_h.to(DTYPE), mask=m_m[:, None] & (o_n < I)[None, :])


@triton.jit(do_not_specialize=["M"])
def decode_packed_grouped_down_kernel(
    h, pairs, experts, n_blocks, down, scale, shared_down, shared_scale, z, M,
    TOPK: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    SHARED_FORMAT: tl.constexpr, SHARED_SCALE_ROWS: tl.constexpr, SHARED_SCALE_COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN outputs, block of pairs)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_block = tl.program_id(1)
    if i_block >= tl.load(n_blocks) + NS * tl.cdiv(M, BM):
        return
    b_row, _, m_m, expert, i_shared = decode_pairs(pairs, experts, i_block, M, TOPK, NS, BM)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    DTYPE: tl.constexpr = h.dtype.element_ty
    if i_shared >= 0:
        b_z, _none = grouped_products(
            h + b_row[:, None] * I, m_m, shared_down, shared_down, shared_scale, shared_scale, o_n, D, I,
            BM, BN, BK, STAGES, False, SHARED_FORMAT, SHARED_SCALE_ROWS, SHARED_SCALE_COLUMNS, DTYPE, UPCAST,
        )  # fmt: skip
    else:
        WIDTH: tl.constexpr = (I + 7) // 8 if FORMAT == INT4 else I
        SCALES: tl.constexpr = ((D + SCALE_ROWS - 1) // SCALE_ROWS) * ((I + SCALE_COLUMNS - 1) // SCALE_COLUMNS)
        p_w, p_s = down + expert * (D * WIDTH), scale + expert * SCALES
        b_z, _none = grouped_products(
            h + b_row[:, None] * I, m_m, p_w, p_w, p_s, p_s, o_n, D, I,
            BM, BN, BK, STAGES, False, FORMAT, SCALE_ROWS, SCALE_COLUMNS, DTYPE, UPCAST,
        )  # fmt: skip
    tl.store(z + b_row[:, None] * D + o_n[None, :], b_z.to(DTYPE), mask=m_m[:, None] & (o_n < D)[None, :])


def decode_packed_grouped_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    y: torch.Tensor,
    *,
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate_up: PackedStack | torch.Tensor,
    down: PackedStack | torch.Tensor,
    shared: tuple[Linear, Linear, Linear] | None,
    h: torch.Tensor,
    z: torch.Tensor,
    configs: tuple[SkinnyConfig, SkinnyConfig],
    upcast: bool = False,
    gpu: str = "sm_90",
    pdl: bool = False,
) -> None:
    """
    As `decode_grouped_experts` of grouped_experts.py, for packed weights.

    Args:
        x, weights, y, groups, h, z, configs, upcast, pdl: see there.
        gate_up, down: [E, 2 I, D] and [E, D, I], of formats that have tiles (weights/tiles.py), or dense.
        shared: gate, up and down projections [I, D], [I, D] and [D, I] of the shared expert, or None; gate and up in
            one format.
        gpu: class of the GPU.
    """
    (pairs, experts, n_blocks), (M, TOPK), (D, I) = groups, weights.shape, (y.shape[1], h.shape[1])
    shared_gate, shared_up, shared_down = shared or (gate_up, gate_up, down)
    NS = 0 if shared is None else 1
    up, out = configs
    blocks = experts.numel() + NS * triton.cdiv(M, up.BM)
    common = {"TOPK": TOPK, "NS": NS, "D": D, "I": I, "UPCAST": upcast, "PDL": pdl, **overlap_options(pdl)}
    tiles, shared_tiles = tiles_of(gate_up, gpu), tiles_of(shared_gate, gpu)
    decode_packed_grouped_up_kernel[(triton.cdiv(I, up.BN), blocks)](
        x, pairs, experts, n_blocks, *operands(gate_up, tiles), *operands(shared_gate, shared_tiles),
        *operands(shared_up, shared_tiles), h, M, x.stride(0),
        **skinny_constants(up), **tiles._asdict(), **shared_constants(shared_tiles), **common,
    )  # fmt: skip
    tiles, shared_tiles = tiles_of(down, gpu), tiles_of(shared_down, gpu)
    decode_packed_grouped_down_kernel[(triton.cdiv(D, out.BN), blocks)](
        h, pairs, experts, n_blocks, *operands(down, tiles), *operands(shared_down, shared_tiles), z, M,
        **skinny_constants(out), **tiles._asdict(), **shared_constants(shared_tiles), **common,
    )  # fmt: skip
    decode_combine_kernel[(M, triton.cdiv(D, 512))](
        z, weights, y, M, TOPK=TOPK, NS=NS, D=D, BD=512, PDL=pdl, num_warps=4, **overlap_options(pdl)
    )


__all__ = [
    "decode_packed_grouped_down_kernel",
    "decode_packed_grouped_experts",
    "decode_packed_grouped_up_kernel",
]
