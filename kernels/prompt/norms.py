"""
RMS norms in one pass each, on GPUs; kernels/training/norms.py has their gradients.

    plain     y = w * round(x / sqrt(mean(x^2) + eps))                     x = round(residual + x) first, if given
    gated     y = round(w * x / sqrt(mean(x^2) + eps) * sigmoid(gate))     (arXiv 2510.26692, eq. 10)

over the last dimension D, in fp32; `round` is to the dtype of x. These are the roundings of KimiRMSNorm and
KimiRMSNormGated (modeling/layers/norms.py), which say where they come from. Rows are strided, y is contiguous.
"""

import torch

from ..gpu.direct_calls import called_directly
from ..gpu.launching import dense_rows, launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded
from ..training.norms import differentiate_norms

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)


@triton.jit
def rms_norm_fwd_kernel(
    x, residual, weight, total, y, stride_x, stride_r, eps,
    D: tl.constexpr, BD: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One row a program. x, residual [M, D] with dense rows; total, y [M, D] contiguous."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.load(x + i_n * stride_x + o_d, mask=m_d, other=0.0)
    if HAS_RESIDUAL:
        b_r = tl.load(residual + i_n * stride_r + o_d, mask=m_d, other=0.0)
        b_x = (b_r.to(tl.float32) + b_x.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + i_n * D + o_d, b_x, mask=m_d)
    b_x = b_x.to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_w * b_x.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + i_n * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["M"])
def gated_rms_norm_fwd_kernel(
    x, gate, weight, y, stride_x, stride_g, eps, M,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM rows a program (heads are short). x, gate [M, D] with dense rows; y [M, D] contiguous."""
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_nd = (o_n < M)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x + o_n[:, None] * stride_x + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    b_g = tl.load(gate + o_n[:, None] * stride_g + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]
    b_y = b_w[None, :] * b_x * tl.sigmoid(b_g)
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m_nd)


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::rms_norm_fwd", mutates_args=())
@launches_beside_first_argument
def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The plain norm of x [..., D], weight [D] of the same dtype; a fresh contiguous tensor."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, D = dense_rows(x), x.shape[-1]
    if x.numel() > 0:
        BD = padded(D)
        rms_norm_fwd_kernel[(rows.shape[0],)](
            rows, None, weight, None, y, rows.stride(0), 0, eps,
            D=D, BD=BD, HAS_RESIDUAL=False, num_warps=_warps(BD),
        )  # fmt: skip
    return y


@rms_norm_fwd.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::add_rms_norm_fwd", mutates_args=())
@launches_beside_first_argument
def add_rms_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of residual + x, residual + x), both fresh and contiguous; x and residual [..., D]."""
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows, others, D = dense_rows(x), dense_rows(residual), x.shape[-1]
    if x.numel() > 0:
        BD = padded(D)
        rms_norm_fwd_kernel[(rows.shape[0],)](
            rows, others, weight, total, y, rows.stride(0), others.stride(0), eps,
            D=D, BD=BD, HAS_RESIDUAL=True, num_warps=_warps(BD),
        )  # fmt: skip
    return y, total


@add_rms_norm_fwd.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::gated_rms_norm_fwd", mutates_args=())
@launches_beside_first_argument
def gated_rms_norm_fwd(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The gated norm of x [..., D] with a gate of the same shape and weight [D]; a fresh contiguous tensor."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, gates, D = dense_rows(x), dense_rows(gate), x.shape[-1]
    if x.numel() > 0:
        BD = padded(D)
        BM = max(1, 2048 // BD)
        gated_rms_norm_fwd_kernel[(triton.cdiv(rows.shape[0], BM),)](
            rows, gates, weight, y, rows.stride(0), gates.stride(0), eps, rows.shape[0],
            D=D, BD=BD, BM=BM, num_warps=4,
        )  # fmt: skip
    return y


@gated_rms_norm_fwd.register_fake
def _(x, gate, weight, eps):
    return x.new_empty(x.shape)


differentiate_norms(rms_norm_fwd, add_rms_norm_fwd, gated_rms_norm_fwd)


def _warps(elements: int) -> int:
    """Warps of a program: 32 elements a thread, which leaves room for many rows at once on a multiprocessor."""
    return min(8, max(1, elements // 1024))


__all__ = ["add_rms_norm_fwd", "gated_rms_norm_fwd", "rms_norm_fwd"]
