"""
MLA of a packed prompt in latent space (DeepSeek-V2's absorbed form, without RoPE): new rows into the cache, attention.

    row  = [RMSNorm(c), k_shared]                             of each token, at its position in the cache      [R + S]
    o_h  = softmax(scale q_h . rows)[:R]-average of rows      over the row's valid positions up to the token's own [R]

T tokens of N sequences lie end to end, as prompt/packed_kda.py says; `rows` [T] int32 is the cache's row of a token, -1
for padding, and `positions` [T] int32 its place in that row. `starts` [N] int32 is the first valid position of each
row: what is before it costs nothing. `table` [4] int64: address of the latent rows, elements between the cache's rows,
address of the mask or 0, bytes between its rows. The mask is bool, False at padding.

A program of the attention takes BT tokens of one sequence and all heads, found by the table of blocks that
kda/index.py makes with C = BT, and one of SPLITS shares of the positions; the shares are joined by their normalisers.
"""

import torch

from ..decode.configs import LatentConfig
from ..gpu.arithmetic import rounded_dot
from ..gpu.sizes import padded, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def packed_row_fwd_kernel(
    p, norm_weight, table, rows, positions, eps, stride_p,
    R: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One token a program. p [T, R + S] with dense rows, in the dtype of the cache."""
    i_t = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i_t).to(tl.int64)
    if row < 0:
        return
    o_r, o_s = tl.arange(0, BR), tl.arange(0, BS)
    cached = tl.load(table).to(tl.pointer_type(p.dtype.element_ty)) + row * tl.load(table + 1)
    cached += tl.load(positions + i_t).to(tl.int64) * (R + S)
    p += i_t * stride_p
    b_c = tl.load(p + o_r, mask=o_r < R, other=0.0).to(tl.float32)
    b_c *= tl.rsqrt(tl.sum(b_c * b_c, axis=0) / R + eps)
    b_norm = tl.load(norm_weight + o_r, mask=o_r < R, other=0.0).to(tl.float32)
    b_c = b_c.to(p.dtype.element_ty).to(tl.float32) * b_norm  # rounded before the weight, as released
    tl.store(cached + o_r, b_c.to(p.dtype.element_ty), mask=o_r < R)
    tl.store(cached + R + o_s, tl.load(p + R + o_s, mask=o_s < S, other=0.0), mask=o_s < S)


@triton.jit(do_not_specialize=["SPLITS"])
def packed_attend_fwd_kernel(
    q, table, positions, cu_seqlens, block_offsets, block_seq, starts, o, partial, partial_lse, scale, SPLITS,
    H: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BL: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """
    Program (share, block of BT tokens), online softmax. WHOLE (one share): o [T, H, R] in the model's dtype; else
    partial [T, SPLITS, H, R] fp32, normalised, and partial_lse [T, SPLITS, H] in log2, -inf where nothing is visible.
    """
    i_split, i_block = tl.program_id(0), tl.program_id(1)
    i_n = tl.load(block_seq + i_block)
    if i_n < 0:
        return
    begin, end = tl.load(cu_seqlens + i_n).to(tl.int32), tl.load(cu_seqlens + i_n + 1).to(tl.int32)
    first = begin + (i_block - tl.load(block_offsets + i_n)) * BT
    o_c = tl.arange(0, BT * BH)
    o_t, o_h = first + o_c // BH, o_c % BH
    m_c = (o_t < end) & (o_h < H)
    b_position = tl.load(positions + o_t, mask=o_t < end, other=-1)
    start, total = tl.load(starts + i_n), tl.load(positions + tl.minimum(first + BT, end) - 1) + 1
    share = ((total - start + SPLITS - 1) // SPLITS + BL - 1) // BL * BL
    l_begin = start + i_split * share
    l_end = tl.minimum(l_begin + share, total)
    i_row = i_n.to(tl.int64)
    cached = tl.multiple_of(tl.load(table).to(tl.pointer_type(q.dtype.element_ty)), 16)
    o_row = i_row * tl.load(table + 1)
    if (R + S) % 16 == 0:
        o_row = tl.multiple_of(o_row, 16)
    cached += o_row
    mask = (tl.load(table + 2) + i_row * tl.load(table + 3)).to(tl.pointer_type(tl.int8))
    o_r, o_s, o_l = tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BL)
    p_q = q + (o_t.to(tl.int64) * H + o_h)[:, None] * (R + S)
    b_q = tl.load(p_q + o_r[None, :], mask=m_c[:, None] & (o_r < R)[None, :], other=0.0)
    b_qs = tl.load(p_q + R + o_s[None, :], mask=m_c[:, None] & (o_s < S)[None, :], other=0.0)
    m_masked = o_l.to(tl.int64) * 0 + tl.load(table + 2) != 0  # a vector: see kda_tap
    b_m = tl.full([BT * BH], -1e30, tl.float32)
    b_l = tl.zeros([BT * BH], tl.float32)
    b_o = tl.zeros([BT * BH, BR], tl.float32)
    for i_l in tl.range(l_begin, l_end, BL, num_stages=STAGES):
        m_l = i_l + o_l < l_end
        p_rows = cached + tl.minimum(i_l + o_l, l_end - 1).to(tl.int64)[:, None] * (R + S)
        b_c = tl.load(p_rows + o_r[None, :], mask=(o_r < R)[None, :], other=0.0)
        b_cs = tl.load(p_rows + R + o_s[None, :], mask=(o_s < S)[None, :], other=0.0)
        b_a = rounded_dot(b_q, tl.trans(b_c), None, q.dtype.element_ty, "ieee", UPCAST)
        b_a = rounded_dot(b_qs, tl.trans(b_cs), b_a, q.dtype.element_ty, "ieee", UPCAST) * scale
        m_l = m_l & (tl.load(mask + i_l + o_l, mask=m_l & m_masked, other=1) != 0)
        b_a = tl.where(m_l[None, :] & (i_l + o_l[None, :] <= b_position[:, None]), b_a, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_a, axis=1))
        b_a = tl.exp2(b_a - b_m_new[:, None])
        b_scale = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_scale + tl.sum(b_a, axis=1)
        b_o = rounded_dot(b_a, b_c, b_o * b_scale[:, None], q.dtype.element_ty, "ieee", UPCAST)
        b_m = b_m_new
    b_o = b_o / tl.maximum(b_l, 1e-30)[:, None]
    m_o = m_c[:, None] & (o_r < R)[None, :]
    if WHOLE:
        tl.store(o + (o_t.to(tl.int64) * H + o_h)[:, None] * R + o_r[None, :], b_o.to(o.dtype.element_ty), mask=m_o)
    else:
        o_part = (o_t.to(tl.int64) * SPLITS + i_split) * H + o_h
        tl.store(partial + o_part[:, None] * R + o_r[None, :], b_o, mask=m_o)
        b_lse = tl.where(b_l > 0, b_m + tl.log2(tl.maximum(b_l, 1e-30)), float("-inf"))
        tl.store(partial_lse + o_part, b_lse, mask=m_c)


@triton.jit(do_not_specialize=["SPLITS"])
def packed_join_fwd_kernel(
    partial, partial_lse, rows, o, SPLITS,
    H: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (token, head, tile of R): join the shares into o [T, H, R]."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(rows + i_t) < 0:
        return
    o_r, o_p = tl.program_id(2) * BR + tl.arange(0, BR), tl.arange(0, BP)
    o_part = (i_t * SPLITS + o_p) * H + i_h
    b_lse = tl.load(partial_lse + o_part, mask=o_p < SPLITS, other=float("-inf"))
    b_share = tl.exp2(b_lse - tl.max(b_lse, axis=0))
    m_c = (b_share > 0)[:, None] & (o_r < R)[None, :]
    b_c = tl.load(partial + o_part[:, None] * R + o_r[None, :], mask=m_c, other=0.0)
    b_c = tl.sum(b_c * b_share[:, None], axis=0) / tl.sum(b_share, axis=0)
    tl.store(o + (i_t * H + i_h) * R + o_r, b_c.to(o.dtype.element_ty), mask=o_r < R)


def packed_row_fwd(
    p: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write the cache's rows of the tokens p [T, R + S], rows dense: kv_a_proj_with_mqa's outputs.

    Args:
        p: in the dtype of the cache.
        norm_weight, eps: of kv_a_layernorm, [R].
        table, rows, positions: see the module docstring.
    """
    R, (T, width) = norm_weight.shape[0], p.shape
    packed_row_fwd_kernel[(T,)](
        p, norm_weight, table, rows, positions, eps, p.stride(0),
        R=R, S=width - R, BR=padded(R), BS=padded(width - R), num_warps=4,
    )  # fmt: skip


def packed_attend_fwd(
    q: torch.Tensor,
    o: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    *,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    config: LatentConfig,
    upcast: bool,
) -> None:
    """Write o [T, H, R] contiguous, but for padding.

    Args:
        q: [T, H, R + S] contiguous, queries in latent space.
        partial, partial_lse: workspaces [T, SPLITS, H, R] and [T, SPLITS, H], fp32; not used where SPLITS is 1.
        table, rows, positions, starts: see the module docstring.
        index: (cu_seqlens, block_offsets, block_seq), of blocks of config.BT tokens (kda/index.py).
        scale: of the scores.
        config: for H heads over latents of R.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
    """
    (T, H, R), splits, S = o.shape, partial.shape[1], q.shape[2] - o.shape[2]
    packed_attend_fwd_kernel[(splits, index[2].shape[0])](
        q, table, positions, *index, starts, o, partial, partial_lse, scale * 1.4426950408889634, splits,
        H=H, R=R, S=S, BT=config.BT, BH=config.BH, BR=padded(R), BS=padded(S), BL=config.BL,
        STAGES=config.num_stages, WHOLE=splits == 1, UPCAST=upcast, num_warps=config.num_warps,
    )  # fmt: skip
    if splits > 1:
        packed_join_fwd_kernel[(T, H, triton.cdiv(R, 128))](
            partial,
            partial_lse,
            rows,
            o,
            splits,
            H=H,
            R=R,
            BP=power_of_two(splits),
            BR=min(128, padded(R)),
            num_warps=4,
        )


__all__ = ["packed_attend_fwd", "packed_row_fwd"]
