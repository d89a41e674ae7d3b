"""
Keys of multi-head latent attention in one pass, for inference on GPUs: every head's own part beside the shared one.

    key[b, t, h] = (expanded[b, t, h, :K], shared[b, t])

expanded [B, T, H, K + V] contiguous is what the latent's up-projection gives, shared [B, T, S] has dense rows and any
other strides; key [B, T, H, K + S] is contiguous. Values are a view of `expanded` and need no pass.
"""

import torch

from ..gpu.direct_calls import called_directly
from ..gpu.launching import launches_beside_first_argument
from ..gpu.operator_names import operator_namespace
from ..gpu.sizes import padded, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

_NAMESPACE = operator_namespace("kimi", __name__)


@triton.jit(do_not_specialize=["T"])
def mla_keys_fwd_kernel(
    expanded, shared, key, T, stride_sb, stride_st,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One token a program, BH heads at a time."""
    i_n = tl.program_id(0).to(tl.int64)
    i_b, i_t = i_n // T, i_n % T
    o_n, o_s = tl.arange(0, BK), tl.arange(0, BS)
    m_n, m_s = o_n < K, o_s < S
    b_s = tl.load(shared + i_b * stride_sb + i_t * stride_st + o_s, mask=m_s, other=0.0)
    for i_h in tl.static_range(0, H, BH):
        o_h = i_h + tl.arange(0, BH)
        m_h = (o_h < H)[:, None]
        p_k = key + (i_n * H + o_h)[:, None] * (K + S)
        p_e = expanded + (i_n * H + o_h)[:, None] * (K + V) + o_n[None, :]
        tl.store(p_k + o_n[None, :], tl.load(p_e, mask=m_h & m_n[None, :], other=0.0), mask=m_h & m_n[None, :])
        b_rows = tl.broadcast_to(b_s[None, :], [BH, BS])
        tl.store(p_k + K + o_s[None, :], b_rows, mask=m_h & m_s[None, :])


@called_directly
@torch.library.custom_op(f"{_NAMESPACE}::mla_keys_fwd", mutates_args=())
@launches_beside_first_argument
def mla_keys_fwd(expanded: torch.Tensor, shared: torch.Tensor, nope: int) -> torch.Tensor:
    """Keys [B, T, H, nope + S] of expanded [B, T, H, nope + V] and shared [B, T, S] of the same dtype."""
    (B, T, H, width), S = expanded.shape, shared.shape[-1]
    expanded = expanded.contiguous()
    shared = shared if shared.stride(-1) == 1 else shared.contiguous()
    key = torch.empty(B, T, H, nope + S, dtype=expanded.dtype, device=expanded.device)
    if key.numel() > 0:
        BK, BS = padded(nope), padded(S)
        BH = min(power_of_two(H), max(1, 4096 // BK))
        mla_keys_fwd_kernel[(B * T,)](
            expanded, shared, key, T, *shared.stride()[:2],
            H=H, K=nope, V=width - nope, S=S, BH=BH, BK=BK, BS=BS, num_warps=4,
        )  # fmt: skip
    return key


@mla_keys_fwd.register_fake
def _(expanded, shared, nope):
    return expanded.new_empty(*expanded.shape[:3], nope + shared.shape[-1])


__all__ = ["mla_keys_fwd"]
