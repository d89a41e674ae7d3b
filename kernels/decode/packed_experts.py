"""
Decode step: the experts of one token, where routed experts or the shared one are packed.

The equations are those of experts.py, with weights as tiles.py reads them. Routed and shared experts may differ in
format. The first programs take the shared expert, whose weights are loaded ahead of the wait; the others choose the
experts and take one of them.
"""

import torch

from ..gpu.arithmetic import sigmoid
from ..gpu.launching import overlap_options
from ..gpu.sizes import power_of_two
from ..weights.tiles import Linear, PackedStack, operands, shared_constants, tiles_of
from .configs import GemvConfig
from .linear import decode_input, decode_prefetch_vector
from .routing import decode_store_choice, decode_topk
from .tiles import (
    DENSE,
    INT4,
    row_scales,
    tile_input,
    tile_numbers,
    tile_pointer,
    tile_rows,
    tile_scale_rows,
    tile_scales,
    tile_sums,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def decode_up_rows(
    x, norm_weight, gate, up, gate_scale, up_scale, h, eps, i_tile,
    D: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Tile `i_tile` of the hidden channels h [ROWS] of one expert; two blocks of columns go ahead of the wait."""
    o_n = i_tile * BN + tl.arange(0, BN)
    m_n = o_n < ROWS
    o_k = tl.arange(0, BK)
    p_g = tile_rows(tile_pointer(gate, D, FORMAT), o_n, D, FORMAT)
    p_u = tile_rows(tile_pointer(up, D, FORMAT), o_n, D, FORMAT)
    p_gs, p_us = p_g, p_u
    if FORMAT != DENSE:
        p_gs = tile_scale_rows(gate_scale, o_n, D, SCALE_ROWS, SCALE_COLUMNS)
        p_us = tile_scale_rows(up_scale, o_n, D, SCALE_ROWS, SCALE_COLUMNS)
    b_g0, b_g1 = tile_numbers(p_g, 0, m_n, D, BK, FORMAT), tile_numbers(p_g, BK, m_n, D, BK, FORMAT)
    b_u0, b_u1 = tile_numbers(p_u, 0, m_n, D, BK, FORMAT), tile_numbers(p_u, BK, m_n, D, BK, FORMAT)
    b_gs0 = tile_scales(p_gs, 0, m_n, D, BK, SCALE_COLUMNS, FORMAT)
    b_gs1 = tile_scales(p_gs, BK, m_n, D, BK, SCALE_COLUMNS, FORMAT)
    b_us0 = tile_scales(p_us, 0, m_n, D, BK, SCALE_COLUMNS, FORMAT)
    b_us1 = tile_scales(p_us, BK, m_n, D, BK, SCALE_COLUMNS, FORMAT)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    b_x, b_ss = decode_input(x, norm_weight, o_k, D, True, False)
    b_in = tile_input(b_x, FORMAT)
    b_g, b_u = tile_sums(b_g0, b_gs0, b_in, FORMAT), tile_sums(b_u0, b_us0, b_in, FORMAT)
    b_x, b_xx = decode_input(x, norm_weight, o_k + BK, D, True, False)
    b_in = tile_input(b_x, FORMAT)
    b_g += tile_sums(b_g1, b_gs1, b_in, FORMAT)
    b_u += tile_sums(b_u1, b_us1, b_in, FORMAT)
    b_ss += b_xx
    for i_k in range(2 * BK, D, BK * UNROLL):
        for u in tl.static_range(UNROLL):
            i_j = i_k + u * BK
            b_wg, b_wu = tile_numbers(p_g, i_j, m_n, D, BK, FORMAT), tile_numbers(p_u, i_j, m_n, D, BK, FORMAT)
            b_gs = tile_scales(p_gs, i_j, m_n, D, BK, SCALE_COLUMNS, FORMAT)
            b_us = tile_scales(p_us, i_j, m_n, D, BK, SCALE_COLUMNS, FORMAT)
            b_x, b_xx = decode_input(x, norm_weight, i_j + o_k, D, True, False)
            b_in = tile_input(b_x, FORMAT)
            b_g += tile_sums(b_wg, b_gs, b_in, FORMAT)
            b_u += tile_sums(b_wu, b_us, b_in, FORMAT)
            b_ss += b_xx
    b_r = tl.rsqrt(tl.sum(b_ss, axis=0) / D + eps)
    b_gate, b_up = tl.sum(b_g, axis=1) * b_r, tl.sum(b_u, axis=1) * b_r
    if FORMAT != DENSE:
        b_gate *= row_scales(p_gs, m_n, D, SCALE_COLUMNS, FORMAT)
        b_up *= row_scales(p_us, m_n, D, SCALE_COLUMNS, FORMAT)
    tl.store(h + o_n, (b_gate * sigmoid(b_gate) * b_up).to(h.dtype.element_ty), mask=m_n)


@triton.jit
def decode_packed_up_kernel(
    x, norm_weight, logits, bias, gate_up, scale, shared_gate, shared_gate_scale, shared_up, shared_up_scale,
    h, chosen, weights, eps, factor,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BT: tl.constexpr, BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    SHARED_BN: tl.constexpr, SHARED_UNROLL: tl.constexpr,
    SHARED_FORMAT: tl.constexpr, SHARED_SCALE_ROWS: tl.constexpr, SHARED_SCALE_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of the shared expert's hidden channels; then for each tile of an expert's, each choice."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    SHARED: tl.constexpr = (NS * I + SHARED_BN - 1) // SHARED_BN
    i_own = tl.program_id(0) - SHARED
    if i_own < 0:
        if PDL:
            if i_own == -1:
                decode_prefetch_vector(norm_weight, D)
                decode_prefetch_vector(bias, E)
        decode_up_rows(
            x, norm_weight, shared_gate, shared_up, shared_gate_scale, shared_up_scale, h + TOPK * I, eps,
            i_own + SHARED,
            D, NS * I, SHARED_BN, BK, SHARED_UNROLL, SHARED_FORMAT, SHARED_SCALE_ROWS, SHARED_SCALE_COLUMNS, PDL,
        )  # fmt: skip
    else:
        i_slot, i_tile = i_own % TOPK, i_own // TOPK
        if PDL:
            tl.extra.cuda.gdc_wait()
        b_chosen = decode_topk(logits, bias, E, BE, TOPK, BT)
        expert = tl.sum(tl.where(tl.arange(0, BT) == i_slot, b_chosen, 0), axis=0).to(tl.int64)
        if i_own == 0:
            decode_store_choice(logits, bias, b_chosen, chosen, weights, factor, TOPK, BT, BIASED, RENORMALIZE)
        WIDTH: tl.constexpr = (D + 7) // 8 if FORMAT == INT4 else D
        SCALES: tl.constexpr = ((I + SCALE_ROWS - 1) // SCALE_ROWS) * ((D + SCALE_COLUMNS - 1) // SCALE_COLUMNS)
        p_gate, p_scale = gate_up + expert * (2 * I * WIDTH), scale + expert * (2 * SCALES)
        decode_up_rows(
            x, norm_weight, p_gate, p_gate + I * WIDTH, p_scale, p_scale + SCALES, h + i_slot * I, eps, i_tile,
            D, I, BN, BK, UNROLL, FORMAT, SCALE_ROWS, SCALE_COLUMNS, False,
        )  # fmt: skip


@triton.jit
def decode_packed_down_kernel(
    h, chosen, weights, down, scale, shared_down, shared_scale, y,
    TOPK: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    SHARED_FORMAT: tl.constexpr, SHARED_SCALE_ROWS: tl.constexpr, SHARED_SCALE_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: BN of the D outputs, UNROLL choices at a time. y holds the residual and is added to."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = (I + 7) // 8 if FORMAT == INT4 else I
    SCALES: tl.constexpr = ((D + SCALE_ROWS - 1) // SCALE_ROWS) * ((I + SCALE_COLUMNS - 1) // SCALE_COLUMNS)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < D
    o_k = tl.arange(0, BK)
    if NS > 0:
        p_sh = tile_rows(tile_pointer(shared_down, NS * I, SHARED_FORMAT), o_n, NS * I, SHARED_FORMAT)
        p_shs = p_sh
        if SHARED_FORMAT != DENSE:
            p_shs = tile_scale_rows(shared_scale, o_n, NS * I, SHARED_SCALE_ROWS, SHARED_SCALE_COLUMNS)
        b_first = tile_numbers(p_sh, 0, m_n, NS * I, BK, SHARED_FORMAT)
        b_first_scale = tile_scales(p_shs, 0, m_n, NS * I, BK, SHARED_SCALE_COLUMNS, SHARED_FORMAT)
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_out = tl.load(y + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = tl.zeros([BN, BK // (128 // down.dtype.element_ty.primitive_bitwidth if FORMAT == DENSE else 8)], tl.float32)
    for i_first in range(0, TOPK, UNROLL):
        for u in tl.static_range(UNROLL):
            i_slot = i_first + u
            expert, weight = tl.load(chosen + i_slot).to(tl.int64), tl.load(weights + i_slot)
            p_w = tile_rows(tile_pointer(down + expert * (D * WIDTH), I, FORMAT), o_n, I, FORMAT)
            p_s = p_w
            if FORMAT != DENSE:
                p_s = tile_scale_rows(scale + expert * SCALES, o_n, I, SCALE_ROWS, SCALE_COLUMNS)
            for i_k in range(0, I, BK):
                b_w = tile_numbers(p_w, i_k, m_n, I, BK, FORMAT)
                b_s = tile_scales(p_s, i_k, m_n, I, BK, SCALE_COLUMNS, FORMAT)
                if FORMAT != DENSE and SCALE_COLUMNS >= I:
                    b_s = row_scales(p_s, m_n, I, SCALE_COLUMNS, FORMAT)[:, None]
                b_h = tl.load(h + i_slot * I + i_k + o_k, mask=i_k + o_k < I, other=0.0).to(tl.float32) * weight
                b_y += tile_sums(b_w, b_s, tile_input(b_h, FORMAT), FORMAT)
    if NS > 0:
        b_h = tl.load(h + TOPK * I + o_k, mask=o_k < NS * I, other=0.0).to(tl.float32)
        b_z = tile_sums(b_first, b_first_scale, tile_input(b_h, SHARED_FORMAT), SHARED_FORMAT)
        for i_k in range(BK, NS * I, BK):
            b_w = tile_numbers(p_sh, i_k, m_n, NS * I, BK, SHARED_FORMAT)
            b_s = tile_scales(p_shs, i_k, m_n, NS * I, BK, SHARED_SCALE_COLUMNS, SHARED_FORMAT)
            b_h = tl.load(h + TOPK * I + i_k + o_k, mask=i_k + o_k < NS * I, other=0.0).to(tl.float32)
            b_z += tile_sums(b_w, b_s, tile_input(b_h, SHARED_FORMAT), SHARED_FORMAT)
        b_sum = tl.sum(b_z, axis=1)
        if SHARED_FORMAT != DENSE:
            b_sum *= row_scales(p_shs, m_n, NS * I, SHARED_SCALE_COLUMNS, SHARED_FORMAT)
        b_out += b_sum
    tl.store(y + o_n, (b_out + tl.sum(b_y, axis=1)).to(y.dtype.element_ty), mask=m_n)


def decode_packed_expert_up(
    x: torch.Tensor,
    logits: torch.Tensor,
    h: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    *,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor,
    gate_up: PackedStack | torch.Tensor,
    shared: tuple[Linear, Linear] | None,
    configs: tuple[GemvConfig, GemvConfig],
    factor: float,
    biased: bool,
    renormalize: bool,
    gpu: str = "sm_90",
    pdl: bool = False,
) -> None:
    """
    As `decode_expert_up` of experts.py, for packed weights.

    Args:
        x, logits, h, chosen, weights, norm_weight, eps, bias, factor, biased, renormalize, pdl: see there.
        gate_up: [E, 2 I, D], of a format that has tiles (weights/tiles.py), or dense.
        shared: gate and up projections [NS I, D] of the shared expert, in one format of its own, or None.
        configs: for rows of D columns, of the routed experts and of the shared one; with the same BK and warps.
        gpu: class of the GPU.
    """
    D, I, TOPK, E = x.numel(), h.shape[1], chosen.numel(), logits.numel()
    NS = h.shape[0] - TOPK
    config, shared_config = configs
    tiles, (gate, up) = tiles_of(gate_up, gpu), shared or (gate_up, gate_up)
    shared_tiles = tiles_of(gate, gpu)
    count = triton.cdiv(NS * I, shared_config.BN) + triton.cdiv(I, config.BN) * TOPK
    decode_packed_up_kernel[(count,)](
        x, norm_weight, logits, bias, *operands(gate_up, tiles), *operands(gate, shared_tiles),
        *operands(up, shared_tiles), h, chosen, weights, eps, factor,
        E=E, BE=power_of_two(E), TOPK=TOPK, BT=power_of_two(TOPK), BIASED=biased, RENORMALIZE=renormalize,
        NS=NS, D=D, I=I, BN=config.BN, BK=config.BK, UNROLL=config.UNROLL, **tiles._asdict(),
        SHARED_BN=shared_config.BN, SHARED_UNROLL=shared_config.UNROLL, **shared_constants(shared_tiles), PDL=pdl,
        num_warps=config.num_warps, **overlap_options(pdl),
    )  # fmt: skip


def decode_packed_expert_down(
    h: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    down: PackedStack | torch.Tensor,
    shared_down: Linear | None,
    y: torch.Tensor,
    config: GemvConfig,
    gpu: str = "sm_90",
    pdl: bool = False,
) -> None:
    """As `decode_expert_down` of experts.py, for packed weights; config.UNROLL is a divisor of TOPK, in choices."""
    D, TOPK, I = y.numel(), chosen.numel(), h.shape[1]
    shared_down = down if shared_down is None else shared_down
    tiles, shared_tiles = tiles_of(down, gpu), tiles_of(shared_down, gpu)
    decode_packed_down_kernel[(triton.cdiv(D, config.BN),)](
        h, chosen, weights, *operands(down, tiles), *operands(shared_down, shared_tiles), y,
        TOPK=TOPK, NS=h.shape[0] - TOPK, D=D, I=I, BN=config.BN, BK=config.BK, UNROLL=config.UNROLL,
        **tiles._asdict(), **shared_constants(shared_tiles), PDL=pdl, num_warps=config.num_warps,
        **overlap_options(pdl),
    )  # fmt: skip


__all__ = [
    "decode_packed_down_kernel",
    "decode_packed_expert_down",
    "decode_packed_expert_up",
    "decode_packed_up_kernel",
]
