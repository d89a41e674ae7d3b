"""
Decode step of many tokens: matrix products by the library, which tiles over tokens and over rows of the weights.

    y_s += W_s x                                     projections that share an input, one product a weight
    q_h  = [W_k,h^T q_nope, q_shared]                queries to latent space, a product a head
    o_h  = W_v,h a_h                                 latent outputs to values, a product a head

An adapter of kv_b_proj adds scale B A to W_k and W_v, for any number of tokens by the library too.

The kernels of a few tokens (linear.py, latent.py) read the weights again for each block of tokens, which is bound by
the L2 from some hundred tokens on. N tokens, H heads, D and V widths of keys and values, R latent rank, S shared key.
"""

import torch

LowRank = tuple[torch.Tensor, torch.Tensor, float]


@torch.no_grad()
def library_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    y: torch.Tensor,
    *,
    add: bool = False,
    x_columns: tuple[int, ...] | None = None,
) -> None:
    """
    Write y [N, sum of M_s], or add to it.

    Args:
        x: [N, columns], rows dense, K of the columns are read.
        weights: [M_s, K] each, contiguous, in x's dtype.
        y: rows dense, in x's dtype.
        add: whether to add to what y holds; rounded once.
        x_columns: first column of x for each weight; 0 for all if None.
    """
    begin = 0
    for weight, first in zip(weights, x_columns or [0] * len(weights)):
        M, K = weight.shape
        part, inputs = y[:, begin : begin + M], x[:, first : first + K]
        if add:
            torch.addmm(part, inputs, weight.t(), out=part)
        else:
            torch.mm(inputs, weight.t(), out=part)
        begin += M


@torch.no_grad()
def library_absorb(p: torch.Tensor, kv_b: torch.Tensor, q: torch.Tensor, D: int) -> None:
    """Queries p [N, at least H (D + S)], rows dense, to q [N, H, R + S]; kv_b is [H (D + V), R]."""
    N, H, width = q.shape
    R = kv_b.shape[1]
    queries = p[:, : H * (D + width - R)].view(N, H, D + width - R)
    keys = kv_b.view(H, -1, R)[:, :D]
    torch.bmm(queries[:, :, :D].transpose(0, 1), keys, out=q[:, :, :R].transpose(0, 1))
    q[:, :, R:].copy_(queries[:, :, D:])


@torch.no_grad()
def library_values(latent: torch.Tensor, kv_b: torch.Tensor, o: torch.Tensor) -> None:
    """Latent outputs [N, H, R] to values o [N, H, V], both in kv_b's dtype; kv_b is [H (D + V), R]."""
    _, H, V = o.shape
    values = kv_b.view(H, -1, kv_b.shape[1])[:, -V:]
    torch.bmm(latent.transpose(0, 1), values.transpose(1, 2), out=o.transpose(0, 1))


@torch.no_grad()
def library_absorb_adapter(p: torch.Tensor, adapter: LowRank, q: torch.Tensor, D: int) -> None:
    """Add scale A^T B_k,h^T q_nope to q, for any number of tokens; shapes as for `library_absorb`.

    Args:
        p: the queries.
        adapter: of kv_b: A [r, R], B [H (D + V), r] and the scale, factors of one dtype.
        q: what `library_absorb` or its kernel wrote.
        D: see there.
    """
    down, up, scale = adapter
    (N, H, width), R = q.shape, down.shape[1]
    queries = p[:, : H * (D + width - R)].view(N, H, -1)[:, :, :D].to(up.dtype)
    low_rank = torch.bmm(queries.transpose(0, 1), up.view(H, -1, up.shape[1])[:, :D])  # [H, N, r]
    q[:, :, :R].add_((low_rank @ down).transpose(0, 1), alpha=scale)


@torch.no_grad()
def library_values_adapter(latent: torch.Tensor, adapter: LowRank, o: torch.Tensor) -> None:
    """Add scale B_v,h A a_h to o [N, H, V], for latent outputs a [N, H, R] of any dtype; adapter as above."""
    down, up, scale = adapter
    H, V = o.shape[1:]
    low_rank = (latent.to(down.dtype) @ down.t()).transpose(0, 1)  # [H, N, r]
    values = up.view(H, -1, up.shape[1])[:, -V:]
    o.add_(torch.bmm(low_rank, values.transpose(1, 2)).transpose(0, 1), alpha=scale)


__all__ = [
    "LowRank",
    "library_absorb",
    "library_absorb_adapter",
    "library_linear",
    "library_values",
    "library_values_adapter",
]
