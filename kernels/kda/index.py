"""
Where the chunks of packed sequences are, computed on the device (no length is ever read by the host).

Sequence n covers tokens cu_seqlens[n] .. cu_seqlens[n+1] and is cut into ceil(len / C) chunks of its own.

    chunk_offsets[n] = sum_{m<n} ceil(len_m / C)     int32 [N]
    chunk_seq[c]     = n of the c-th chunk of all, -1 after the last one     int32 [floor(T / C) + N]
"""

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@dataclass(frozen=True)
class Segment:
    """
    The chunks that one launch of a stage takes, and where their tiles are.

    Without `index` they are the NT chunks of every batch row that begin at token `t_begin`, row by row. With it they
    are chunks t_begin .. t_begin + NT of all packed sequences, counted together.

    Args:
        t_begin: first token of each row, or first chunk of a pack.
        NT: chunks of each row, or of the pack.
        first: the entry of the tiles where these chunks' begin.
        index: (cu_seqlens, chunk_offsets, chunk_seq) of a pack (see kda_index_fwd).
    """

    t_begin: int
    NT: int
    first: int = 0
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


@triton.jit
def kda_chunk_place(cu_seqlens, chunk_offsets, chunk_seq, i_c, T, NT, t_begin, C: tl.constexpr, PACKED: tl.constexpr):
    """Batch row, first token and number of tokens of chunk `i_c`; no tokens for the entries after the last chunk."""
    if PACKED:
        i_n = tl.load(chunk_seq + i_c)
        i_m = tl.maximum(i_n, 0)
        bos, eos = tl.load(cu_seqlens + i_m).to(tl.int64), tl.load(cu_seqlens + i_m + 1).to(tl.int64)
        t0 = bos + (i_c - tl.load(chunk_offsets + i_m)).to(tl.int64) * C
        i_b = t0 * 0
        n_t = tl.where(i_n < 0, 0, eos - t0).to(tl.int32)
    else:
        i_b = (i_c // NT).to(tl.int64)
        t0 = t_begin + (i_c % NT).to(tl.int64) * C
        n_t = (T - t0).to(tl.int32)
    return i_b, t0, n_t


@triton.jit(do_not_specialize=["N", "NC"])
def kda_index_fwd_kernel(cu_seqlens, chunk_offsets, chunk_seq, N, NC, C: tl.constexpr, BN: tl.constexpr):
    """Program n sums the chunks of the sequences before it and writes its own entries; the last also fills the rest."""
    i_n = tl.program_id(0)
    offset = i_n * 0
    for i_m in range(0, i_n, BN):
        o_m = i_m + tl.arange(0, BN)
        m_m = o_m < i_n
        b_bos = tl.load(cu_seqlens + o_m, mask=m_m, other=0)
        b_eos = tl.load(cu_seqlens + o_m + 1, mask=m_m, other=0)
        offset += tl.sum(((b_eos - b_bos + C - 1) // C).to(tl.int32))
    tl.store(chunk_offsets + i_n, offset)

    bos, eos = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
    end = offset + ((eos - bos + C - 1) // C).to(tl.int32)
    for i_c in range(offset, end, BN):
        o_c = i_c + tl.arange(0, BN)
        tl.store(chunk_seq + o_c, tl.zeros([BN], tl.int32) + i_n, mask=(o_c < end) & (o_c < NC))
    if i_n == N - 1:
        for i_c in range(end, NC, BN):
            o_c = i_c + tl.arange(0, BN)
            tl.store(chunk_seq + o_c, tl.full([BN], -1, tl.int32), mask=o_c < NC)


def kda_index_fwd(cu_seqlens: torch.Tensor, T: int, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (chunk_offsets [N], chunk_seq [floor(T / C) + N]), both int32, for `cu_seqlens` [N + 1]."""
    N = cu_seqlens.numel() - 1
    NC = T // C + N  # each sequence has at most one partial chunk
    chunk_offsets = torch.empty(N, dtype=torch.int32, device=cu_seqlens.device)
    chunk_seq = torch.empty(NC, dtype=torch.int32, device=cu_seqlens.device)
    if N > 0:
        kda_index_fwd_kernel[(N,)](cu_seqlens, chunk_offsets, chunk_seq, N, NC, C=C, BN=1024, num_warps=4)
    return chunk_offsets, chunk_seq
