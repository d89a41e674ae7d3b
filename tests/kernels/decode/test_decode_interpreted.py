"""
The kernels of the decode step against PyTorch in float64, in Triton's interpreter.

Bounds. fp32 sums of n terms err by some sqrt(n) eps. The interpreter truncates where it casts to bf16, a GPU rounds:
each rounding on the way counts as one eps of the dtype.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from kimi_linear.kernels.decode.configs import (
    GROUP,
    down_config,
    experts_config,
    gemv_config,
    grouped_configs,
    latent_config,
    skinny_config,
)
from kimi_linear.kernels.decode.experts import decode_expert_down, decode_expert_up
from kimi_linear.kernels.decode.grouped_experts import decode_grouped_experts
from kimi_linear.kernels.decode.latent import decode_latent_attention
from kimi_linear.kernels.decode.linear import decode_gate, decode_linear, decode_norm
from kimi_linear.kernels.decode.routing import decode_group, decode_route, most_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def bound(dtype, roundings):
    return 1e-6 if dtype == torch.float32 else roundings * torch.finfo(dtype).eps


def relative(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


def normed(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("columns", "sizes"), [(80, (40, 24, 6)), (64, (33,)), (300, (16, 1, 2, 5, 8, 64))])
def test_projections_that_share_an_input(dtype, tokens, columns, sizes, randn):
    x, weights = randn(tokens, columns + 10, dtype=dtype), [randn(rows, columns, dtype=dtype) for rows in sizes]
    residual, first = randn(tokens, sum(sizes), dtype=dtype), tuple(range(len(sizes)))
    y, norm = residual.clone(), {}  # in place, as the step does it
    if tokens == 1:
        config = gemv_config(columns, sum(sizes))
        norm = {"norm_weight": randn(columns, dtype=dtype), "eps": 1e-5}
    else:
        config = skinny_config(tokens, columns, sum(sizes), x.element_size())
    decode_linear(x, weights, y, config, residual=y, x_columns=first, upcast=True, **norm)
    parts = [x[:, i : i + columns].double() for i in first]
    if norm:
        parts = [normed(part, norm["norm_weight"], 1e-5) for part in parts]
    exact = torch.cat([part @ weight.double().T for part, weight in zip(parts, weights)], dim=1) + residual.double()
    assert relative(y, exact) < bound(dtype, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_projection_after_gate_and_up(dtype, tokens, randn):
    x, weight = randn(tokens, 160, dtype=dtype), randn(50, 80, dtype=dtype)
    y = torch.full((tokens, 50), NAN, dtype=dtype)
    gate, up = x.double().chunk(2, dim=1)
    if tokens == 1:
        decode_linear(x, [weight], y, gemv_config(80, 50), gated=True)
    else:
        decode_gate(x)
        assert torch.equal(x[:, 80:], up.to(dtype))
        decode_linear(x, [weight], y, skinny_config(tokens, 80, 50, x.element_size()), upcast=True)
    # Several tokens: the gated product is rounded in between.
    assert relative(y, (F.silu(gate) * up) @ weight.double().T) < bound(dtype, 1 if tokens == 1 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_before_products_of_several_tokens(dtype, randn):
    x, weight, y = randn(3, 40, dtype=dtype) * 3, randn(40, dtype=dtype), torch.full((3, 40), NAN, dtype=dtype)
    decode_norm(x, weight, 1e-5, y)
    assert relative(y, normed(x, weight, 1e-5)) < bound(dtype, 2)  # before the weight and after it


@pytest.mark.parametrize("front", [{"norm_weight": torch.ones(16)}, {"gated": True}])
def test_several_tokens_must_be_normed_and_gated_before(front):
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="norm or gate x beforehand"):
        decode_linear(x, [x], torch.zeros(2, 2), skinny_config(2, 16, 2, 4), **front)


def routed(logits, bias, topk, biased, renormalize, factor):
    scores = logits.double().sigmoid()
    shifted = scores + bias.double()
    chosen = shifted.topk(topk, dim=-1).indices
    weights = (shifted if biased else scores).gather(1, chosen)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * factor


def expert(x, gate_up, down):
    gate, up = (gate_up.double() @ x).chunk(2)
    return down.double() @ (F.silu(gate) * up)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_routing(biased, renormalize, randn):
    logits, bias = randn(7, 12) * 3, randn(12) * 0.5
    logits[0] = 0.25  # ties go to the lower expert
    chosen, weights = torch.full((7, 3), -7, dtype=torch.int32), torch.full((7, 3), NAN)
    rule = {"factor": 2.5, "biased": biased, "renormalize": renormalize}
    decode_route(logits, bias, chosen, weights, **rule)
    expected, expected_weights = routed(logits, bias, 3, **rule)
    assert torch.equal(chosen.long(), expected)
    assert relative(weights, expected_weights) < 1e-6
    tied = torch.full((1, 3), -7, dtype=torch.int32)
    decode_route(torch.zeros(1, 12), torch.zeros(12), tied, torch.empty(1, 3), **rule)
    assert tied.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("tokens", [2, 16, 33, 64])
def test_pairs_are_grouped_by_expert(tokens, randn):
    E, topk = 12, 3
    scores = randn(tokens, E)
    scores[:, 5] += 10  # one expert that every token takes, in more than one block
    chosen = scores.topk(topk).indices.int()
    blocks = most_blocks(tokens, topk, E, GROUP)
    pairs, experts = torch.full((blocks * GROUP,), -7, dtype=torch.int32), torch.full((blocks,), -7, dtype=torch.int32)
    n_blocks = torch.full((1,), -7, dtype=torch.int32)
    decode_group(chosen, pairs, experts, n_blocks, E)
    used = int(n_blocks)
    counts = torch.bincount(chosen.flatten().long(), minlength=E)
    assert used == int(-(-counts // GROUP).sum()) <= blocks
    for expert_of_block, block in zip(experts[:used].tolist(), pairs.view(blocks, GROUP)):
        held = block[block >= 0].tolist()
        assert held and all(chosen.flatten()[pair] == expert_of_block for pair in held)
    held = pairs[: used * GROUP]
    assert sorted(held[held >= 0].tolist()) == list(range(tokens * topk))


@pytest.mark.parametrize(
    ("shared", "dtype"),
    [*((shared, torch.float32) for shared in (0, 1, 2)), (1, torch.bfloat16), (2, torch.float16)],
)
def test_experts_of_one_token(shared, dtype, randn):
    E, H, I, topk = 12, 80, 24, 3
    x, norm = randn(H, dtype=dtype), randn(H, dtype=dtype)
    gate_up, down = randn(E, 2 * I, H, dtype=dtype), randn(E, H, I, dtype=dtype)
    logits, bias = randn(E), randn(E) * 0.3
    rows = [randn(shared * I, H, dtype=dtype) for _ in range(2)] if shared else None
    shared_down = randn(H, shared * I, dtype=dtype) if shared else None
    h, y = torch.full((topk + shared, I), NAN, dtype=dtype), x.clone()
    chosen, weights = torch.full((topk,), -7, dtype=torch.int32), torch.full((topk,), NAN)
    rule = {"factor": 2.446, "biased": False, "renormalize": True}
    decode_expert_up(
        x, logits, h, chosen, weights, norm_weight=norm, eps=1e-5, bias=bias, gate_up=gate_up,
        shared=rows and tuple(rows), config=experts_config(H), **rule,
    )  # fmt: skip
    decode_expert_down(h, chosen, weights, down, shared_down, y, down_config(I))
    expected, expected_weights = routed(logits[None], bias, topk, **rule)
    assert sorted(chosen.tolist()) == sorted(expected[0].tolist())
    inner, exact = normed(x, norm, 1e-5), x.double()
    for e, weight in zip(expected[0].tolist(), expected_weights[0]):
        exact = exact + weight * expert(inner, gate_up[e], down[e])
    if shared:
        exact = exact + expert(inner, torch.cat(rows), shared_down)
    assert relative(y, exact) < bound(dtype, 2)  # h and y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "shared"), [(2, 0), (2, 2), (20, 1), (20, 2)])
def test_experts_of_several_tokens(dtype, tokens, shared, randn):
    E, H, I, topk = 6, 48, 24, 3
    x, y = randn(tokens, H, dtype=dtype), randn(tokens, H, dtype=dtype)
    gate_up, down = randn(E, 2 * I, H, dtype=dtype), randn(E, H, I, dtype=dtype)
    rows = [randn(shared * I, H, dtype=dtype) for _ in range(2)]
    shared_down = randn(H, shared * I, dtype=dtype)
    chosen, weights = randn(tokens, E).topk(topk).indices.int(), randn(tokens, topk).abs()
    blocks = most_blocks(tokens, topk, E, GROUP)
    groups = [torch.full((n,), -7, dtype=torch.int32) for n in (blocks * GROUP, blocks, 1)]
    decode_group(chosen, *groups, E)
    h, z = (torch.full((tokens * (topk + shared), width), NAN, dtype=dtype) for width in (I, H))
    exact = y.double()
    for n in range(tokens):
        for e, weight in zip(chosen[n].tolist(), weights[n]):
            exact[n] += weight * expert(x[n].double(), gate_up[e], down[e])
        if shared:
            exact[n] += expert(x[n].double(), torch.cat(rows), shared_down)
    configs = grouped_configs(H, I, x.element_size())
    projections = (*rows, shared_down) if shared else None
    decode_grouped_experts(
        x, weights, y, groups=tuple(groups), gate_up=gate_up, down=down, shared=projections, h=h, z=z, configs=configs,
        upcast=True,
    )  # fmt: skip
    assert relative(y, exact) < bound(dtype, 3)  # h, z and y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "past", "splits", "masked"),
    [
        (1, 1, 0, 3, False),
        (1, 1, 63, 3, False),
        (1, 1, 64, 1, False),
        (2, 1, 130, 4, True),
        (2, 3, 65, 4, True),
        (1, 7, 61, 3, False),
    ],
)
def test_attention_over_latents(dtype, batch, tokens, past, splits, masked, randn):
    H, D, V, R, S = 4, 16, 24, 40, 8
    N, length = batch * tokens, past + tokens
    rows = torch.full((batch, length + 5, R + S), NAN, dtype=dtype)  # after the length there is nothing to read
    rows[:, :past] = randn(batch, past, R + S, dtype=dtype)
    p = randn(N, H * (D + S) + R + S + 6, dtype=dtype)[:, : H * (D + S) + R + S]
    kv_b, norm = randn(H * (D + V), R, dtype=dtype), randn(R, dtype=dtype)
    mask = torch.ones(batch, length + 5, dtype=torch.bool)
    if masked:
        mask[0, : past // 2], mask[-1, 3:9] = False, False
    table = torch.tensor([rows.data_ptr(), rows.stride(0), mask.data_ptr() if masked else 0, mask.stride(0)])
    o, scale = torch.full((N, H, V), NAN, dtype=dtype), (D + S) ** -0.5
    before = rows[:, :past].clone()
    decode_latent_attention(
        p, kv_b, o, norm_weight=norm, norm_eps=1e-6, table=table, past=torch.tensor([past]),
        q=torch.full((N, H, R + S), NAN, dtype=dtype), partial=torch.full((N, splits, H, R), NAN),
        partial_lse=torch.full((N, splits, H), NAN), tokens=tokens, shared=S, scale=scale,
        config=latent_config(tokens, H, R, rows.element_size()), upcast=True,
    )  # fmt: skip

    queries = p[:, : H * (D + S)].double().view(batch, tokens, H, D + S)
    new = torch.cat([normed(p[:, H * (D + S) : -S], norm, 1e-6), p[:, -S:].double()], dim=1).view(batch, tokens, -1)
    assert torch.equal(rows[:, :past], before)
    assert relative(rows[:, past:length], new) < bound(dtype, 2)
    assert rows[:, length:].isnan().all()
    all_rows = torch.cat([before.double(), new], dim=1)
    key_up, value_up = kv_b.double().view(H, D + V, R).split([D, V], dim=1)
    shared = all_rows[:, None, :, R:].expand(-1, H, -1, -1)
    keys = torch.cat([torch.einsum("blr,hdr->bhld", all_rows[..., :R], key_up), shared], dim=-1)
    scores = torch.einsum("bthd,bhld->bhtl", queries, keys) * scale
    visible = torch.arange(length) <= past + torch.arange(tokens)[:, None]
    scores = scores.masked_fill(~(visible & mask[:, None, None, :length]), float("-inf"))
    latents = torch.einsum("bhtl,blr->bthr", scores.softmax(-1), all_rows[..., :R])
    exact = torch.einsum("bthr,hvr->bthv", latents, value_up).reshape(N, H, V)
    # Roundings: new row (2), query in latent space, weights, output; scores of some 10 carry the query's into exp.
    assert relative(o, exact) < (2e-6 if dtype == torch.float32 else bound(dtype, 15))
