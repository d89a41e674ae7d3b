"""
Kernels of packed prompts against float64, in Triton's interpreter: attention both ways, experts placed by counting.

fp32 sums of some hundred terms of eps 6e-8: 1e-5 of the norm.
"""

import pytest
import torch

pytest.importorskip("triton")

from kimi_linear.kernels.decode.configs import LatentConfig
from kimi_linear.kernels.kda.index import kda_index_fwd
from kimi_linear.kernels.prompt.packed_attention import (
    PackedAttentionConfig,
    packed_attention_fwd,
    packed_gather_fwd,
)
from kimi_linear.kernels.prompt.packed_experts import (
    packed_combine_fwd,
    packed_ends_fwd,
    packed_route_rank_fwd,
    packed_scatter_fwd,
)
from kimi_linear.kernels.prompt.packed_kda import packed_conv_fwd, packed_window_fwd
from kimi_linear.kernels.prompt.packed_latent import packed_attend_fwd, packed_row_fwd
from kimi_linear.modeling.prompt.packing import Packing

H, K, V, R, S = 3, 8, 6, 12, 4


def close(x, exact):
    return float((x.double() - exact).norm() / exact.norm()) < 1e-5


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layout(past, mask):
    """(packing, numbers by name) of a bool mask [B, past + T]."""
    packing = Packing.of(mask.shape[0], mask.shape[1] - past, past, mask)
    T, B, L = packing.tokens + 3, mask.shape[0] + 1, packing.keys  # room for padding tokens and another row
    sizes = [T, T, B + 1, B, B + 1, L, L]
    names = ("rows", "positions", "cu_seqlens", "starts", "key_offsets", "key_rows", "key_positions")
    return packing, dict(zip(names, packing.numbers(T, B, L)[: sum(sizes)].split(sizes)))


# Left padding and a hole in the cache, a row without new tokens, right padding, a whole row.
MASKS = torch.ones(4, 40)
MASKS[0, :7], MASKS[0, 12:15], MASKS[1, 10:], MASKS[2, 30:] = 0, 0, 0, 0
MASKS = MASKS.bool()


@pytest.mark.parametrize("splits", [None, 1, 3])
def test_attention(splits):
    """In latent space by one and by several shares of the positions; over expanded keys (None)."""
    past = 11
    packing, numbers = layout(past, MASKS)
    rows, T = torch.full((4, 50, R + S), torch.nan), len(numbers["rows"])
    rows[:, :past] = draw(4, past, R + S)
    p, weight, kv_b = draw(T, H * (K + S) + R + S), draw(R), draw(H * (K + V), R)
    table = torch.tensor([rows.data_ptr(), rows.stride(0), MASKS.data_ptr(), MASKS.stride(0)])
    packed_row_fwd(p[:, H * (K + S) :], weight, 1e-6, table, numbers["rows"], numbers["positions"])
    c = p[:, H * (K + S) :].double()
    norm = c[:, :R] * (c[:, :R].square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    new = torch.cat([norm, c[:, R:]], dim=1)
    for i in range(packing.tokens):
        assert close(rows[packing.rows[i], packing.positions[i]], new[i])
    assert rows.isnan().any(-1).sum() == 4 * (50 - past) - packing.tokens  # nothing else is written
    rows[:, :40][~MASKS] = 0  # as open_cache leaves padding; what is after a row's tokens stays NaN

    scale, queries = 0.3, p[:, : H * (K + S)].view(T, H, K + S)
    key_up, value_up = kv_b.view(H, K + V, R).double().split([K, V], dim=1)
    exact = torch.zeros(packing.tokens, H, V, dtype=torch.float64)
    for i in range(packing.tokens):
        row, end = int(packing.rows[i]), int(packing.positions[i]) + 1
        seen = rows[row, :end].double()[MASKS[row, :end]]
        keys = torch.cat([torch.einsum("hkr,lr->hlk", key_up, seen[:, :R]), seen[None, :, R:].expand(H, -1, -1)], -1)
        weights = (torch.einsum("hk,hlk->hl", queries[i].double(), keys) * scale).softmax(-1)
        exact[i] = torch.einsum("hl,hvr,lr->hv", weights, value_up, seen[:, :R])

    chunks = numbers["cu_seqlens"], T
    if splits is not None:
        config, o = LatentConfig(4, 4, 16, 4, 1), torch.full((T, H, R), torch.nan)
        q = torch.cat([torch.einsum("thk,hkr->thr", queries[..., :K], key_up.float()), queries[..., K:]], -1)
        partial, lse = torch.full((T, splits, H, R), torch.nan), torch.full((T, splits, H), torch.nan)
        packed_attend_fwd(
            q.contiguous(), o, partial, lse, table=table, rows=numbers["rows"], positions=numbers["positions"],
            starts=numbers["starts"], index=(numbers["cu_seqlens"], *kda_index_fwd(*chunks, 4)),
            scale=scale, config=config, upcast=False,
        )  # fmt: skip
        found = torch.einsum("thr,hvr->thv", o.double(), value_up)
    else:
        config, found = PackedAttentionConfig(16, 16, 4, 1), torch.full((T, H, V), torch.nan)
        keys = torch.full((packing.keys, R + S), torch.nan)
        packed_gather_fwd(table, numbers["key_rows"], numbers["key_positions"], keys)
        packed_attention_fwd(
            p, keys[:, :R] @ kv_b.t(), keys, found, table=table, positions=numbers["positions"],
            key_offsets=numbers["key_offsets"], starts=numbers["starts"],
            index=(numbers["cu_seqlens"], *kda_index_fwd(*chunks, 16)), latent=R, masked=True, scale=scale,
            config=config, upcast=False,
        )  # fmt: skip
    assert close(found[: packing.tokens], exact)


def test_whole_blocks_need_no_mask():
    """Without holes most blocks of keys skip the comparison; 40 tokens over 5, two rows."""
    packing, numbers = layout(5, torch.ones(2, 45).bool())
    T, rows, kv_b = len(numbers["rows"]), draw(2, 45, R + S), draw(H * (K + V), R)
    table, p = torch.tensor([rows.data_ptr(), rows.stride(0), 0, 0]), draw(T, H * (K + S))
    keys, o = torch.empty(packing.keys, R + S), torch.full((T, H, V), torch.nan)
    packed_gather_fwd(table, numbers["key_rows"], numbers["key_positions"], keys)
    assert torch.equal(keys, rows.flatten(0, 1))
    expanded = keys[:, :R] @ kv_b.t()
    packed_attention_fwd(
        p, expanded, keys, o, table=table, positions=numbers["positions"], key_offsets=numbers["key_offsets"],
        starts=numbers["starts"], index=(numbers["cu_seqlens"], *kda_index_fwd(numbers["cu_seqlens"], T, 16)),
        latent=R, masked=False, scale=0.3, config=PackedAttentionConfig(16, 16, 4, 1), upcast=False,
    )  # fmt: skip
    q = p[:80].double().view(2, 40, H, K + S).transpose(1, 2)
    key, value = expanded.double().view(2, 45, H, K + V).transpose(1, 2).split([K, V], dim=-1)
    key = torch.cat([key, rows[:, None, :, R:].double().expand(-1, H, -1, -1)], dim=-1)
    scores = (q @ key.transpose(2, 3) * 0.3).masked_fill(torch.ones(40, 45).bool().triu(6), float("-inf"))
    assert close(o[:80], (scores.softmax(-1) @ value).transpose(1, 2).flatten(0, 1))


def test_convolutions_and_windows():
    D, W = 20, 4
    packing, numbers = layout(3, torch.tensor([[0, 1, 1, 0, 0, 1, 1], [1] * 7, [1, 1, 1, 0, 0, 0, 0]]).bool())
    T = len(numbers["rows"])
    x, weights, window = draw(T, 3 * D + 5), [draw(D, 1, W) * (i + 1) for i in range(3)], draw(3, 3 * D, W - 1)
    before, y = window.clone(), torch.full((T, 3 * D), torch.nan)
    table = torch.tensor([0, window.data_ptr(), 0, 0])
    packed_conv_fwd(x, tuple(weights), table, numbers["rows"], numbers["cu_seqlens"], y)
    packed_window_fwd(x, table, numbers["cu_seqlens"], 3 * D, W)
    taps = torch.cat(weights)[:, 0].double()
    for row in range(3):
        begin, end = (int(n) for n in packing.cu_seqlens[row : row + 2])
        inputs = torch.cat([before[row].t(), x[begin:end, : 3 * D]]).double()  # [W - 1 + n, 3 D]
        for i in range(end - begin):
            exact = (inputs[i : i + W] * taps.t()).sum(0)
            assert close(y[begin + i], exact * exact.sigmoid())
        assert torch.equal(window[row], inputs[-(W - 1) :].t().float())
    assert y[packing.tokens :].isnan().all()


def test_experts_are_placed_by_counting():
    T, E, topk, D = 37, 7, 3, 20
    rows = torch.zeros(T, dtype=torch.int32)
    rows[[5, 36]] = -1
    real = rows >= 0
    x, logits, bias = draw(T, D), draw(T, E), draw(E) * 0.1
    chosen, ranks, positions = (torch.full((T, topk), -1, dtype=torch.int32) for _ in range(3))
    weights, counts = torch.full((T, topk), torch.nan), torch.zeros(E, dtype=torch.int32)
    rule = {"factor": 2.5, "biased": False, "renormalize": True}
    packed_route_rank_fwd(logits, bias, rows, chosen, weights, ranks, counts, **rule)
    scores = logits.double().sigmoid()
    wanted = (scores + bias.double()).topk(topk, dim=1).indices
    assert torch.equal(chosen[real].long(), wanted[real])
    assert torch.equal(counts, torch.bincount(wanted[real].flatten(), minlength=E).int())
    ends, placed = torch.empty(E, dtype=torch.int32), torch.full((T * topk, D), torch.nan)
    packed_ends_fwd(counts, ends)
    assert torch.equal(ends.long(), torch.bincount(wanted[real].flatten(), minlength=E).cumsum(0)) and not counts.any()
    packed_scatter_fwd(x, rows, chosen, ranks, ends, placed, positions)
    used = int(real.sum()) * topk
    assert positions[real].flatten().sort().values.tolist() == list(range(used)) and placed[used:].isnan().all()
    for expert in range(E):
        begin, end = int(ends[expert - 1]) if expert else 0, int(ends[expert])
        places = positions[real][wanted[real] == expert]
        assert bool(((places >= begin) & (places < end)).all())
    y = draw(T, D)
    before = y.clone()
    packed_combine_fwd(placed * 2, rows, positions, weights, y)
    factors = scores.gather(1, wanted)
    total = (factors / (factors.sum(1, keepdim=True) + 1e-20) * 2.5).sum(1, keepdim=True)
    assert close(y[real], (before + 2 * total * x)[real].double()) and torch.equal(y[~real], before[~real])
