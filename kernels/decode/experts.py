"""
Decode step: the experts of one token, routed and shared, two launches.

    h_s   = silu(G_s x̂) (U_s x̂)        [G_s; U_s] = gate_up_proj[e], e the expert of choice s     [TOPK + NS, I]
    y    += sum_s w_s Y_s h_s           Y_s = down_proj[e]                                        [D]

x̂ is the RMSNorm of x. Adapters of the routed experts add B_e t to G x̂, U x̂ and Y h (expert_adapters.py). The shared
expert stands after the routed ones as NS choices of weight one, each I of its hidden channels. The first launch chooses
the experts itself (every program anew: eight maxima over the router's logits cost less than a launch) and leaves choice
and weight for the second. Sums are fp32 and rounded once. What is known before the router has spoken, the shared
expert's weights, is loaded ahead (PDL, see decode_linear).
"""

import torch

from ..gpu.arithmetic import kda_sigmoid
from ..gpu.launching import overlap_options
from ..gpu.sizes import power_of_two
from .configs import GemvConfig
from .expert_adapters import decode_delta
from .linear import decode_block, decode_input, decode_prefetch_vector, decode_products
from .routing import decode_store_choice, decode_topk

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def decode_expert_up_kernel(
    x, norm_weight, logits, bias, gate_up, shared_gate, shared_up, h, chosen, weights, eps, factor,
    t, adapter, stride_e, stride_n, stride_r,
    E: tl.constexpr, BE: tl.constexpr, TOPK: tl.constexpr, BT: tl.constexpr, BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr, D: tl.constexpr, I: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN hidden channels, choice); the shared expert's choices come first."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < I
    i_shared = tl.num_programs(1) - TOPK - 1 - tl.program_id(1)  # from 0 on: a choice of the shared expert
    i_slot = tl.num_programs(1) - 1 - tl.program_id(1)
    w_gate, w_up = shared_gate + i_shared * (I * D), shared_up + i_shared * (I * D)
    # Carried through the branch as numbers: Triton's AMD backend can't carry two pointers.
    gate_address, up_address = w_gate.to(tl.int64), w_up.to(tl.int64)
    o_k = tl.arange(0, BK)
    o_row = o_n[:, None] * D
    m_ahead = m_n & (i_shared + o_n * 0 >= 0)
    b_g0, b_g1 = decode_block(w_gate + o_row, o_k, m_ahead, D), decode_block(w_gate + o_row, o_k + BK, m_ahead, D)
    b_u0, b_u1 = decode_block(w_up + o_row, o_k, m_ahead, D), decode_block(w_up + o_row, o_k + BK, m_ahead, D)
    if PDL:
        if tl.program_id(0) == 0:
            decode_prefetch_vector(norm_weight, D)
            decode_prefetch_vector(bias, E)
        tl.extra.cuda.gdc_wait()
    expert = i_slot * 0
    if i_shared < 0:
        b_chosen = decode_topk(logits, bias, E, BE, TOPK, BT)
        expert = tl.sum(tl.where(tl.arange(0, BT) == i_slot, b_chosen, 0), axis=0)
        if (tl.program_id(0) == 0) & (i_slot == 0):
            decode_store_choice(logits, bias, b_chosen, chosen, weights, factor, TOPK, BT, BIASED, RENORMALIZE)
        p_gate = gate_up + expert.to(tl.int64) * (2 * I * D) + o_row
        p_up = p_gate + I * D
        gate_address = (gate_up + expert.to(tl.int64) * (2 * I * D)).to(tl.int64)
        up_address = (gate_up + expert.to(tl.int64) * (2 * I * D) + I * D).to(tl.int64)
        b_g0, b_g1 = decode_block(p_gate, o_k, m_n, D), decode_block(p_gate, o_k + BK, m_n, D)
        b_u0, b_u1 = decode_block(p_up, o_k, m_n, D), decode_block(p_up, o_k + BK, m_n, D)
    w_gate = gate_address.to(tl.pointer_type(gate_up.dtype.element_ty))
    w_up = up_address.to(tl.pointer_type(gate_up.dtype.element_ty))
    if I * D % 8 == 0:
        w_gate, w_up = tl.multiple_of(w_gate, 16), tl.multiple_of(w_up, 16)
    b_x, b_ss = decode_input(x, norm_weight, o_k, D, True, False)
    b_g, b_u = decode_products(b_g0, b_x), decode_products(b_u0, b_x)
    b_x, b_xx = decode_input(x, norm_weight, o_k + BK, D, True, False)
    b_g += decode_products(b_g1, b_x)
    b_u += decode_products(b_u1, b_x)
    b_ss += b_xx
    for i_k in range(2 * BK, D, BK * UNROLL):
        for u in tl.static_range(UNROLL):
            o_j = i_k + u * BK + o_k
            b_wg, b_wu = decode_block(w_gate + o_row, o_j, m_n, D), decode_block(w_up + o_row, o_j, m_n, D)
            b_x, b_xx = decode_input(x, norm_weight, o_j, D, True, False)
            b_g += decode_products(b_wg, b_x)
            b_u += decode_products(b_wu, b_x)
            b_ss += b_xx
    b_r = tl.rsqrt(tl.sum(b_ss, axis=0) / D + eps)
    b_gate, b_up = tl.sum(b_g, axis=1) * b_r, tl.sum(b_u, axis=1) * b_r
    if RANK > 0:
        m_routed = m_n & (i_shared + o_n * 0 < 0)
        t += i_slot * RANK
        adapter += expert.to(tl.int64) * stride_e
        b_gate += decode_delta(t, adapter, o_n, m_routed, stride_n, stride_r, RANK, BR)
        b_up += decode_delta(t, adapter, I + o_n, m_routed, stride_n, stride_r, RANK, BR)
    tl.store(h + i_slot * I + o_n, (b_gate * kda_sigmoid(b_gate) * b_up).to(h.dtype.element_ty), mask=m_n)


@triton.jit
def decode_expert_down_kernel(
    h, chosen, weights, down, shared_down, y, t, adapter, stride_e, stride_n, stride_r,
    TOPK: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, I: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BN of the D outputs. y holds the residual and is added to."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < D
    o_k = tl.arange(0, BK)
    p_shared = shared_down + o_n[:, None] * (NS * I)
    if NS > 0:
        b_first = decode_block(p_shared, o_k, m_n, NS * I)
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_out = tl.load(y + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = tl.zeros([BN, BK * down.dtype.element_ty.primitive_bitwidth // 128], tl.float32)
    for i_slot in tl.static_range(TOPK):
        expert, weight = tl.load(chosen + i_slot).to(tl.int64), tl.load(weights + i_slot)
        p_w = down + expert * (D * I) + o_n[:, None] * I
        for i_k in range(0, I, BK * UNROLL):
            for u in tl.static_range(UNROLL):
                o_i = i_k + u * BK + o_k
                b_w = decode_block(p_w, o_i, m_n, I)
                b_h = tl.load(h + i_slot * I + o_i, mask=o_i < I, other=0.0).to(tl.float32) * weight
                b_y += decode_products(b_w, b_h)
        if RANK > 0:
            p_b = adapter + expert * stride_e
            b_out += weight * decode_delta(t + i_slot * RANK, p_b, o_n, m_n, stride_n, stride_r, RANK, BR)
    if NS > 0:
        b_h = tl.load(h + TOPK * I + o_k, mask=o_k < NS * I, other=0.0).to(tl.float32)
        b_y += decode_products(b_first, b_h)
        for i_k in range(BK, NS * I, BK):
            b_h = tl.load(h + TOPK * I + i_k + o_k, mask=i_k + o_k < NS * I, other=0.0).to(tl.float32)
            b_y += decode_products(decode_block(p_shared, i_k + o_k, m_n, NS * I), b_h)
    tl.store(y + o_n, (b_out + tl.sum(b_y, axis=1)).to(y.dtype.element_ty), mask=m_n)


def decode_expert_up(
    x: torch.Tensor,
    logits: torch.Tensor,
    h: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    *,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor,
    gate_up: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor] | None,
    config: GemvConfig,
    factor: float,
    biased: bool,
    renormalize: bool,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
    pdl: bool = False,
) -> None:
    """
    Fill h [TOPK + NS, I], chosen [TOPK] int32 and weights [TOPK] fp32 for one token.

    Args:
        x: [D], the residual stream; norm_weight, eps: of the norm before the experts.
        logits: [E] fp32 of the router; bias [E].
        gate_up: [E, 2 I, D] contiguous.
        shared: gate and up projections [NS I, D] of the shared expert, or None.
        factor, biased, renormalize: see decode/routing.py.
        adapter: t [TOPK, R] and B [E, 2 I, R] of decode/expert_adapters.py, or None.
        config: for rows of D columns.
        pdl: launch programmatically dependent (see decode_linear).
    """
    E, rows, D = gate_up.shape
    I, TOPK = rows // 2, chosen.numel()
    shared_gate, shared_up = shared or (gate_up, gate_up)
    t, up = adapter or (h, gate_up)
    RANK = 0 if adapter is None else up.shape[2]
    decode_expert_up_kernel[(triton.cdiv(I, config.BN), h.shape[0])](
        x, norm_weight, logits, bias, gate_up, shared_gate, shared_up, h, chosen, weights, eps, factor,
        t, up, *up.stride(),
        E=E, BE=power_of_two(E), TOPK=TOPK, BT=power_of_two(TOPK), BIASED=biased,
        RENORMALIZE=renormalize, D=D, I=I, RANK=RANK, BR=power_of_two(RANK),
        BN=config.BN, BK=config.BK, UNROLL=config.UNROLL, PDL=pdl,
        num_warps=config.num_warps, **overlap_options(pdl),
    )  # fmt: skip


def decode_expert_down(
    h: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    shared_down: torch.Tensor | None,
    y: torch.Tensor,
    config: GemvConfig,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
    pdl: bool = False,
) -> None:
    """
    Add the experts' outputs to y [D], which holds the residual.

    h [TOPK + NS, I], chosen, weights as `decode_expert_up` left them; down [E, D, I] contiguous; shared_down [D, NS I]
    or None; config for rows of I columns; adapter: t [TOPK, R] and B [E, D, R], or None; pdl as there.
    """
    (_, D, I), TOPK = down.shape, chosen.numel()
    t, up = adapter or (h, down)
    RANK = 0 if adapter is None else up.shape[2]
    decode_expert_down_kernel[(triton.cdiv(D, config.BN),)](
        h, chosen, weights, down, down if shared_down is None else shared_down, y, t, up, *up.stride(),
        TOPK=TOPK, NS=h.shape[0] - TOPK, D=D, I=I, RANK=RANK, BR=power_of_two(RANK),
        BN=config.BN, BK=config.BK, UNROLL=config.UNROLL, PDL=pdl,
        num_warps=config.num_warps, **overlap_options(pdl),
    )  # fmt: skip


__all__ = ["decode_expert_down", "decode_expert_down_kernel", "decode_expert_up", "decode_expert_up_kernel"]
