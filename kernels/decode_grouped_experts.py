"""
Decode step: the routed experts of several tokens, grouped by expert (decode_routing), so that each is read once.

    h_p  = silu(G_e x_n) (U_e x_n)         pair p = (token n, choice s), e its expert                    [P, I]
    z_p  = D_e h_p                                                                                       [P, H]
    y_n += sum_s w_p z_p                                                                                 [N, H]

One program of the first two launches takes one block of pairs of one expert and a tile of its outputs, on tensor cores
with fp32 sums. z is rounded to the model's dtype, as in the released code; the last sum is fp32.
"""

import torch

from .decode_configs import SkinnyConfig, overlap_options
from .kda_triton_math import kda_dot, kda_sigmoid

try:
    import triton
    import triton.language as tl
except ImportError:
    from .kda_triton_absent import tl, triton


@triton.jit
def decode_grouped_up_kernel(
    x, pairs, experts, n_blocks, gate_up, h, stride_x,
    TOPK: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN hidden channels, block of pairs)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_block = tl.program_id(1)
    if i_block >= tl.load(n_blocks):
        return
    b_pair = tl.load(pairs + i_block * BM + tl.arange(0, BM))
    m_m = b_pair >= 0
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < I
    p_x = x + (b_pair // TOPK).to(tl.int64)[:, None] * stride_x
    p_g = gate_up + tl.load(experts + i_block).to(tl.int64) * (2 * I * K) + o_n[:, None] * K
    p_u = p_g + I * K
    b_g = tl.zeros([BM, BN], tl.float32)
    b_u = tl.zeros([BM, BN], tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        m_w = m_n[:, None] & m_k[None, :]
        b_wg = tl.load(p_g + o_k[None, :], mask=m_w, other=0.0)
        b_wu = tl.load(p_u + o_k[None, :], mask=m_w, other=0.0)
        b_x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_g = kda_dot(b_x, tl.trans(b_wg), b_g, gate_up.dtype.element_ty, "ieee", UPCAST)
        b_u = kda_dot(b_x, tl.trans(b_wu), b_u, gate_up.dtype.element_ty, "ieee", UPCAST)
    b_h = b_g * kda_sigmoid(b_g) * b_u
    p_h = h + b_pair.to(tl.int64)[:, None] * I + o_n[None, :]
    tl.store(p_h, b_h.to(h.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def decode_grouped_down_kernel(
    h, pairs, experts, n_blocks, down, z,
    H: tl.constexpr, I: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN outputs, block of pairs)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_block = tl.program_id(1)
    if i_block >= tl.load(n_blocks):
        return
    b_pair = tl.load(pairs + i_block * BM + tl.arange(0, BM))
    m_m = b_pair >= 0
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < H
    p_h = h + b_pair.to(tl.int64)[:, None] * I
    p_w = down + tl.load(experts + i_block).to(tl.int64) * (H * I) + o_n[:, None] * I
    b_z = tl.zeros([BM, BN], tl.float32)
    for i_k in tl.range(0, I, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < I
        b_w = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_h = tl.load(p_h + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_z = kda_dot(b_h, tl.trans(b_w), b_z, down.dtype.element_ty, "ieee", UPCAST)
    p_z = z + b_pair.to(tl.int64)[:, None] * H + o_n[None, :]
    tl.store(p_z, b_z.to(z.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def decode_combine_kernel(z, weights, y, TOPK: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr):
    """Program (token, BH channels): y += sum over choices of weight times z."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_h = o_h < H
    b_y = tl.zeros([BH], tl.float32)
    for s in tl.static_range(TOPK):
        b_z = tl.load(z + (i_n * TOPK + s) * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_y += tl.load(weights + i_n * TOPK + s) * b_z
    b_y += tl.load(y + i_n * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(y + i_n * H + o_h, b_y.to(y.dtype.element_ty), mask=m_h)


def decode_grouped_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate_up: torch.Tensor,
    down: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    y: torch.Tensor,
    configs: tuple[SkinnyConfig, SkinnyConfig],
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Add the routed experts' outputs to y [N, H] contiguous.

    Args:
        x: [N, H], the normed inputs, rows dense.
        weights: [N, TOPK] fp32.
        groups: (pairs, experts, n_blocks) of decode_routing.
        gate_up, down: [E, 2 I, H] and [E, H, I], contiguous.
        h, z: workspaces [N TOPK, I] and [N TOPK, H] in x's dtype.
        configs: for rows of H and of I columns; their BM is the groups'.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see decode_linear).
    """
    (pairs, experts, n_blocks), (N, TOPK) = groups, weights.shape
    _, H, I = down.shape
    up, out = configs
    decode_grouped_up_kernel[(triton.cdiv(I, up.BN), experts.numel())](
        x, pairs, experts, n_blocks, gate_up, h, x.stride(0),
        TOPK=TOPK, K=H, I=I, BM=up.BM, BN=up.BN, BK=up.BK, STAGES=up.num_stages, UPCAST=upcast, PDL=pdl,
        num_warps=up.num_warps, **overlap_options(pdl),
    )  # fmt: skip
    decode_grouped_down_kernel[(triton.cdiv(H, out.BN), experts.numel())](
        h, pairs, experts, n_blocks, down, z,
        H=H, I=I, BM=out.BM, BN=out.BN, BK=out.BK, STAGES=out.num_stages, UPCAST=upcast, PDL=pdl,
        num_warps=out.num_warps, **overlap_options(pdl),
    )  # fmt: skip
    decode_combine_kernel[(N, triton.cdiv(H, 512))](
        z, weights, y, TOPK=TOPK, H=H, BH=512, PDL=pdl, num_warps=4, **overlap_options(pdl)
    )


__all__ = [
    "decode_combine_kernel",
    "decode_grouped_down_kernel",
    "decode_grouped_experts",
    "decode_grouped_up_kernel",
]
