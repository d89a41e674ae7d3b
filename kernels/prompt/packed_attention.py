"""
MLA of a packed prompt over expanded keys and values, for more tokens than attention in latent space pays for.

    key[m, h] = (expanded[m, h, :K], shared[m])      value[m, h] = expanded[m, h, K:]
    o[t, h]   = softmax(scale q[t, h] . key)-average of value, over the keys of t's row up to t's own position

T tokens of N rows lie end to end (prompt/packed_kda.py), and so do the L cached positions that they see: row n has keys
key_offsets[n] .. key_offsets[n + 1], from its first valid position `starts[n]` on. `key_rows` and `key_positions` [L]
int32 say which cached row each key is, -1 for none. `expanded` [L, H (K + V)] is what the latent's up-projection makes
of them.
A program takes BT tokens of one row and one head, found by the table of blocks that kda/index.py makes with C = BT.
"""

from typing import NamedTuple

import torch

from ..gpu.arithmetic import rounded_dot
from ..gpu.sizes import padded

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


class PackedAttentionConfig(NamedTuple):
    """BT: tokens of a program, BL: keys at a time, num_stages: such blocks in flight."""

    BT: int
    BL: int
    num_warps: int
    num_stages: int


def packed_attention_config(itemsize: int, gpu: str) -> PackedAttentionConfig:
    """For inputs of `itemsize` bytes an element."""
    if itemsize == 2 and gpu in ("sm_90", "sm_100"):
        return PackedAttentionConfig(128, 64, 8, 3)
    return PackedAttentionConfig(64, 32, 4, 2 if itemsize == 2 else 1)


@triton.jit(do_not_specialize=["L"])
def packed_gather_fwd_kernel(
    table, key_rows, key_positions, keys, L, WIDTH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr
):
    """BM keys a program: keys [L, WIDTH] contiguous from the cache; those of no row (`key_rows` < 0) stay unwritten."""
    o_m, o_w = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BW)
    b_row = tl.load(key_rows + o_m, mask=o_m < L, other=-1).to(tl.int64)
    m_m = b_row >= 0
    b_position = tl.load(key_positions + o_m, mask=m_m, other=0).to(tl.int64)
    cached = tl.load(table).to(tl.pointer_type(keys.dtype.element_ty))
    p_cached = cached + (b_row * tl.load(table + 1) + b_position * WIDTH)[:, None] + o_w[None, :]
    m_w = m_m[:, None] & (o_w < WIDTH)[None, :]
    tl.store(keys + o_m.to(tl.int64)[:, None] * WIDTH + o_w[None, :], tl.load(p_cached, mask=m_w, other=0.0), mask=m_w)


@triton.jit
def packed_attention_block(
    b_q, b_qs, b_o, b_m, b_l, p_k, p_s, p_v, i_l, o_visible, n_keys, mask, has_mask, scale,
    K: tl.constexpr, S: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    BL: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take keys i_l .. i_l + BL into (b_o, b_m, b_l); WHOLE: all of them exist and every token sees them."""
    o_l, o_k, o_s, o_v = i_l + tl.arange(0, BL), tl.arange(0, BK), tl.arange(0, BS), tl.arange(0, BV)
    o_row = o_l.to(tl.int64)
    m_l = o_l >= 0 if WHOLE else o_l < n_keys
    b_k = tl.load(p_k + o_row[:, None] * WIDTH + o_k[None, :], mask=m_l[:, None] & (o_k < K)[None, :], other=0.0)
    b_s = tl.load(p_s + o_row[:, None] * STRIDE + o_s[None, :], mask=m_l[:, None] & (o_s < S)[None, :], other=0.0)
    b_a = rounded_dot(b_q, tl.trans(b_k), None, b_q.dtype, "ieee", UPCAST)
    b_a = rounded_dot(b_qs, tl.trans(b_s), b_a, b_q.dtype, "ieee", UPCAST) * scale
    if not WHOLE:
        m_seen = m_l & (tl.load(mask + o_l, mask=m_l & (has_mask + o_l * 0 != 0), other=1) != 0)
        b_a = tl.where(m_seen[None, :] & (o_l[None, :] <= o_visible[:, None]), b_a, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_a, axis=1))
    b_a = tl.exp2(b_a - b_m_new[:, None])
    b_scale = tl.exp2(b_m - b_m_new)
    b_v = tl.load(p_v + o_row[:, None] * WIDTH + o_v[None, :], mask=m_l[:, None] & (o_v < V)[None, :], other=0.0)
    b_o = rounded_dot(b_a, b_v, b_o * b_scale[:, None], b_q.dtype, "ieee", UPCAST)
    return b_o, b_m_new, b_l * b_scale + tl.sum(b_a, axis=1)


@triton.jit(do_not_specialize=["NB"])
def packed_attention_fwd_kernel(
    q, expanded, keys, table, positions, key_offsets, starts, cu_seqlens, block_offsets, block_seq, o, scale, NB,
    stride_q,
    H: tl.constexpr, K: tl.constexpr, S: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """
    Program (block of BT tokens, the last first; head). q [T, at least H (K + S)] with dense rows, keys [L, R + S] and o
    [T, H, V] contiguous. MASKED: `table` has the address of a mask with holes.
    """
    i_block, i_h = NB - 1 - tl.program_id(0), tl.program_id(1)
    i_n = tl.load(block_seq + i_block)
    if i_n < 0:
        return
    begin, end = tl.load(cu_seqlens + i_n).to(tl.int32), tl.load(cu_seqlens + i_n + 1).to(tl.int32)
    first = begin + (i_block - tl.load(block_offsets + i_n)) * BT
    start, o_key = tl.load(starts + i_n), tl.load(key_offsets + i_n).to(tl.int64)
    o_t, o_k, o_s, o_v = first + tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BS), tl.arange(0, BV)
    m_t = o_t < end
    o_visible = tl.load(positions + o_t, mask=m_t, other=0) - start
    n_whole = (tl.load(positions + first) - start + 1) // BL * BL
    if MASKED:
        n_whole = n_whole * 0
    n_keys = tl.load(positions + tl.minimum(first + BT, end) - 1) - start + 1
    mask = (tl.load(table + 2) + i_n.to(tl.int64) * tl.load(table + 3)).to(tl.pointer_type(tl.int8)) + start
    has_mask = MASKED * 1
    p_q = q + o_t.to(tl.int64)[:, None] * stride_q + i_h * (K + S)
    b_q = tl.load(p_q + o_k[None, :], mask=m_t[:, None] & (o_k < K)[None, :], other=0.0)
    b_qs = tl.load(p_q + K + o_s[None, :], mask=m_t[:, None] & (o_s < S)[None, :], other=0.0)
    p_k = expanded + o_key * (H * (K + V)) + i_h * (K + V)
    p_v, p_s = p_k + K, keys + o_key * (R + S) + R
    b_m = tl.full([BT], -1e30, tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, BV], tl.float32)
    for i_l in tl.range(0, n_whole, BL, num_stages=STAGES):
        b_o, b_m, b_l = packed_attention_block(
            b_q, b_qs, b_o, b_m, b_l, p_k, p_s, p_v, i_l, o_visible, n_keys, mask, has_mask, scale,
            K, S, V, H * (K + V), R + S, BL, BK, BS, BV, True, UPCAST,
        )  # fmt: skip
    for i_l in tl.range(n_whole, n_keys, BL, num_stages=STAGES):
        b_o, b_m, b_l = packed_attention_block(
            b_q, b_qs, b_o, b_m, b_l, p_k, p_s, p_v, i_l, o_visible, n_keys, mask, has_mask, scale,
            K, S, V, H * (K + V), R + S, BL, BK, BS, BV, False, UPCAST,
        )  # fmt: skip
    b_o = b_o / tl.maximum(b_l, 1e-30)[:, None]
    p_o = o + (o_t.to(tl.int64) * H + i_h)[:, None] * V + o_v[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_t[:, None] & (o_v < V)[None, :])


def packed_gather_fwd(
    table: torch.Tensor, key_rows: torch.Tensor, key_positions: torch.Tensor, keys: torch.Tensor
) -> None:
    """Fill keys [L, R + S] contiguous from the cache; table [4] int64 as in prompt/packed_latent.py."""
    L, width = keys.shape
    packed_gather_fwd_kernel[(triton.cdiv(L, 4),)](
        table, key_rows, key_positions, keys, L, WIDTH=width, BW=padded(width), BM=4, num_warps=4
    )


def packed_attention_fwd(
    q: torch.Tensor,
    expanded: torch.Tensor,
    keys: torch.Tensor,
    o: torch.Tensor,
    *,
    table: torch.Tensor,
    positions: torch.Tensor,
    key_offsets: torch.Tensor,
    starts: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    latent: int,
    masked: bool,
    scale: float,
    config: PackedAttentionConfig,
    upcast: bool,
) -> None:
    """Write o [T, H, V] contiguous.

    Args:
        q: [T, at least H (K + S)], rows dense.
        expanded: [L, H (K + V)] contiguous.
        keys: [L, R + S] contiguous, of which the shared key is read.
        table, positions, key_offsets, starts: see the module docstring.
        index: (cu_seqlens, block_offsets, block_seq), of blocks of config.BT tokens.
        latent: R.
        masked: whether the mask has holes between a row's first and last valid position.
        scale: of the scores.
        config: launch configuration.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
    """
    (_, H, V), S, NB = o.shape, keys.shape[1] - latent, index[2].shape[0]
    K = expanded.shape[1] // H - V
    packed_attention_fwd_kernel[(NB, H)](
        q, expanded, keys, table, positions, key_offsets, starts, *index, o, scale * 1.4426950408889634, NB,
        q.stride(0),
        H=H, K=K, S=S, V=V, R=latent, BT=config.BT, BL=config.BL, BK=padded(K), BS=padded(S), BV=padded(V),
        MASKED=masked, STAGES=config.num_stages, UPCAST=upcast, num_warps=config.num_warps,
    )  # fmt: skip


__all__ = ["PackedAttentionConfig", "packed_attention_config", "packed_attention_fwd", "packed_gather_fwd"]
