"""
Decode step: the routed experts of one token, two launches.

    h_s   = silu(G_e x̂) (U_e x̂)                 e = expert of choice s, [G_e; U_e] = gate_up_proj[e]      [TOPK, I]
    y    += sum_s w_s D_e h_s + D_shared (silu(g) u)           D_e = down_proj[e]                          [H]

x̂ is the RMSNorm of x. The first launch chooses the experts itself (every program anew: eight maxima over the router's
logits cost less than a launch) and leaves choice and weight for the second. Sums are fp32 and rounded once.
"""

import torch

from .decode_configs import GemvConfig
from .decode_routing import decode_topk
from .kda_triton_math import kda_sigmoid

try:
    import triton
    import triton.language as tl
except ImportError:
    from .kda_triton_absent import tl, triton


@triton.jit
def decode_expert_up_kernel(
    x, norm_weight, logits, bias, gate_up, h, chosen, weights, eps, factor,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr,
    K: tl.constexpr, I: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN hidden channels, choice)."""
    i_n, i_slot = tl.program_id(0), tl.program_id(1)
    expert, weight = decode_topk(logits, bias, i_slot, E, BE, TOPK, BIASED, RENORMALIZE)
    if i_n == 0:
        tl.store(chosen + i_slot, expert)
        tl.store(weights + i_slot, weight * factor)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < I
    p_g = gate_up + expert.to(tl.int64) * (2 * I * K) + o_n[:, None] * K
    p_u = p_g + I * K
    b_g = tl.zeros([BN, BK], tl.float32)
    b_u = tl.zeros([BN, BK], tl.float32)
    b_ss = tl.zeros([BK], tl.float32)
    for i_k in range(0, K, BK * UNROLL):
        for u in tl.static_range(UNROLL):
            o_k = i_k + u * BK + tl.arange(0, BK)
            m_k = o_k < K if K % (BK * UNROLL) != 0 else tl.full([BK], True, tl.int1)
            m_w = m_n[:, None] & m_k[None, :]
            b_wg = tl.load(p_g + o_k[None, :], mask=m_w, other=0.0).to(tl.float32)
            b_wu = tl.load(p_u + o_k[None, :], mask=m_w, other=0.0).to(tl.float32)
            b_x = tl.load(x + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_ss += b_x * b_x
            b_x *= tl.load(norm_weight + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_g += b_wg * b_x[None, :]
            b_u += b_wu * b_x[None, :]
    r = tl.rsqrt(tl.sum(b_ss, axis=0) / K + eps)
    b_gate, b_up = tl.sum(b_g, axis=1) * r, tl.sum(b_u, axis=1) * r
    tl.store(h + i_slot * I + o_n, (b_gate * kda_sigmoid(b_gate) * b_up).to(h.dtype.element_ty), mask=m_n)


@triton.jit
def decode_expert_down_kernel(
    h, shared, chosen, weights, down, shared_down, y,
    TOPK: tl.constexpr, H: tl.constexpr, I: tl.constexpr, IS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Program: BN of the H outputs. y holds the residual and is added to; shared [2 IS]: the shared expert's g and u."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < H
    b_y = tl.zeros([BN, BK], tl.float32)
    for i_slot in range(0, TOPK):
        expert, weight = tl.load(chosen + i_slot).to(tl.int64), tl.load(weights + i_slot)
        p_w = down + expert * (H * I) + o_n[:, None] * I
        for i_k in range(0, I, BK * UNROLL):
            for u in tl.static_range(UNROLL):
                o_k = i_k + u * BK + tl.arange(0, BK)
                m_k = o_k < I if I % (BK * UNROLL) != 0 else tl.full([BK], True, tl.int1)
                b_w = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0).to(tl.float32)
                b_h = tl.load(h + i_slot * I + o_k, mask=m_k, other=0.0).to(tl.float32) * weight
                b_y += b_w * b_h[None, :]
    for i_k in range(0, IS, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < IS
        p_w = shared_down + o_n[:, None] * IS + o_k[None, :]
        b_w = tl.load(p_w, mask=m_n[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_g = tl.load(shared + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_g *= kda_sigmoid(b_g) * tl.load(shared + IS + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_y += b_w * b_g[None, :]
    b_out = tl.sum(b_y, axis=1) + tl.load(y + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(y + o_n, b_out.to(y.dtype.element_ty), mask=m_n)


def decode_expert_up(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    logits: torch.Tensor,
    bias: torch.Tensor,
    gate_up: torch.Tensor,
    h: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    config: GemvConfig,
    *,
    factor: float,
    biased: bool,
    renormalize: bool,
) -> None:
    """
    Fill h [TOPK, I], chosen [TOPK] int32 and weights [TOPK] fp32 for one token.

    Args:
        x: [H], the residual stream; norm_weight, eps: of the norm in front of the experts.
        logits: [E] fp32 of the router; bias [E].
        gate_up: [E, 2 I, H] contiguous.
        factor, biased, renormalize: see decode_routing.
        config: for rows of H columns.
    """
    E, rows, K = gate_up.shape
    TOPK, I = h.shape[0], rows // 2
    decode_expert_up_kernel[(triton.cdiv(I, config.BN), TOPK)](
        x, norm_weight, logits, bias, gate_up, h, chosen, weights, eps, factor,
        E=E, BE=triton.next_power_of_2(E), TOPK=TOPK, BIASED=biased, RENORMALIZE=renormalize,
        K=K, I=I, BN=config.BN, BK=config.BK, UNROLL=config.UNROLL, num_warps=config.num_warps,
    )  # fmt: skip


def decode_expert_down(
    h: torch.Tensor,
    shared: torch.Tensor | None,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    shared_down: torch.Tensor | None,
    y: torch.Tensor,
    config: GemvConfig,
) -> None:
    """
    Add the experts' outputs to y [H], which holds the residual.

    h [TOPK, I], chosen, weights as `decode_expert_up` left them; down [E, H, I] contiguous; shared [2 IS] and
    shared_down [H, IS] of the shared expert, or None for both; config for rows of I columns.
    """
    _, H, I = down.shape
    decode_expert_down_kernel[(triton.cdiv(H, config.BN),)](
        h, shared, chosen, weights, down, shared_down, y,
        TOPK=h.shape[0], H=H, I=I, IS=0 if shared is None else shared_down.shape[1],
        BN=config.BN, BK=config.BK, UNROLL=config.UNROLL, num_warps=config.num_warps,
    )  # fmt: skip


__all__ = ["decode_expert_down", "decode_expert_down_kernel", "decode_expert_up", "decode_expert_up_kernel"]
