"""
Gradients of the RMS norms, one pass over the rows each; the forwards are in kernels/prompt/norms.py.

With r = 1 / sqrt(mean(x^2) + eps), n = x r and, for the gated norm, s = sigmoid(gate) (plain: s = 1):

    u = dy w s        dx = r (u - n mean(u n))  (+ the gradient of the sum, where the norm adds a residual)
    dw = sum over rows of dy n s                dgate = dy w n s (1 - s)

in fp32 over the last dimension D, each rounded once. A program goes through rows that lie `programs` apart and keeps
its part of dw in registers; the parts are added afterwards in a fixed order.
"""

from typing import Any

import torch

from ..gpu.launching import dense_rows, launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)
# Programs at most, four or more for each multiprocessor of a Hopper GPU; each gives one part of dw.
_PROGRAMS = 1024


@triton.jit(do_not_specialize=["M"])
def rms_norm_bwd_kernel(
    x, dy, dtotal, weight, dx, dweights, stride_x, stride_y, stride_t, eps, M,
    D: tl.constexpr, BD: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """x, dy, dtotal [M, D] with dense rows; dx [M, D] contiguous; dweights [programs, D] fp32."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BD], tl.float32)
    for i_n in range(i_p, M, tl.num_programs(0)):
        b_x = tl.load(x + i_n * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i_n * stride_y + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
        b_x *= b_r
        b_dw += b_dy * b_x
        b_dy *= b_w
        b_dx = b_r * (b_dy - b_x * (tl.sum(b_dy * b_x, axis=0) / D))
        if HAS_TOTAL:
            b_dx += tl.load(dtotal + i_n * stride_t + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(dx + i_n * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_d)
    tl.store(dweights + i_p * D + o_d, b_dw, mask=m_d)


@triton.jit(do_not_specialize=["M"])
def gated_rms_norm_bwd_kernel(
    x, gate, dy, weight, dx, dgate, dweights, stride_x, stride_g, stride_y, eps, M,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM rows at a time. x, gate, dy [M, D] with dense rows; dx, dgate [M, D] contiguous; dweights [programs, D]."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([BD], tl.float32)
    for i_n in range(i_p * BM, M, tl.num_programs(0) * BM):
        o_n = i_n + tl.arange(0, BM)
        m_nd = (o_n < M)[:, None] & m_d[None, :]
        b_x = tl.load(x + o_n[:, None] * stride_x + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        b_g = tl.load(gate + o_n[:, None] * stride_g + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + o_n[:, None] * stride_y + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]
        b_s = tl.sigmoid(b_g)
        b_x *= b_r
        b_dy *= b_s
        b_dw += tl.sum(b_dy * b_x, axis=0)
        b_dy *= b_w
        b_dx = b_r * (b_dy - b_x * (tl.sum(b_dy * b_x, axis=1) / D)[:, None])
        p_o = o_n[:, None] * D + o_d[None, :]
        tl.store(dx + p_o, b_dx.to(dx.dtype.element_ty), mask=m_nd)
        tl.store(dgate + p_o, (b_dy * b_x * (1.0 - b_s)).to(dgate.dtype.element_ty), mask=m_nd)
    tl.store(dweights + i_p * D + o_d, b_dw, mask=m_d)


@torch.library.custom_op(f"{_NAMESPACE}::rms_norm_bwd", mutates_args=())
@launches_beside_first_argument
def rms_norm_bwd(
    x: torch.Tensor, dy: torch.Tensor, dtotal: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx in the shape of x [..., D], dweight [D]) of the plain norm of x; `dtotal`, if given, is added to dx."""
    D, dx = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dys, totals = (None if t is None else dense_rows(t) for t in (x, dy, dtotal))
    programs, BD = min(rows.shape[0], _PROGRAMS), padded(D)
    parts = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        rms_norm_bwd_kernel[(programs,)](
            rows, dys, totals, weight, dx, parts,
            rows.stride(0), dys.stride(0), 0 if totals is None else totals.stride(0), eps, rows.shape[0],
            D=D, BD=BD, HAS_TOTAL=dtotal is not None, num_warps=min(8, max(1, BD // 512)),
        )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


@rms_norm_bwd.register_fake
def _(x, dy, dtotal, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.custom_op(f"{_NAMESPACE}::gated_rms_norm_bwd", mutates_args=())
@launches_beside_first_argument
def gated_rms_norm_bwd(
    x: torch.Tensor, gate: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dgate, dweight) of the gated norm of x [..., D] with a gate of the same shape and weight [D]."""
    D, (dx, dgate) = x.shape[-1], (torch.empty(x.shape, dtype=t.dtype, device=x.device) for t in (x, gate))
    rows, gates, dys = map(dense_rows, (x, gate, dy))
    BD = padded(D)
    BM = max(1, 2048 // BD)
    programs = min(triton.cdiv(rows.shape[0], BM), _PROGRAMS)
    parts = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        gated_rms_norm_bwd_kernel[(programs,)](
            rows, gates, dys, weight, dx, dgate, parts,
            rows.stride(0), gates.stride(0), dys.stride(0), eps, rows.shape[0],
            D=D, BD=BD, BM=BM, num_warps=4,
        )  # fmt: skip
    return dx, dgate, parts.sum(0).to(weight.dtype)


@gated_rms_norm_bwd.register_fake
def _(x, gate, dy, weight, eps):
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _setup_plain(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward_plain(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return *rms_norm_bwd(x, dy, None, weight, ctx.eps), None


def _setup_added(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _backward_added(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:  # the norm was not used, only the sum
        return dtotal, dtotal, None, None
    total, weight = ctx.saved_tensors
    dx, dweight = rms_norm_bwd(total, dy, dtotal, weight, ctx.eps)
    return dx, dx, dweight, None


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_gated(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    return *gated_rms_norm_bwd(x, gate, dy, weight, ctx.eps), None


def differentiate_norms(rms_norm_fwd: Any, add_rms_norm_fwd: Any, gated_rms_norm_fwd: Any) -> None:
    """Give the forwards' operators their backwards."""
    rms_norm_fwd.register_autograd(_backward_plain, setup_context=_setup_plain)
    add_rms_norm_fwd.register_autograd(_backward_added, setup_context=_setup_added)
    gated_rms_norm_fwd.register_autograd(_backward_gated, setup_context=_setup_gated)


__all__ = ["differentiate_norms", "gated_rms_norm_bwd", "rms_norm_bwd"]
