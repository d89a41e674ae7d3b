"""
Sizes at which grids, offsets and workspaces used to end, in Triton's interpreter.

What is too large to run is looked at: grids by recording launches, offsets over memory of which only a few pages are
ever touched.
"""

import pytest
import torch

pytest.importorskip("triton")

from kimi_linear.kernels.decode.routing import decode_route
from kimi_linear.kernels.gpu import availability as gpu_availability
from kimi_linear.kernels.kda import inter as kda_inter
from kimi_linear.kernels.kda import intra as kda_intra
from kimi_linear.kernels.kda import operators as kda_operators
from kimi_linear.kernels.kda import streams as kda_streams
from kimi_linear.kernels.kda.operators import chunk_kda
from kimi_linear.kernels.prompt import merge_attention as prompt_merge_attention
from kimi_linear.kernels.prompt import short_convolution_kernel as prompt_short_convolution_kernel
from kimi_linear.kernels.prompt.expert_rows import route_fwd
from kimi_linear.kernels.prompt.merge_attention import merge_attention_fwd

FAR = 71_000_000  # elements between heads of a head-major tensor of 555,000 tokens of width 128: 31 FAR > 2 ** 31


class Grids:
    """Stands for a kernel, and keeps the grids that it is launched with."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *args, **options: None

    def fits(self):
        return bool(self.seen) and all(size <= 65535 for grid in self.seen for size in grid[1:])


def test_grids_of_many_rows(monkeypatch):
    """2,048 rows of 32 heads; 70,000 packed sequences."""
    grids, B, H, K = Grids(), 2048, 32, 16
    for module in (kda_inter, kda_intra):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: grids.seen.append(grid))
    monkeypatch.setattr(gpu_availability, "serves", lambda device: True)
    x = torch.empty(B, 2, H, K, device="meta")
    kda_operators._chunk_kda_fwd._init_fn(
        x,
        x,
        x,
        x,
        x[..., 0],
        torch.empty(H, device="meta"),
        torch.empty(H * K, device="meta"),
        1.0,
        None,
        None,
        False,
    )
    assert len(grids.seen) == 2 and grids.fits()
    merge, edges, conv = Grids(), Grids(), Grids()
    monkeypatch.setattr(prompt_merge_attention, "merge_attention_fwd_kernel", merge)
    o, lse = torch.empty(B, 17, H, K, device="meta"), torch.empty(B, H, 17, device="meta")
    merge_attention_fwd._init_fn(o, lse, o, lse)
    assert merge.fits()
    monkeypatch.setattr(prompt_short_convolution_kernel, "short_conv_edges_fwd_kernel", edges)
    monkeypatch.setattr(prompt_short_convolution_kernel, "short_conv_fwd_kernel", conv)
    monkeypatch.setattr(prompt_short_convolution_kernel, "first_tokens", lambda *args: None)
    x, packed = torch.empty(1, 70_000, 64, device="meta"), torch.arange(70_001, device="meta")
    prompt_short_convolution_kernel.short_conv_fwd._init_fn(x, torch.empty(64, 1, 4, device="meta"), None, None, packed)
    assert edges.fits() and conv.fits()


@pytest.fixture(scope="module")
def far_heads():
    """Gives copies [B, T, 32, D] bf16 whose heads are FAR elements apart; the memory between them is never touched."""
    memory = torch.empty(32 * FAR, dtype=torch.bfloat16)

    def copy(x, slot):
        B, T, H, D = x.shape
        view = memory[slot * 4096 :].as_strided((B, T, H, D), (T * D, D, FAR, 1))
        view.copy_(x)
        return view

    return copy


def test_offsets_between_heads_of_long_prompts(far_heads):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    part, lse, part_lse = randn(1, 3, 32, 16), randn(1, 32, 3).float(), randn(1, 32, 3).float()
    outputs = []
    for x in (part, far_heads(part, 0)):
        o, total = torch.ones(1, 3, 32, 16), lse.clone()
        merge_attention_fwd(o, total, x, part_lse)
        outputs.append(o)
    assert torch.equal(*outputs)
    q, k, v, g = (randn(1, 2, 32, 16) for _ in range(4))
    beta, A_log, dt_bias = randn(1, 2, 32), torch.zeros(32), torch.zeros(512)
    expected, state = chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, output_final_state=True)
    far = [far_heads(x, slot) for slot, x in enumerate((q, k, v, g))]
    far_beta = far_heads(beta[..., None], 5)[..., 0]
    o, far_state = chunk_kda(*far, far_beta, A_log=A_log, dt_bias=dt_bias, output_final_state=True)
    assert torch.equal(o, expected) and torch.equal(far_state, state)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_in_segments(with_state, monkeypatch):
    """Chunks of a pack in bounded workspace: the same bits, whatever lies across the borders."""
    generator = torch.Generator().manual_seed(1)
    bounds = torch.tensor([0, 3, 3, 150, 150, 215, 216, 280, 280])
    T, N = int(bounds[-1]), len(bounds) - 1
    q, k, v, g = (torch.randn(1, T, 1, 16, generator=generator) for _ in range(4))
    state = torch.randn(N, 1, 16, 16, generator=generator) if with_state else None
    options = {"A_log": torch.zeros(1), "dt_bias": torch.zeros(16), "initial_state": state, "cu_seqlens": bounds}
    beta = torch.randn(1, T, 1, generator=generator)
    tiles, made = kda_operators.intra_tiles, []

    def counted(q, chunks, C):
        made.append(chunks)
        return [x.fill_(float("nan") if x.is_floating_point() else 0) for x in tiles(q, chunks, C)]

    monkeypatch.setattr(kda_operators, "intra_tiles", counted)
    expected = chunk_kda(q, k, v, g, beta, **options, output_final_state=True)
    for tokens in (64, 160):
        monkeypatch.setattr(kda_streams, "WORKSPACE_TOKENS", tokens)
        outputs = chunk_kda(q, k, v, g, beta, **options, output_final_state=True)
        assert torch.equal(outputs[0], expected[0]) and torch.equal(outputs[1], expected[1])
        assert made[-1] <= max(1, tokens // 32) < made[0]
    if with_state:  # a sequence without tokens keeps what it came with
        assert torch.equal(outputs[1][[1, 3, 7]], state[[1, 3, 7]])


@pytest.mark.parametrize("nans", [1, 2, 5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_prompt_and_step_choose_the_same_experts_beside_nan(nans, sign):
    """As torch.topk, which layers take without these kernels: NaN is above all numbers, and shows in the weights."""
    generator = torch.Generator().manual_seed(nans)
    logits, bias = torch.randn(6, 12, generator=generator), torch.randn(12, generator=generator) / 4
    for row in range(5):
        logits[row, torch.randperm(12, generator=generator)[:nans]] = sign * float("nan")
    rule = {"renormalize": True, "biased": False}
    weights, experts = route_fwd(logits, bias, 3, rule["renormalize"], 2.0, rule["biased"])
    chosen, step_weights = torch.full((6, 3), -7, dtype=torch.int32), torch.empty(6, 3)
    decode_route(logits, bias, chosen, step_weights, factor=2.0, **rule)
    assert torch.equal(chosen.long(), experts)
    torch.testing.assert_close(step_weights, weights, rtol=1e-6, atol=0, equal_nan=True)
    assert weights[:5].isnan().all() and weights[5].isfinite().all()
    if nans <= 3:
        wanted = (logits.sigmoid() + bias).topk(3).indices
        assert torch.equal(experts.sort(1).values, wanted.sort(1).values)
