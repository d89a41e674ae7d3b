"""
Decode step of MLA: attention over the latent rows of a cache, split over programs (see decode/latent.py for the whole).

    a = softmax(scale q_h . rows)  over the valid rows of a split, online
    partial [M, SPLITS, H, R] fp32 = a rows[:R], partial_lse [M, SPLITS, H] the log2 of its weight beside other splits

A split is the same rows for all tokens of a step, whole blocks of them; splits without rows write nothing.
"""

import torch

from ..gpu.arithmetic import rounded_dot
from ..gpu.launching import overlap_options
from ..gpu.sizes import padded
from .configs import LatentConfig
from .linear import decode_prefetch

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def decode_share(past, SPLITS, T: tl.constexpr, BL: tl.constexpr):
    """(rows after this step, rows of a split: whole blocks, the same for all tokens)."""
    total = (tl.load(past) + T).to(tl.int32)
    return total, ((total + SPLITS - 1) // SPLITS + BL - 1) // BL * BL


@triton.jit
def decode_rows(table, i_b, element: tl.constexpr, WIDTH: tl.constexpr):
    """Address of sequence `i_b`'s rows, WIDTH wide, and of its mask."""
    rows = tl.multiple_of(
        tl.load(table).to(tl.pointer_type(element)), 16
    )  # the compiler can't know the alignment of an address that was loaded
    o_batch = i_b * tl.load(table + 1)
    if WIDTH % 16 == 0:
        o_batch = tl.multiple_of(o_batch, 16)
    mask = tl.load(table + 2) + i_b * tl.load(table + 3)
    return rows + o_batch, mask.to(tl.pointer_type(tl.int8))


@triton.jit
def decode_prefetch_rows(rows, begin, end, WIDTH: tl.constexpr, BL: tl.constexpr, LINES: tl.constexpr):
    """Ask the L2 for BL rows from `begin` on; what lies after row `end` is replaced by the last line before it."""
    BYTES: tl.constexpr = BL * WIDTH * (rows.dtype.element_ty.primitive_bitwidth // 8)
    first = (rows + begin.to(tl.int64) * WIDTH).to(tl.int64)
    last = (rows + end.to(tl.int64) * WIDTH).to(tl.int64) - 128
    b_address = tl.minimum(first + tl.minimum(tl.arange(0, LINES) * 128, BYTES - 128), last)
    decode_prefetch(tl.maximum(b_address, rows.to(tl.int64)))


@triton.jit(do_not_specialize=["SPLITS"])
def decode_attend_kernel(
    q, table, past, partial, partial_lse, scale, SPLITS,
    T: tl.constexpr, H: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BL: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Program (split, token): attention over its share of the rows. Scores and outputs are kept transposed, [rows, heads]
    and [R, heads], which lets the tensor cores take the rows as their long side. partial [M, SPLITS, H, R] fp32 is
    normalised, partial_lse [M, SPLITS, H] is in log2; splits without rows write nothing.
    """
    i_split, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b = i_n // T
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    total, share = decode_share(past, SPLITS, T, BL)
    begin, end = i_split * share, tl.minimum((i_split + 1) * share, total)
    rows, mask = decode_rows(table, i_b, q.dtype.element_ty, R + S)
    if PDL:
        if begin < end:
            decode_prefetch_rows(rows, begin, end, R + S, BL, LINES)
        tl.extra.cuda.gdc_wait()
    if begin >= end:
        return
    visible = total - T + (i_n % T).to(tl.int32) + 1
    o_h, o_r, o_s, o_l = tl.arange(0, BH), tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BL)
    p_q = q + i_n * (H * (R + S)) + o_h[None, :] * (R + S)
    m_h = o_h < H
    b_q = tl.load(p_q + o_r[:, None], mask=(o_r < R)[:, None] & m_h[None, :], other=0.0)
    b_qs = tl.load(p_q + R + o_s[:, None], mask=(o_s < S)[:, None] & m_h[None, :], other=0.0)
    m_masked = o_l.to(tl.int64) * 0 + tl.load(table + 2) != 0  # a vector: see kda_tap
    b_m = tl.full([BH], -1e30, tl.float32)
    b_l = tl.zeros([BH], tl.float32)
    b_o = tl.zeros([BR, BH], tl.float32)
    for i_l in tl.range(begin, end, BL, num_stages=STAGES):
        if PDL:
            # Triton loads a block when the one before it is done: from the L2 that is a third of the memory's latency.
            decode_prefetch_rows(rows, i_l + BL, end, R + S, BL, LINES)
        m_l = i_l + o_l < end
        p_rows = rows + tl.minimum(i_l + o_l, end - 1).to(tl.int64)[:, None] * (R + S)
        b_c = tl.load(p_rows + o_r[None, :], mask=(o_r < R)[None, :], other=0.0)
        b_cs = tl.load(p_rows + R + o_s[None, :], mask=(o_s < S)[None, :], other=0.0)
        b_a = rounded_dot(b_c, b_q, None, q.dtype.element_ty, "ieee", UPCAST)
        b_a = rounded_dot(b_cs, b_qs, b_a, q.dtype.element_ty, "ieee", UPCAST) * scale
        m_l = (i_l + o_l < visible) & (tl.load(mask + i_l + o_l, mask=m_l & m_masked, other=1) != 0)
        b_a = tl.where(m_l[:, None], b_a, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_a, axis=0))
        b_a = tl.exp2(b_a - b_m_new[None, :])
        b_scale = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_scale + tl.sum(b_a, axis=0)
        b_o = rounded_dot(tl.trans(b_c), b_a, b_o * b_scale[None, :], q.dtype.element_ty, "ieee", UPCAST)
        b_m = b_m_new
    i_part = i_n * SPLITS + i_split
    b_o = b_o / tl.maximum(b_l, 1e-30)[None, :]
    p_o = partial + i_part * (H * R) + o_h[None, :] * R + o_r[:, None]
    tl.store(p_o, b_o, mask=(o_r < R)[:, None] & m_h[None, :])
    # A share whose rows are all masked has l = 0; its weight is 0 beside any other.
    tl.store(partial_lse + i_part * H + o_h, b_m + tl.log2(tl.maximum(b_l, 1e-30)), mask=m_h)


@triton.jit(do_not_specialize=["SPLITS"])
def decode_attend_tokens_kernel(
    q, table, past, partial, partial_lse, scale, SPLITS,
    T: tl.constexpr, H: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BL: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Program (BT tokens of one sequence, split): the same for several tokens, which share the rows. The queries of all
    heads of BT tokens are the tensor cores' long side here. Programs of one split run side by side, so that the L2
    gives the rows to all but one of them.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GROUPS: tl.constexpr = (T + BT - 1) // BT
    i_split, i_b = tl.program_id(1), (tl.program_id(0) // GROUPS).to(tl.int64)
    o_c = tl.arange(0, BT * BH)
    o_t, o_h = tl.program_id(0) % GROUPS * BT + o_c // BH, o_c % BH
    m_c = (o_t < T) & (o_h < H)
    total, share = decode_share(past, SPLITS, T, BL)
    begin, end = i_split * share, tl.minimum((i_split + 1) * share, total)
    rows, mask = decode_rows(table, i_b, q.dtype.element_ty, R + S)
    if PDL:
        if begin < end:
            decode_prefetch_rows(rows, begin, end, R + S, BL, LINES)
        tl.extra.cuda.gdc_wait()
    if begin >= end:
        return
    o_visible = total - T + o_t + 1
    o_r, o_s, o_l = tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BL)
    o_n = i_b * T + o_t
    p_q = q + (o_n * H + o_h)[:, None] * (R + S)
    b_q = tl.load(p_q + o_r[None, :], mask=m_c[:, None] & (o_r < R)[None, :], other=0.0)
    b_qs = tl.load(p_q + R + o_s[None, :], mask=m_c[:, None] & (o_s < S)[None, :], other=0.0)
    m_masked = o_l.to(tl.int64) * 0 + tl.load(table + 2) != 0
    b_m = tl.full([BT * BH], -1e30, tl.float32)
    b_l = tl.zeros([BT * BH], tl.float32)
    b_o = tl.zeros([BT * BH, BR], tl.float32)
    for i_l in tl.range(begin, end, BL, num_stages=STAGES):
        if PDL:
            decode_prefetch_rows(rows, i_l + BL, end, R + S, BL, LINES)
        m_l = i_l + o_l < end
        p_rows = rows + tl.minimum(i_l + o_l, end - 1).to(tl.int64)[:, None] * (R + S)
        b_c = tl.load(p_rows + o_r[None, :], mask=(o_r < R)[None, :], other=0.0)
        b_cs = tl.load(p_rows + R + o_s[None, :], mask=(o_s < S)[None, :], other=0.0)
        b_a = rounded_dot(b_q, tl.trans(b_c), None, q.dtype.element_ty, "ieee", UPCAST)
        b_a = rounded_dot(b_qs, tl.trans(b_cs), b_a, q.dtype.element_ty, "ieee", UPCAST) * scale
        m_l = m_l & (tl.load(mask + i_l + o_l, mask=m_l & m_masked, other=1) != 0)
        b_a = tl.where(m_l[None, :] & (i_l + o_l[None, :] < o_visible[:, None]), b_a, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_a, axis=1))
        b_a = tl.exp2(b_a - b_m_new[:, None])
        b_scale = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_scale + tl.sum(b_a, axis=1)
        b_o = rounded_dot(b_a, b_c, b_o * b_scale[:, None], q.dtype.element_ty, "ieee", UPCAST)
        b_m = b_m_new
    o_part = (o_n * SPLITS + i_split) * H + o_h
    b_o = b_o / tl.maximum(b_l, 1e-30)[:, None]
    tl.store(partial + o_part[:, None] * R + o_r[None, :], b_o, mask=m_c[:, None] & (o_r < R)[None, :])
    tl.store(partial_lse + o_part, b_m + tl.log2(tl.maximum(b_l, 1e-30)), mask=m_c)


def decode_attend(
    q: torch.Tensor,
    table: torch.Tensor,
    past: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    *,
    tokens: int,
    scale: float,
    config: LatentConfig,
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Fill partial and partial_lse.

    Args:
        q: [M, H, R + S], queries in latent space.
        table, past: see decode/latent.py.
        partial, partial_lse: [M, SPLITS, H, R] and [M, SPLITS, H], fp32.
        tokens: T, tokens of each batch row; M is a multiple.
        scale: of the scores.
        config: for T tokens of H heads over latents of R.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see decode_linear), and prefetch to the L2 (both from sm_90 on).
    """
    (M, splits, H, R), S = partial.shape, q.shape[2] - partial.shape[3]
    common = {
        "T": tokens, "H": H, "R": R, "S": S,
        "BH": config.BH, "BR": padded(R), "BS": padded(S), "BL": config.BL, "STAGES": config.num_stages,
        "UPCAST": upcast, "LINES": padded(config.BL * (R + S) * q.element_size() // 128), "PDL": pdl,
        "num_warps": config.num_warps, **overlap_options(pdl),
    }  # fmt: skip
    arguments = q, table, past, partial, partial_lse, scale * 1.4426950408889634, splits
    if config.BT == 1:
        decode_attend_kernel[(splits, M)](*arguments, **common)
        return
    groups = M // tokens * triton.cdiv(tokens, config.BT)
    decode_attend_tokens_kernel[(groups, splits)](*arguments, BT=config.BT, **common)


__all__ = ["decode_attend", "decode_attend_kernel", "decode_attend_tokens_kernel", "decode_share"]
