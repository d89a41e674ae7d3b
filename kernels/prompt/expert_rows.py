"""
The mixture of experts around its two grouped matrix products, one pass each, on GPUs (gradients: kernels/training).

    route      the k best of E experts of each token, and their weights, from the router's logits
    scatter    x [M, D] -> rows [M k, D] in the order of their experts: each row is read once and written k times
    silu_mul   round(round(silu(gate)) * up)
    combine    round(sum_i weights[n, i] * rows[position[n, i]]) in fp32, then round(. + shared), if given

`position` [M, k] int32 is where the rows of each token and slot stand. The roundings, to the dtype of the rows, are
those of the modules in modeling/layers/moe.py.
"""

import torch

from ..gpu.direct_calls import called_directly
from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded, power_of_two
from ..training.expert_rows import differentiate_rows
from ..training.routing import differentiate_route
from ..training.silu_mul import differentiate_silu_mul

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)


@triton.jit(do_not_specialize=["M"])
def route_fwd_kernel(
    logits, bias, weights, experts, scaling, M,
    E: tl.constexpr, KS: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    RENORMALIZE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """BM tokens a program. logits [M, E] fp32 contiguous, bias [E]; weights fp32 and experts int64 [M, KS]."""
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_e, o_k = tl.arange(0, BE), tl.arange(0, BK)
    m_n, m_e = o_n < M, o_e < E
    p_l = logits + o_n.to(tl.int64)[:, None] * E + o_e[None, :]
    b_s = tl.sigmoid(tl.load(p_l, mask=m_n[:, None] & m_e[None, :], other=0.0))
    b_c = b_s + tl.load(bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_v = b_c if BIASED else b_s
    b_c = tl.where(b_c == b_c, b_c, float("inf"))  # a NaN is chosen first, as by torch.topk and decode_topk
    b_c = tl.where(m_e[None, :], b_c, float("-inf"))
    b_w, b_i = tl.zeros([BM, BK], tl.float32), tl.zeros([BM, BK], tl.int32)
    for i in tl.static_range(0, KS):
        # Among scores of -inf the choice is arbitrary, but must be an expert: E is no multiple of BE.
        b_e = tl.minimum(tl.argmax(b_c, axis=1), E - 1)
        m_chosen = o_e[None, :] == b_e[:, None]
        b_x = tl.sum(tl.where(m_chosen, b_v, 0.0), axis=1)
        b_w = tl.where(o_k[None, :] == i, b_x[:, None], b_w)
        b_i = tl.where(o_k[None, :] == i, b_e[:, None], b_i)
        b_c = tl.where(m_chosen, float("-inf"), b_c)
    if RENORMALIZE:
        b_w = b_w / (tl.sum(b_w, axis=1) + 1e-20)[:, None]
    p_o = o_n.to(tl.int64)[:, None] * KS + o_k[None, :]
    m_o = m_n[:, None] & (o_k < KS)[None, :]
    tl.store(weights + p_o, b_w * scaling, mask=m_o)
    tl.store(experts + p_o, b_i.to(tl.int64), mask=m_o)


@triton.jit
def scatter_rows_fwd_kernel(x, position, rows, stride_x, D: tl.constexpr, KS: tl.constexpr, BD: tl.constexpr):
    """One token a program. x [M, D] with dense rows; rows [M KS, D] contiguous."""
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BD)
    m_h = o_h < D
    b_x = tl.load(x + i_n * stride_x + o_h, mask=m_h, other=0.0)
    for i in tl.static_range(0, KS):
        i_r = tl.load(position + i_n * KS + i).to(tl.int64)
        tl.store(rows + i_r * D + o_h, b_x, mask=m_h)


@triton.jit(do_not_specialize=["M"])
def silu_mul_fwd_kernel(gate, up, y, stride_g, stride_u, M, I: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr):
    """BM rows of BI columns. gate, up [M, I] with dense rows; y [M, I] contiguous."""
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1) * BI + tl.arange(0, BI)
    m_nd = (o_n < M)[:, None] & (o_d < I)[None, :]
    b_g = tl.load(gate + o_n[:, None] * stride_g + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    b_u = tl.load(up + o_n[:, None] * stride_u + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    b_g = (b_g * tl.sigmoid(b_g)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + o_n[:, None] * I + o_d[None, :], (b_g * b_u).to(y.dtype.element_ty), mask=m_nd)


@triton.jit
def combine_rows_fwd_kernel(
    rows, position, weights, shared, y, stride_s,
    D: tl.constexpr, KS: tl.constexpr, BD: tl.constexpr, HAS_SHARED: tl.constexpr,
):  # fmt: skip
    """One token a program. rows [M KS, D] contiguous, shared [M, D] with dense rows; y [M, D] contiguous."""
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BD)
    m_h = o_h < D
    b_y = tl.zeros([BD], tl.float32)
    for i in tl.static_range(0, KS):
        i_r = tl.load(position + i_n * KS + i).to(tl.int64)
        b_w = tl.load(weights + i_n * KS + i)
        b_y += b_w * tl.load(rows + i_r * D + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_y = b_y.to(y.dtype.element_ty)
    if HAS_SHARED:
        b_s = tl.load(shared + i_n * stride_s + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_y = (b_y.to(tl.float32) + b_s).to(y.dtype.element_ty)
    tl.store(y + i_n * D + o_h, b_y, mask=m_h)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::route_fwd", mutates_args=())
@launches_beside_first_argument
def route_fwd(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, renormalize: bool, scaling: float, biased: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [M, top_k] fp32 and experts [M, top_k] int64 for logits [M, E] fp32; of equals, the first expert wins.

    The experts are those of the highest sigmoid(logit) + bias, best first, NaN above all numbers. A weight is the
    sigmoid without the bias (with it if `biased`), divided by the sum over the chosen (plus 1e-20) if `renormalize`,
    times `scaling`.
    """
    M, E = logits.shape
    weights = torch.empty(M, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(M, top_k, dtype=torch.int64, device=logits.device)
    if M > 0:
        BE = padded(E)
        BM = max(1, 2048 // BE)
        route_fwd_kernel[(triton.cdiv(M, BM),)](
            logits.contiguous(), bias.contiguous(), weights, experts, scaling, M,
            E=E, KS=top_k, BM=BM, BE=BE, BK=power_of_two(top_k, at_least=2),
            RENORMALIZE=renormalize, BIASED=biased, num_warps=4,
        )  # fmt: skip
    return weights, experts


@route_fwd.register_fake
def _(logits, bias, top_k, renormalize, scaling, biased):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


differentiate_route(route_fwd)


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::scatter_rows_fwd", mutates_args=())
@launches_beside_first_argument
def scatter_rows_fwd(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rows [M k, D]: row position[n, i] is x[n]. `position` [M, k] int32 is a permutation of 0 .. M k - 1."""
    (M, D), KS = x.shape, position.shape[1]
    rows = torch.empty(M * KS, D, dtype=x.dtype, device=x.device)
    if rows.numel() > 0:
        x, BD = _dense(x), padded(D)
        scatter_rows_fwd_kernel[(M,)](
            x, position.contiguous(), rows, x.stride(0), D=D, KS=KS, BD=BD, num_warps=_warps(BD)
        )
    return rows


@scatter_rows_fwd.register_fake
def _(x, position):
    return x.new_empty(x.shape[0] * position.shape[1], x.shape[1])


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::silu_mul_fwd", mutates_args=())
@launches_beside_first_argument
def silu_mul_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for [..., I] tensors of one dtype, halves of one tensor among them; fresh and contiguous."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gates, ups = (_dense(x.reshape(-1, x.shape[-1])) for x in (gate, up))
    if y.numel() > 0:
        M, I = gates.shape
        BI = min(1024, padded(I))
        BM = max(1, 2048 // BI)
        silu_mul_fwd_kernel[(triton.cdiv(M, BM), triton.cdiv(I, BI))](
            gates, ups, y, gates.stride(0), ups.stride(0), M, I=I, BM=BM, BI=BI, num_warps=4
        )
    return y


@silu_mul_fwd.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


differentiate_silu_mul(silu_mul_fwd)


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::combine_rows_fwd", mutates_args=())
@launches_beside_first_argument
def combine_rows_fwd(
    rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor | None
) -> torch.Tensor:
    """[M, D] in the dtype of rows [M k, D]; position [M, k] int32, weights [M, k] fp32, shared [M, D] or None."""
    (M, KS), D = position.shape, rows.shape[1]
    y = torch.empty(M, D, dtype=rows.dtype, device=rows.device)
    if y.numel() > 0:
        shared, BD = None if shared is None else _dense(shared), padded(D)
        combine_rows_fwd_kernel[(M,)](
            rows, position.contiguous(), weights.contiguous(), shared, y, 0 if shared is None else shared.stride(0),
            D=D, KS=KS, BD=BD, HAS_SHARED=shared is not None, num_warps=_warps(BD),
        )  # fmt: skip
    return y


@combine_rows_fwd.register_fake
def _(rows, position, weights, shared):
    return rows.new_empty(position.shape[0], rows.shape[1])


differentiate_rows(scatter_rows_fwd, combine_rows_fwd)


def _warps(elements: int) -> int:
    """Warps of a program: 32 elements a thread, which leaves room for many rows at once on a multiprocessor."""
    return min(8, max(1, elements // 1024))


__all__ = ["combine_rows_fwd", "route_fwd", "scatter_rows_fwd", "silu_mul_fwd"]
