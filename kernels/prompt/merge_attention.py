"""
Joining attention over two sets of keys, in one pass and in place, for inference on GPUs.

With o_i the softmax average over set i and l_i the log of its sum of exponentials,

    l = log(exp(l_1) + exp(l_2)),    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

o_1 [B, T, H, V] fp32 and l_1 [B, H, T] fp32, contiguous, become o and l; o_2 [B, T, H, V] has dense rows and any other
strides, l_2 [B, H, T] is fp32. One of l_1 and l_2 must be finite.
"""

import torch

from ..gpu.direct_calls import called_directly
from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)


@triton.jit(do_not_specialize=["T"])
def merge_attention_fwd_kernel(
    o, lse, part, part_lse, T, stride_pb, stride_pt, stride_ph,
    H: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BT tokens of one head a program. The grid has one dimension: the others end at 65,535."""
    NT = (T + BT - 1) // BT
    i_t, i_bh = (tl.program_id(0) % NT).to(tl.int64), (tl.program_id(0) // NT).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_t, o_v = i_t * BT + tl.arange(0, BT), tl.arange(0, BV)
    m_t = o_t < T
    m_tv = m_t[:, None] & (o_v < V)[None, :]
    p_l = (i_b * H + i_h) * T + o_t
    b_l1 = tl.load(lse + p_l, mask=m_t, other=0.0)
    b_l2 = tl.load(part_lse + p_l, mask=m_t, other=0.0)
    b_max = tl.maximum(b_l1, b_l2)
    b_e1, b_e2 = tl.exp(b_l1 - b_max), tl.exp(b_l2 - b_max)
    b_sum = b_e1 + b_e2
    p_o = o + ((i_b * T + o_t) * H + i_h)[:, None] * V + o_v[None, :]
    p_p = part + i_b * stride_pb + o_t[:, None] * stride_pt + i_h * stride_ph + o_v[None, :]
    b_o = tl.load(p_o, mask=m_tv, other=0.0) * (b_e1 / b_sum)[:, None]
    b_o += tl.load(p_p, mask=m_tv, other=0.0).to(tl.float32) * (b_e2 / b_sum)[:, None]
    tl.store(p_o, b_o, mask=m_tv)
    tl.store(lse + p_l, b_max + tl.log(b_sum), mask=m_t)


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::merge_attention_fwd", mutates_args=("o", "lse"))
@launches_beside_first_argument
def merge_attention_fwd(o: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Join `part` into `o`; shapes and layouts as in the module docstring."""
    B, T, H, V = o.shape
    part = part if part.stride(-1) == 1 else part.contiguous()
    if o.numel() > 0:
        BV = padded(V)
        BT = max(1, 4096 // BV)
        merge_attention_fwd_kernel[(triton.cdiv(T, BT) * B * H,)](
            o, lse, part, part_lse.contiguous(), T, *part.stride()[:3], H=H, V=V, BT=BT, BV=BV, num_warps=4
        )


@merge_attention_fwd.register_fake
def _(o, lse, part, part_lse):
    return None


__all__ = ["merge_attention_fwd"]
