"""
Decode step of MLA in latent space (DeepSeek-V2's absorbed form, without RoPE), four launches. Per token n of batch row
b at position t, head h, with W_k, W_v the key and value parts of kv_b_proj:

    row t of the cache = [RMSNorm(c), k_shared]                                             [R + S]
    q_h   = [W_k,h^T q_nope, q_shared]                                                      [R + S]
    a     = softmax(scale q_h . rows)  over the valid rows 0 .. t                           online, split over programs
    o_h   = W_v,h (a rows[:R])                                                              [V]

Every head reads the same rows once; nothing is expanded. Lengths and addresses are in device memory, so that one
captured graph serves every cache and every length:

    table [4] int64: address of the rows, elements from one sequence's to the next's, and of the mask or 0, bytes
    past [1] int64:  positions cached before this step

The mask is bool [B, >= past + T]. Token n is number n % T of its sequence n // T and sees positions up to
past + n % T.
"""

import torch

from ..gpu.launching import overlap_options
from ..gpu.sizes import padded
from .attend import decode_attend, decode_share
from .configs import SKINNY_TOKENS, LatentConfig
from .linear import decode_prefetch_vector
from .products import (
    LowRank,
    library_absorb,
    library_absorb_adapter,
    library_values,
    library_values_adapter,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def decode_absorb_kernel(
    p, kv_b, norm_weight, q, table, past, eps, stride_p,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, BRR: tl.constexpr, BS: tl.constexpr, ROW_ONLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Programs (token, head or H, tile of R): queries to latent space; head H stands for the cache's new row, which is all
    there is to do with ROW_ONLY, programs (token).
    """
    i_n, i_h, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if ROW_ONLY:
        i_h += H
    o_r, o_s, o_d = i_r * BR + tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BK)
    p_w = kv_b + (i_h * (K + V) + o_d[:, None]) * R + o_r[None, :]
    m_w = (o_d < K)[:, None] & (o_r < R)[None, :] & (i_h + o_d[:, None] * 0 < H)
    b_w = tl.load(p_w, mask=m_w, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if i_h == H:
            decode_prefetch_vector(norm_weight, R)
        tl.extra.cuda.gdc_wait()
    p += i_n * stride_p
    if i_h == H:
        if i_r == 0:
            o_row = tl.arange(0, BRR)
            rows = tl.load(table).to(tl.pointer_type(p.dtype.element_ty))
            rows += (i_n // T) * tl.load(table + 1) + (tl.load(past) + i_n % T) * (R + S)
            b_c = tl.load(p + H * (K + S) + o_row, mask=o_row < R, other=0.0).to(tl.float32)
            b_c *= tl.rsqrt(tl.sum(b_c * b_c, axis=0) / R + eps)
            b_norm = tl.load(norm_weight + o_row, mask=o_row < R, other=0.0).to(tl.float32)
            b_c = b_c.to(p.dtype.element_ty).to(tl.float32) * b_norm  # rounded before the weight, as released
            tl.store(rows + o_row, b_c.to(p.dtype.element_ty), mask=o_row < R)
            tl.store(rows + R + o_s, tl.load(p + H * (K + S) + R + o_s, mask=o_s < S, other=0.0), mask=o_s < S)
        return
    p += i_h * (K + S)
    q += (i_n * H + i_h) * (R + S)
    o_p = o_d[:, None] + o_r[None, :] * 0  # as wide as the weights, so that each thread loads what it multiplies
    b_p = tl.load(p + o_p, mask=o_p < K, other=0.0).to(tl.float32)
    b_q = tl.sum(b_w.to(tl.float32) * b_p, axis=0)
    tl.store(q + o_r, b_q.to(q.dtype.element_ty), mask=o_r < R)
    if i_r == 0:
        tl.store(q + R + o_s, tl.load(p + K + o_s, mask=o_s < S, other=0.0), mask=o_s < S)


@triton.jit
def decode_join_kernel(
    partial, partial_lse, past,
    T: tl.constexpr, H: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, head, tile of R): join the splits, into the first one's place."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_r, o_p = tl.program_id(2) * BR + tl.arange(0, BR), tl.arange(0, BP)
    total, share = decode_share(past, T, SPLITS, BL)
    m_p = o_p * share < total
    o_part = (i_n * SPLITS + o_p) * H + i_h
    b_lse = tl.load(partial_lse + o_part, mask=m_p, other=float("-inf"))
    b_share = tl.exp2(b_lse - tl.max(b_lse, axis=0))
    b_c = tl.load(partial + o_part[:, None] * R + o_r[None, :], mask=m_p[:, None] & (o_r < R)[None, :], other=0.0)
    b_c = tl.sum(b_c * b_share[:, None], axis=0) / tl.sum(b_share, axis=0)
    tl.store(partial + (i_n * SPLITS * H + i_h) * R + o_r, b_c, mask=o_r < R)


@triton.jit
def decode_value_kernel(
    partial, kv_b, o,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, head, tile of V): take the joined latent output to the head's values."""
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v, o_r = tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, BR)
    p_w = kv_b + (i_h * (K + V) + K + o_v[:, None]) * R + o_r[None, :]
    b_w = tl.load(p_w, mask=(o_v < V)[:, None] & (o_r < R)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b_c = tl.load(partial + (i_n * SPLITS * H + i_h) * R + o_r, mask=o_r < R, other=0.0)
    b_o = tl.sum(b_w.to(tl.float32) * b_c[None, :], axis=1)
    tl.store(o + (i_n * H + i_h) * V + o_v, b_o.to(o.dtype.element_ty), mask=o_v < V)


def decode_latent_attention(
    p: torch.Tensor,
    kv_b: torch.Tensor,
    o: torch.Tensor,
    *,
    norm_weight: torch.Tensor,
    norm_eps: float,
    table: torch.Tensor,
    past: torch.Tensor,
    q: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    tokens: int,
    shared: int,
    scale: float,
    config: LatentConfig,
    adapter: LowRank | None = None,
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Append the new rows to the cache and write o [M, H, V].

    Args:
        p: [M, H (K + S) + R + S], rows dense: q_proj's and kv_a_proj_with_mqa's outputs side by side.
        kv_b: [H (K + V), R] contiguous.
        o: [M, H, V] contiguous.
        norm_weight, norm_eps: of kv_a_layernorm.
        table, past: see the module docstring.
        q, partial, partial_lse: workspaces [M, H, R + S] in p's dtype, [M, SPLITS, H, R] and [M, SPLITS, H] fp32.
        tokens: T, tokens of each batch row; M is a multiple.
        shared: S, width of the shared key.
        scale: of the scores.
        config: for H heads over latents of R.
        adapter: of kv_b, see `library_absorb_adapter`; or None.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see decode_linear), and prefetch to the L2 (both from sm_90 on).
    """
    (M, H, V), R, splits = o.shape, partial.shape[3], partial.shape[1]
    K = kv_b.shape[0] // H - V
    BR, BS = padded(R), padded(shared)
    many = M > SKINNY_TOKENS
    decode_absorb_kernel[(M,) if many else (M, H + 1, triton.cdiv(R, 128))](
        p, kv_b, norm_weight, q, table, past, norm_eps, p.stride(0),
        T=tokens, H=H, K=K, V=V, R=R, S=shared, BK=padded(K), BR=min(128, BR), BRR=BR, BS=BS, ROW_ONLY=many, PDL=pdl,
        num_warps=4, **overlap_options(pdl),
    )  # fmt: skip
    if many:
        library_absorb(p, kv_b, q, K)
    if adapter is not None:
        library_absorb_adapter(p, adapter, q, K)
    decode_attend(
        q, table, past, partial, partial_lse, tokens=tokens, scale=scale, config=config, upcast=upcast, pdl=pdl
    )
    if splits > 1:  # one split is whole already
        decode_join_kernel[(M, H, triton.cdiv(R, 32))](
            partial, partial_lse, past,
            T=tokens, H=H, R=R, SPLITS=splits, BP=padded(splits), BR=32, BL=config.BL, PDL=pdl,
            num_warps=4, **overlap_options(pdl),
        )  # fmt: skip
    if many:
        latent = q[:, :, :R].copy_(partial[:, 0])  # the queries are done with; rounded, as the layers round it
        library_values(latent, kv_b, o)
    else:
        BV = min(32, padded(V))
        decode_value_kernel[(M, H, triton.cdiv(V, BV))](
            partial, kv_b, o,
            H=H, K=K, V=V, R=R, SPLITS=splits, BR=BR, BV=BV, PDL=pdl, num_warps=4, **overlap_options(pdl),
        )  # fmt: skip
    if adapter is not None:
        library_values_adapter(partial[:, 0], adapter, o)


__all__ = ["decode_absorb_kernel", "decode_join_kernel", "decode_latent_attention", "decode_value_kernel"]
