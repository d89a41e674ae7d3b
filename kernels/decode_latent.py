"""
Decode step of MLA in latent space (DeepSeek-V2's absorbed form, without RoPE), three launches. Per token n of batch row
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

from .decode_configs import LatentConfig, overlap_options
from .kda_triton_configs import padded
from .kda_triton_math import kda_dot

try:
    import triton
    import triton.language as tl
except ImportError:
    from .kda_triton_absent import tl, triton


@triton.jit
def decode_absorb_kernel(
    p, kv_b, norm_weight, q, table, past, eps, stride_p,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BRR: tl.constexpr, BS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (token, head or H, tile of R): queries to latent space; head H stands for the cache's new row."""
    i_n, i_h, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_r, o_s, o_d = i_r * BR + tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BD)
    p_w = kv_b + (i_h * (D + V) + o_d[:, None]) * R + o_r[None, :]
    m_w = (o_d < D)[:, None] & (o_r < R)[None, :] & (i_h + o_d[:, None] * 0 < H)
    b_w = tl.load(p_w, mask=m_w, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    p += i_n * stride_p
    if i_h == H:
        if i_r == 0:
            o_row = tl.arange(0, BRR)
            rows = tl.load(table).to(tl.pointer_type(p.dtype.element_ty))
            rows += (i_n // T) * tl.load(table + 1) + (tl.load(past) + i_n % T) * (R + S)
            b_c = tl.load(p + H * (D + S) + o_row, mask=o_row < R, other=0.0).to(tl.float32)
            b_c *= tl.rsqrt(tl.sum(b_c * b_c, axis=0) / R + eps)
            b_norm = tl.load(norm_weight + o_row, mask=o_row < R, other=0.0).to(tl.float32)
            b_c = b_c.to(p.dtype.element_ty).to(tl.float32) * b_norm  # rounded before the weight, as released
            tl.store(rows + o_row, b_c.to(p.dtype.element_ty), mask=o_row < R)
            tl.store(rows + R + o_s, tl.load(p + H * (D + S) + R + o_s, mask=o_s < S, other=0.0), mask=o_s < S)
        return
    p += i_h * (D + S)
    q += (i_n * H + i_h) * (R + S)
    o_p = o_d[:, None] + o_r[None, :] * 0  # as wide as the weights, so that each thread loads what it multiplies
    b_p = tl.load(p + o_p, mask=o_p < D, other=0.0).to(tl.float32)
    b_q = tl.sum(b_w.to(tl.float32) * b_p, axis=0)
    tl.store(q + o_r, b_q.to(q.dtype.element_ty), mask=o_r < R)
    if i_r == 0:
        tl.store(q + R + o_s, tl.load(p + D + o_s, mask=o_s < S, other=0.0), mask=o_s < S)


@triton.jit
def decode_prefetch(first, last, BYTES: tl.constexpr, LINES: tl.constexpr):
    """Ask the L2 for the BYTES from address `first` on; addresses behind `last` are replaced by it."""
    o_line = tl.arange(0, LINES) * 128
    b_address = tl.minimum(first + tl.minimum(o_line, BYTES - 128), last)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [b_address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def decode_attend_kernel(
    q, table, past, partial, partial_lse, scale,
    T: tl.constexpr, H: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BL: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr, PREFETCH: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Program (split, token): attention over its share of the rows. Scores and outputs are kept transposed, [rows, heads]
    and [R, heads], which lets the tensor cores take the rows as their long side. partial [N, SPLITS, H, R] fp32 is
    normalised, partial_lse [N, SPLITS, H] is in log2; splits without rows write nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_split, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = (tl.load(past) + i_n % T + 1).to(tl.int32)
    share = ((length + SPLITS - 1) // SPLITS + BL - 1) // BL * BL
    begin, end = i_split * share, tl.minimum((i_split + 1) * share, length)
    if begin >= end:
        return
    i_b = i_n // T
    rows = tl.multiple_of(tl.load(table).to(tl.pointer_type(q.dtype.element_ty)), 16)
    o_batch = i_b * tl.load(table + 1)
    if (R + S) % 16 == 0:
        o_batch = tl.multiple_of(o_batch, 16)
    rows += o_batch
    p_mask = tl.load(table + 2)
    mask = (p_mask + i_b * tl.load(table + 3)).to(tl.pointer_type(tl.int8))
    o_h, o_r, o_s, o_l = tl.arange(0, BH), tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BL)
    p_q = q + i_n * (H * (R + S)) + o_h[None, :] * (R + S)
    m_h = o_h < H
    b_q = tl.load(p_q + o_r[:, None], mask=(o_r < R)[:, None] & m_h[None, :], other=0.0)
    b_qs = tl.load(p_q + R + o_s[:, None], mask=(o_s < S)[:, None] & m_h[None, :], other=0.0)
    m_masked = o_l.to(tl.int64) * 0 + p_mask != 0  # a vector: the interpreter's "and" of a mask and a scalar is no mask
    b_m = tl.full([BH], -1e30, tl.float32)
    b_l = tl.zeros([BH], tl.float32)
    b_o = tl.zeros([BR, BH], tl.float32)
    BYTES: tl.constexpr = BL * (R + S) * (q.dtype.element_ty.primitive_bitwidth // 8)
    first_byte = rows.to(tl.int64)
    last_byte = tl.maximum((rows + end.to(tl.int64) * (R + S)).to(tl.int64) - 128, first_byte)
    for i_l in tl.range(begin, end, BL, num_stages=STAGES):
        if PREFETCH > 0:
            # Shared memory holds two blocks, too few bytes in flight for the memory's latency: the L2 takes more.
            ahead = first_byte + (i_l // BL + PREFETCH).to(tl.int64) * BYTES
            decode_prefetch(ahead, last_byte, BYTES, LINES)
        m_l = i_l + o_l < end
        p_rows = rows + (i_l + o_l).to(tl.int64)[:, None] * (R + S)
        b_c = tl.load(p_rows + o_r[None, :], mask=m_l[:, None] & (o_r < R)[None, :], other=0.0)
        b_cs = tl.load(p_rows + R + o_s[None, :], mask=m_l[:, None] & (o_s < S)[None, :], other=0.0)
        b_a = kda_dot(b_c, b_q, None, q.dtype.element_ty, "ieee", UPCAST)
        b_a = kda_dot(b_cs, b_qs, b_a, q.dtype.element_ty, "ieee", UPCAST) * scale
        m_l = m_l & (tl.load(mask + i_l + o_l, mask=m_l & m_masked, other=1) != 0)
        b_a = tl.where(m_l[:, None], b_a, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_a, axis=0))
        b_a = tl.exp2(b_a - b_m_new[None, :])
        b_scale = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_scale + tl.sum(b_a, axis=0)
        b_o = kda_dot(tl.trans(b_c), b_a, b_o * b_scale[None, :], q.dtype.element_ty, "ieee", UPCAST)
        b_m = b_m_new
    i_part = i_n * SPLITS + i_split
    b_o = b_o / tl.maximum(b_l, 1e-30)[None, :]
    p_o = partial + i_part * (H * R) + o_h[None, :] * R + o_r[:, None]
    tl.store(p_o, b_o, mask=(o_r < R)[:, None] & m_h[None, :])
    # A share whose rows are all masked has l = 0; its weight is 0 beside any other.
    tl.store(partial_lse + i_part * H + o_h, b_m + tl.log2(tl.maximum(b_l, 1e-30)), mask=m_h)


@triton.jit
def decode_value_kernel(
    partial, partial_lse, kv_b, past, o,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr, BL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, head, tile of V): join the splits and take the latent output to the head's values."""
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    o_r, o_p = tl.arange(0, BR), tl.arange(0, BP)
    p_w = kv_b + (i_h * (D + V) + D + o_v[:, None]) * R + o_r[None, :]
    b_w = tl.load(p_w, mask=(o_v < V)[:, None] & (o_r < R)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = (tl.load(past) + i_n % T + 1).to(tl.int32)
    share = ((length + SPLITS - 1) // SPLITS + BL - 1) // BL * BL
    used = (length + share - 1) // share
    p_lse = partial_lse + i_n * (SPLITS * H) + i_h
    b_m = tl.max(tl.load(p_lse + o_p * H, mask=o_p < used, other=float("-inf")), axis=0)
    b_c = tl.zeros([BX, BR], tl.float32)
    b_l = tl.zeros([BX], tl.float32)
    for i_s in range(0, used, BX):
        o_s = i_s + tl.arange(0, BX)
        m_s = o_s < used
        b_share = tl.exp2(tl.load(p_lse + o_s * H, mask=m_s, other=float("-inf")) - b_m)
        p_c = partial + ((i_n * SPLITS + o_s[:, None]) * H + i_h) * R + o_r[None, :]
        b_c += b_share[:, None] * tl.load(p_c, mask=m_s[:, None] & (o_r < R)[None, :], other=0.0)
        b_l += b_share
    b_latent = tl.sum(b_c, axis=0) / tl.sum(b_l, axis=0)
    b_o = tl.sum(b_w.to(tl.float32) * b_latent[None, :], axis=1)
    tl.store(o + (i_n * H + i_h) * V + o_v, b_o.to(o.dtype.element_ty), mask=o_v < V)


def decode_latent_attention(
    p: torch.Tensor,
    kv_b: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    table: torch.Tensor,
    past: torch.Tensor,
    q: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    o: torch.Tensor,
    tokens: int,
    shared: int,
    scale: float,
    config: LatentConfig,
    upcast: bool = False,
    pdl: bool = False,
) -> None:
    """
    Append the new rows to the cache and write o [N, H, V].

    Args:
        p: [N, H (D + S) + R + S], rows dense: q_proj's and kv_a_proj_with_mqa's outputs side by side.
        kv_b: [H (D + V), R] contiguous.
        norm_weight, norm_eps: of kv_a_layernorm.
        table, past: see the module docstring.
        q, partial, partial_lse: workspaces [N, H, R + S] in p's dtype, [N, SPLITS, H, R] and [N, SPLITS, H] fp32.
        o: [N, H, V] contiguous.
        tokens: T, tokens of each batch row; N is a multiple.
        shared: S, width of the shared key.
        scale: of the scores.
        config: for H heads over latents of R.
        upcast: multiply bf16 as fp32 (for Triton's interpreter).
        pdl: launch programmatically dependent (see decode_linear), and prefetch to the L2 (both from sm_90 on).
    """
    (N, H, V), R, splits = o.shape, partial.shape[3], partial.shape[1]
    D = kv_b.shape[0] // H - V
    BR, BS = padded(R), padded(shared)
    decode_absorb_kernel[(N, H + 1, triton.cdiv(R, 128))](
        p, kv_b, norm_weight, q, table, past, norm_eps, p.stride(0),
        T=tokens, H=H, D=D, V=V, R=R, S=shared, BD=padded(D), BR=min(128, BR), BRR=BR, BS=BS, PDL=pdl,
        num_warps=4, **overlap_options(pdl),
    )  # fmt: skip
    decode_attend_kernel[(splits, N)](
        q, table, past, partial, partial_lse, scale * 1.4426950408889634,
        T=tokens, H=H, R=R, S=shared, SPLITS=splits, BH=config.BH, BR=BR, BS=BS, BL=config.BL,
        STAGES=config.num_stages, UPCAST=upcast, PDL=pdl,
        PREFETCH=1 if pdl else 0, LINES=padded(config.BL * (R + shared) * q.element_size() // 128),
        num_warps=config.num_warps, **overlap_options(pdl),
    )  # fmt: skip
    BV = min(32, padded(V))
    decode_value_kernel[(N, H, triton.cdiv(V, BV))](
        partial, partial_lse, kv_b, past, o,
        T=tokens, H=H, D=D, V=V, R=R, SPLITS=splits, BP=padded(splits), BR=BR, BV=BV, BX=16, BL=config.BL,
        PDL=pdl, num_warps=8, **overlap_options(pdl),
    )  # fmt: skip


__all__ = ["decode_absorb_kernel", "decode_attend_kernel", "decode_latent_attention", "decode_value_kernel"]
