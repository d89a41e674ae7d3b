"""
Decode step: the experts of several tokens, grouped by expert (decode/routing.py), so that each is read once.

    h_p  = silu(G_e x_n) (U_e x_n)         pair p = (token n, choice s), e its expert                    [P, I]
    z_p  = Y_e h_p                                                                                       [P, D]
    y_n += sum_s w_p z_p                                                                                 [M, D]

The shared expert is NS more choices of weight one that every token takes, each I of its hidden channels; their pairs
stand after the routed ones, choice by choice. One program of the first two launches takes one block of pairs of one
expert and a tile of its outputs, on tensor cores with fp32 sums. z is rounded to the model's dtype, as in the released
code; the last sum is fp32. Adapters of the routed experts add B_e t to G x_n, U x_n and Y h (expert_adapters.py).
"""

import torch

from ..gpu.arithmetic import rounded_dot, sigmoid
from ..gpu.launching import overlap_options
from ..gpu.sizes import padded
from .configs import SkinnyConfig, skinny_constants
from .expert_adapters import ExpertFactors, decode_delta_rows, decode_grouped_adapter

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def decode_pairs(pairs, experts, i_block, M, TOPK: tl.constexpr, NS: tl.constexpr, BM: tl.constexpr):
    """
    (rows of h and z, their tokens, which of them are used, expert, choice of the shared expert or -1) of a block.

    Blocks of the shared expert come first: what they need is known before the grouping.
    """
    o_m = tl.arange(0, BM)
    i_own = i_block - NS * tl.cdiv(M, BM)
    if i_own < 0:
        i_shared = i_block % NS if NS > 0 else i_block * 0
        b_token = i_block // (NS if NS > 0 else 1) * BM + o_m
        b_row, m_m, expert = (TOPK + i_shared) * M + b_token, b_token < M, i_block * 0
    else:
        b_row = tl.load(pairs + i_own * BM + o_m)
        b_token, m_m, expert, i_shared = b_row // TOPK, b_row >= 0, tl.load(experts + i_own), i_block * 0 - 1
    return b_row.to(tl.int64), b_token.to(tl.int64), m_m, expert.to(tl.int64), i_shared


@triton.jit(do_not_specialize=["M"])
def decode_grouped_up_kernel(
    x, pairs, experts, n_blocks, gate_up, shared_gate, shared_up, h, t, adapter, M, stride_x,
    stride_e, stride_n, stride_r,
    TOPK: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, I: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
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
    m_n = o_n < I
    # Chosen as numbers: Triton's AMD backend can't choose between pointers.
    gate_address = (gate_up + expert * (2 * I * D)).to(tl.int64)
    up_address = (gate_up + expert * (2 * I * D) + I * D).to(tl.int64)
    if i_shared >= 0:
        gate_address = (shared_gate + i_shared * (I * D)).to(tl.int64)
        up_address = (shared_up + i_shared * (I * D)).to(tl.int64)
    w_gate = gate_address.to(tl.pointer_type(gate_up.dtype.element_ty))
    w_up = up_address.to(tl.pointer_type(gate_up.dtype.element_ty))
    if I * D % 8 == 0:
        w_gate, w_up = tl.multiple_of(w_gate, 16), tl.multiple_of(w_up, 16)
    p_x = x + b_token[:, None] * stride_x
    p_g, p_u = w_gate + o_n[:, None] * D, w_up + o_n[:, None] * D
    b_g = tl.zeros([BM, BN], tl.float32)
    b_u = tl.zeros([BM, BN], tl.float32)
    for i_k in tl.range(0, D, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < D
        m_w = m_n[:, None] & m_k[None, :]
        b_wg = tl.load(p_g + o_k[None, :], mask=m_w, other=0.0)
        b_wu = tl.load(p_u + o_k[None, :], mask=m_w, other=0.0)
        b_x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_g = rounded_dot(b_x, tl.trans(b_wg), b_g, gate_up.dtype.element_ty, "ieee", UPCAST)
        b_u = rounded_dot(b_x, tl.trans(b_wu), b_u, gate_up.dtype.element_ty, "ieee", UPCAST)
    if RANK > 0:
        m_t = m_m & (i_shared + b_row * 0 < 0)
        adapter += expert * stride_e
        b_g = decode_delta_rows(b_g, t, adapter, b_row, m_t, o_n, m_n, stride_n, stride_r, RANK, BR)
        b_u = decode_delta_rows(b_u, t, adapter, b_row, m_t, I + o_n, m_n, stride_n, stride_r, RANK, BR)
    b_h = b_g * sigmoid(b_g) * b_u
    tl.store(h + b_row[:, None] * I + o_n[None, :], b_h.to(h.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M"])
def decode_grouped_down_kernel(
    h, pairs, experts, n_blocks, down, shared_down, z, t, adapter, M, stride_e, stride_n, stride_r,
    TOPK: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, I: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
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
    m_n = o_n < D
    address, stride = (down + expert * (D * I)).to(tl.int64), expert * 0 + I
    if i_shared >= 0:
        address, stride = (shared_down + i_shared * I).to(tl.int64), expert * 0 + NS * I
    w = address.to(tl.pointer_type(down.dtype.element_ty))
    if I % 16 == 0:
        w, stride = tl.multiple_of(w, 16), tl.multiple_of(stride, 16)
    p_h, p_w = h + b_row[:, None] * I, w + o_n[:, None] * stride
    b_z = tl.zeros([BM, BN], tl.float32)
    for i_k in tl.range(0, I, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < I
        b_w = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_h = tl.load(p_h + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_z = rounded_dot(b_h, tl.trans(b_w), b_z, down.dtype.element_ty, "ieee", UPCAST)
    if RANK > 0:
        m_t = m_m & (i_shared + b_row * 0 < 0)
        adapter += expert * stride_e
        b_z = decode_delta_rows(b_z, t, adapter, b_row, m_t, o_n, m_n, stride_n, stride_r, RANK, BR)
    tl.store(z + b_row[:, None] * D + o_n[None, :], b_z.to(z.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M"])
def decode_combine_kernel(
    z, weights, y, M, TOPK: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr
):
    """Program (token, BD channels): y += sum over choices of weight times z."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BD + tl.arange(0, BD)
    m_h = o_h < D
    b_y = tl.load(y + i_n * D + o_h, mask=m_h, other=0.0).to(tl.float32)
    for s in tl.static_range(TOPK):
        b_z = tl.load(z + (i_n * TOPK + s) * D + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_y += tl.load(weights + i_n * TOPK + s) * b_z
    for s in tl.static_range(NS):
        b_y += tl.load(z + ((TOPK + s) * M + i_n) * D + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(y + i_n * D + o_h, b_y.to(y.dtype.element_ty), mask=m_h)


def decode_grouped_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    y: torch.Tensor,
    *,
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    h: torch.Tensor,
    z: torch.Tensor,
    configs: tuple[SkinnyConfig, SkinnyConfig],
    adapters: tuple[ExpertFactors | None, ExpertFactors | None] = (None, None),
    t: torch.Tensor | None = None,
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Add the experts' outputs to y [M, D] contiguous.

    Args:
        x: [M, D], the normed inputs, rows dense.
        weights: [M, TOPK] fp32.
        groups: (pairs, experts, n_blocks) of decode/routing.py.
        gate_up, down: [E, 2 I, D] and [E, D, I], contiguous.
        shared: gate, up and down projections [NS I, D], [NS I, D] and [D, NS I] of the shared expert, or None.
        h, z: workspaces [M (TOPK + NS), I] and [M (TOPK + NS), D] in x's dtype.
        configs: for rows of D and of I columns; their BM is the groups'.
        adapters: of gate_up and of down, or None.
        t: workspace fp32 [M TOPK, at least the adapters' larger rank], contiguous; None without adapters.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see decode_linear).
    """
    (pairs, experts, n_blocks), (M, TOPK) = groups, weights.shape
    _, D, I = down.shape
    shared_gate, shared_up, shared_down = shared or (gate_up, gate_up, down)
    NS = 0 if shared is None else shared_down.shape[1] // I
    up, out = configs
    up_adapter, out_adapter = adapters
    blocks = experts.numel() + NS * triton.cdiv(M, up.BM)
    common = {"TOPK": TOPK, "NS": NS, "I": I, "UPCAST": upcast, "PDL": pdl, **overlap_options(pdl)}
    if up_adapter is not None:
        decode_grouped_adapter(x, up_adapter, t, groups, TOPK, upcast, pdl)
    factor, RANK = _up_factor(up_adapter, gate_up)
    decode_grouped_up_kernel[(triton.cdiv(I, up.BN), blocks)](
        x, pairs, experts, n_blocks, gate_up, shared_gate, shared_up, h, t, factor, M, x.stride(0), *factor.stride(),
        D=D, RANK=RANK, BR=padded(RANK), **skinny_constants(up), **common,
    )  # fmt: skip
    if out_adapter is not None:
        decode_grouped_adapter(h, out_adapter, t, groups, 1, upcast, pdl)
    factor, RANK = _up_factor(out_adapter, down)
    decode_grouped_down_kernel[(triton.cdiv(D, out.BN), blocks)](
        h, pairs, experts, n_blocks, down, shared_down, z, t, factor, M, *factor.stride(),
        D=D, RANK=RANK, BR=padded(RANK), **skinny_constants(out), **common,
    )  # fmt: skip
    decode_combine_kernel[(M, triton.cdiv(D, 512))](
        z, weights, y, M, TOPK=TOPK, NS=NS, D=D, BD=512, PDL=pdl, num_warps=4, **overlap_options(pdl)
    )


def _up_factor(adapter: ExpertFactors | None, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(B, its rank); the weight, which is then not read as such, and 0 without an adapter."""
    return (weight, 0) if adapter is None else (adapter.up, adapter.up.shape[2])


__all__ = [
    "decode_combine_kernel",
    "decode_grouped_down_kernel",
    "decode_grouped_experts",
    "decode_grouped_up_kernel",
]
