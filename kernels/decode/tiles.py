"""
Weights in the products of one token: where a launch reads them, whatever their format.

A tile is BN rows and BK columns of a weight [rows, COLUMNS]; a piece is eight columns of a row, which one thread holds,
because it holds those columns of x. Products are summed by piece, and scales are applied to these sums.

    y[n] = sum_p scale[n, p] sum_j q[n, 8 p + j] x[8 p + j]

| FORMAT | in memory | in registers |
|---|---|---|
| DENSE | numbers of x's dtype or a wider one | as they are, no scales |
| INT4 | words of eight 4-bit numbers, biased by 8, int32 [rows, COLUMNS / 8] | the words |
| FP8 | E4M3 [rows, COLUMNS] | E4M3 |
| FP8_BITS | the same as uint8, for GPUs without instructions for it | the bits |

Scales cover SCALE_ROWS rows and SCALE_COLUMNS columns, a multiple of eight; where they cover all columns (or more) they
are applied to the sum of a row.

4-bit numbers become fp32 without a conversion: nibble j of a word is shifted into the mantissa of 1.0, which gives
1 + q / 256 (even j) or 1 + q / 16 (odd j). x is multiplied by 256 or 16 beforehand, and what the ones add, with the
bias of eight, is taken off each piece's sum. That costs two instructions a number and half a shift.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton

DENSE, INT4, FP8, FP8_BITS = (tl.constexpr(i) for i in range(4))


@triton.jit
def decode_block(p_w, o_k, m_n, COLUMNS: tl.constexpr):
    """Columns `o_k` of the rows at `p_w`."""
    return tl.load(p_w + o_k[None, :], mask=m_n[:, None] & (o_k < COLUMNS)[None, :], other=0.0)


@triton.jit
def decode_products(b_w, b_x):
    """
    Weights [BN, BK] times BK columns of x, the products of each 16 bytes summed: [BN, BK / (8 or 4)].

    Those are one thread's: an eighth of the registers for sums leaves the others to weights on their way.
    """
    VECTOR: tl.constexpr = 128 // b_w.dtype.primitive_bitwidth
    b_p = tl.reshape(b_w.to(tl.float32) * b_x[None, :], [b_w.shape[0], b_w.shape[1] // VECTOR, VECTOR])
    return tl.sum(b_p, axis=2)


@triton.jit
def tile_pointer(p, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """
    Pointer `p` to a row of a weight, of which the compiler knows the alignment only up to a piece.

    Knowing more, it would give a thread more than the eight columns that it holds of x, and hand x around through
    shared memory. The third number of a program is always 0 here.
    """
    if FORMAT == DENSE:
        return p
    else:
        p += tl.program_id(2)
        return tl.multiple_of(p, 8) if FORMAT != INT4 and COLUMNS % 8 == 0 else p


@triton.jit
def tile_rows(p, o_n, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Pointers [BN, 1] to the first numbers of rows `o_n`, 64-bit."""
    return p + o_n.to(tl.int64)[:, None] * ((COLUMNS + 7) // 8 if FORMAT == INT4 else COLUMNS)


@triton.jit
def tile_numbers(p_row, i_k, m_n, COLUMNS: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr):
    """Columns from `i_k` on of the rows at `p_row` [BN, 1]: [BN, BK], or words [BN, BK / 8]."""
    if FORMAT == INT4:
        o_p = i_k // 8 + tl.arange(0, BK // 8)
        return tl.load(p_row + o_p[None, :], mask=m_n[:, None] & (o_p < (COLUMNS + 7) // 8)[None, :], other=0)
    elif FORMAT == FP8_BITS:
        o_k = i_k + tl.arange(0, BK)
        return tl.load(p_row + o_k[None, :], mask=m_n[:, None] & (o_k < COLUMNS)[None, :], other=0)
    else:
        return decode_block(p_row, i_k + tl.arange(0, BK), m_n, COLUMNS)


@triton.jit
def tile_scale_rows(p, o_n, COLUMNS: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr):
    """Pointers [BN, 1] to the first scales of rows `o_n`."""
    return p + (o_n // SCALE_ROWS)[:, None] * ((COLUMNS + SCALE_COLUMNS - 1) // SCALE_COLUMNS)


@triton.jit
def tile_scales(
    p_row, i_k, m_n, COLUMNS: tl.constexpr, BK: tl.constexpr, SCALE_COLUMNS: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Scales [BN, BK / 8] of the pieces from column `i_k` on, fp32; 1 where a scale covers the whole row."""
    if FORMAT == DENSE or SCALE_COLUMNS >= COLUMNS:
        return 1.0
    else:
        o_p = i_k // 8 + tl.arange(0, BK // 8)
        mask = m_n[:, None] & (o_p * 8 < COLUMNS)[None, :]
        # They are not contiguous. Said all the same, it makes Triton 3.6 give neighbours in a row to neighbouring
        # threads, as with the numbers; each is a load of its own, as the alignment is unknown (see `tile_pointer`).
        o_s = tl.max_contiguous(o_p // (SCALE_COLUMNS // 8), BK // 8)
        b_s = tl.load(p_row + tl.program_id(2) + o_s[None, :], mask=mask, other=0.0).to(tl.float32)
        return b_s * 256 if FORMAT == FP8_BITS else b_s


@triton.jit
def row_scales(p_row, m_n, COLUMNS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Scales [BN] of whole rows, fp32; 1 where scales cover parts of a row."""
    if FORMAT == DENSE or SCALE_COLUMNS < COLUMNS:
        return tl.full([p_row.shape[0]], 1.0, tl.float32)
    else:
        b_s = tl.sum(tl.load(p_row, mask=m_n[:, None], other=0.0).to(tl.float32), axis=1)
        return b_s * 256 if FORMAT == FP8_BITS else b_s


@triton.jit
def tile_input(b_x, FORMAT: tl.constexpr):
    """x [BK] fp32 as `tile_sums` wants it."""
    if FORMAT == INT4:
        return int4_input(b_x)
    else:
        return b_x


@triton.jit
def tile_sums(b_w, b_s, b_x, FORMAT: tl.constexpr):
    """Numbers of `tile_numbers` times x of `tile_input`, summed by piece, times `tile_scales`: [BN, pieces]."""
    if FORMAT == DENSE:
        return decode_products(b_w, b_x)
    elif FORMAT == INT4:
        return int4_sums(b_w, b_x[0], b_x[1]) * b_s
    else:
        b_p = tl.reshape(fp8_numbers(b_w, FORMAT) * b_x[None, :], [b_w.shape[0], b_w.shape[1] // 8, 8])
        return tl.sum(b_p, axis=2) * b_s


@triton.jit
def fp8_numbers(b_w, FORMAT: tl.constexpr):
    """E4M3 as fp32; 2^-8 of it for FP8_BITS."""
    if FORMAT == FP8_BITS:
        # Sign and seven bits at the places of a half-precision number, whose bias is 15 in place of 7.
        b_w = ((b_w.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
    return b_w.to(tl.float32)


@triton.jit
def int4_input(b_x):
    """BP pieces of x [8 BP] as `int4_sums` wants them: eight [BP] multiplied, and [BP] what each sum starts at."""
    b_even, b_odd = tl.split(tl.reshape(b_x, [b_x.shape[0] // 8, 2, 2, 2]))
    b_04, b_26 = tl.split(b_even)
    b_15, b_37 = tl.split(b_odd)
    b_0, b_4 = tl.split(b_04)
    b_1, b_5 = tl.split(b_15)
    b_2, b_6 = tl.split(b_26)
    b_3, b_7 = tl.split(b_37)
    b_start = -264.0 * ((b_0 + b_2) + (b_4 + b_6)) - 24.0 * ((b_1 + b_3) + (b_5 + b_7))
    return (256 * b_0, 16 * b_1, 256 * b_2, 16 * b_3, 256 * b_4, 16 * b_5, 256 * b_6, 16 * b_7), b_start


@triton.jit
def int4_pair(b_shifted, b_even, b_odd, b_sum):
    """`b_sum` plus the products of the numbers at bits 15 and 19 of words [BN, BP]."""
    # A mask that the compiler can't know stays in a register: an instruction has room for one constant, and "and" with
    # "or" becomes one instruction.
    low = 0x00078000 + tl.program_id(2)
    b_sum += ((b_shifted & low) | 0x3F800000).to(tl.float32, bitcast=True) * b_even[None, :]
    return b_sum + ((b_shifted & (low << 4)) | 0x3F800000).to(tl.float32, bitcast=True) * b_odd[None, :]


@triton.jit
def int4_sums(b_word, b_x, b_start):
    """Sums of the pieces of words [BN, BP]; `b_x`, `b_start` from `int4_input`."""
    b_sum = tl.broadcast_to(b_start[None, :], b_word.shape)
    b_sum = int4_pair(b_word << 15, b_x[0], b_x[1], b_sum)
    b_sum = int4_pair(b_word << 7, b_x[2], b_x[3], b_sum)
    b_sum = int4_pair(b_word >> 1, b_x[4], b_x[5], b_sum)
    return int4_pair(b_word >> 9, b_x[6], b_x[7], b_sum)


@triton.jit
def tile_matrix(
    p_row, p_scale, i_k, m_n, COLUMNS: tl.constexpr, BK: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """
    Numbers [BN, BK] from column `i_k` on for a matrix product, in DTYPE.

    Scales of parts of a row are applied, and the result is rounded once; those of whole rows are left to the sums.
    """
    if FORMAT == DENSE:
        return tile_numbers(p_row, i_k, m_n, COLUMNS, BK, FORMAT).to(DTYPE)
    elif FORMAT == INT4:
        b_w = tile_numbers(p_row, i_k, m_n, COLUMNS, BK, FORMAT)
        b_s = piece_scales(p_scale, i_k, m_n, COLUMNS, BK, SCALE_COLUMNS)
        return int4_matrix(b_w, b_s, DTYPE)
    else:
        b_w = fp8_numbers(tile_numbers(p_row, i_k, m_n, COLUMNS, BK, FORMAT), FORMAT)
        if SCALE_COLUMNS < COLUMNS:
            b_s = piece_scales(p_scale, i_k, m_n, COLUMNS, BK, SCALE_COLUMNS)
            b_w = tl.reshape(tl.reshape(b_w, [b_w.shape[0], BK // 8, 8]) * b_s[:, :, None], [b_w.shape[0], BK])
            if FORMAT == FP8_BITS:
                b_w *= 256
        return b_w.to(DTYPE)


@triton.jit
def piece_scales(p_row, i_k, m_n, COLUMNS: tl.constexpr, BK: tl.constexpr, SCALE_COLUMNS: tl.constexpr):
    """Scales [BN, BK / 8] of pieces, fp32, each loaded once where they tile the block; 1 for those of whole rows."""
    if SCALE_COLUMNS >= COLUMNS:
        return tl.full([p_row.shape[0], BK // 8], 1.0, tl.float32)
    else:
        SPAN: tl.constexpr = SCALE_COLUMNS if BK % SCALE_COLUMNS == 0 else BK if SCALE_COLUMNS % BK == 0 else 8
        COUNT: tl.constexpr = BK // SPAN
        o_s = i_k // SCALE_COLUMNS + tl.arange(0, COUNT)
        if SPAN != SCALE_COLUMNS:
            o_s = (i_k + tl.arange(0, COUNT) * SPAN) // SCALE_COLUMNS
        m_s = (i_k + tl.arange(0, COUNT) * SPAN) < COLUMNS
        b_s = tl.load(p_row + o_s[None, :], mask=m_n[:, None] & m_s[None, :], other=0.0).to(tl.float32)
        b_s = tl.broadcast_to(b_s[:, :, None], [m_n.shape[0], COUNT, SPAN // 8])
        return tl.reshape(b_s, [m_n.shape[0], BK // 8])


@triton.jit
def int4_scaled_pair(b_shifted, b_s, DTYPE: tl.constexpr):
    """The numbers at bits 15 and 19 of words [BN, BP] times their scales, rounded once from fp32."""
    b_even = ((b_shifted & 0x00078000) | 0x3F800000).to(tl.float32, bitcast=True) * (256 * b_s) - 264 * b_s
    b_odd = ((b_shifted & 0x00780000) | 0x3F800000).to(tl.float32, bitcast=True) * (16 * b_s) - 24 * b_s
    return b_even.to(DTYPE), b_odd.to(DTYPE)


@triton.jit
def int4_matrix(b_word, b_s, DTYPE: tl.constexpr):
    """
    Words and scales [BN, BP] to numbers [BN, 8 BP]: exact before the rounding for scales of eight significant bits.

    Joined rather than spread over a new dimension, so that a thread keeps the eight numbers of its word together.
    """
    b_0, b_1 = int4_scaled_pair(b_word << 15, b_s, DTYPE)
    b_2, b_3 = int4_scaled_pair(b_word << 7, b_s, DTYPE)
    b_4, b_5 = int4_scaled_pair(b_word >> 1, b_s, DTYPE)
    b_6, b_7 = int4_scaled_pair(b_word >> 9, b_s, DTYPE)
    b_even = tl.join(tl.join(b_0, b_4), tl.join(b_2, b_6))
    b_odd = tl.join(tl.join(b_1, b_5), tl.join(b_3, b_7))
    return tl.reshape(tl.join(b_even, b_odd), [b_word.shape[0], b_word.shape[1] * 8])


__all__ = [
    "DENSE",
    "FP8",
    "FP8_BITS",
    "INT4",
    "decode_block",
    "decode_products",
    "row_scales",
    "tile_input",
    "tile_matrix",
    "tile_numbers",
    "tile_pointer",
    "tile_rows",
    "tile_scale_rows",
    "tile_scales",
    "tile_sums",
]
