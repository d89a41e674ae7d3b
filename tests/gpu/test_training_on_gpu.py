"""The kernels of a training step at size, on a CUDA device: what can't be shown without one. `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from kimi_linear import hub_card
from kimi_linear.hub_card.small_corpus import load_corpus
from kimi_linear.kernels.gpu import availability
from kimi_linear.kernels.prompt.norms import add_rms_norm_fwd, gated_rms_norm_fwd
from kimi_linear.kernels.prompt.short_convolution_kernel import short_conv_fwd
from kimi_linear.kernels.training.grouped_experts import grouped_experts_with_gradients
from kimi_linear.kernels.training.linear_cross_entropy import linear_cross_entropy_sum
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = Path(hub_card.__file__).parent / "small_checkpoint"
EPS = 2**-8  # one rounding to bf16


def randn(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def check(op, exact_op, inputs, weights, roundings=5):
    """Every gradient within so many roundings of float32's, and the same bits twice, in memory that held NaN."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = torch.autograd.grad(op(*leaves), leaves, weights)
    poison = [torch.full((1 << 26,), float("nan"), device="cuda") for _ in range(8)]
    del poison
    again = torch.autograd.grad(op(*leaves), leaves, weights)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(exact_op(*exact), exact, [w.float() for w in weights])
    for number, (ours, repeated, want) in enumerate(zip(found, again, wanted)):
        assert torch.equal(ours, repeated), number
        assert (ours.float() - want).norm() <= roundings * EPS * want.norm(), number


@pytest.mark.parametrize(
    ("N", "D", "I", "E", "k"), [(4096, 512, 256, 64, 8), (300, 2304, 1024, 32, 8), (7, 64, 32, 256, 2)]
)
def test_grouped_experts(N, D, I, E, k):
    """Among experts that nobody chose."""
    experts = torch.rand(N, E - 3, device="cuda").topk(k).indices
    weights, gate_up, down = torch.rand(N, k, device="cuda"), randn(E, 2 * I, D, scale=0.05), randn(E, D, I, scale=0.05)

    def ours(x, w, g, d, s):
        return (grouped_experts_with_gradients(x, experts, w, g, d, s),)

    def exact(x, w, g, d, s):
        y = s
        for e in experts.unique().tolist():
            token, slot = torch.where(experts == e)
            gate, up = (x[token] @ g[e].t()).chunk(2, dim=1)
            y = y.index_add(0, token, (F.silu(gate) * up) @ d[e].t() * w[token, slot, None])
        return (y,)

    check(ours, exact, (randn(N, D), weights, gate_up, down, randn(N, D)), [randn(N, D)])


def exact_norm(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def test_norms():
    x, r, dy = randn(5000, 2304), randn(5000, 2304), randn(5000, 2304)
    check(lambda x, r, w: add_rms_norm_fwd(x, r, w, 1e-5), lambda x, r, w: (exact_norm(x + r, w), x + r),
          (x, r, randn(2304)), [dy, randn(5000, 2304)])  # fmt: skip
    check(lambda x, g, w: (gated_rms_norm_fwd(x, g, w, 1e-5),), lambda x, g, w: (exact_norm(x, w) * g.sigmoid(),),
          (randn(999, 32, 128), randn(999, 32, 128), randn(128)), [randn(999, 32, 128)])  # fmt: skip


def test_short_convolution():
    def exact(x, w):
        z = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), w, groups=x.shape[2])
        return (F.silu(z).transpose(1, 2),)

    check(lambda x, w: short_conv_fwd(x, w, None, None, None)[:1], exact, (randn(2, 3001, 4096), randn(4096, 1, 4)),
          [randn(2, 3001, 4096)])  # fmt: skip


def test_loss_of_the_released_vocabulary():
    """More tokens than a chunk holds."""
    hidden, weight = randn(2500, 256), randn(163840, 256, scale=0.05)
    labels = torch.randint(0, 163840, (2500,), device="cuda")
    labels[::5] = -100
    check(lambda h, w: (linear_cross_entropy_sum(h, w, labels),),
          lambda h, w: (F.cross_entropy(h @ w.t(), labels, reduction="sum"),),
          (hidden, weight), [torch.tensor(1 / 2000, device="cuda")])  # fmt: skip


def trained(dtype, fused, order, steps=200):
    """Losses of optimiser steps of the small checkpoint on its own text, the rows of each batch in some order."""
    model = KimiLinearForCausalLM.from_pretrained(SMALL, dtype=dtype).to("cuda").train()
    text = "\n".join(load_corpus().training.values())[:300_000]
    tokens = torch.tensor(PreTrainedTokenizerFast.from_pretrained(SMALL)(text)["input_ids"])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-4), []
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 200, (4, 1), generator=draws)[order]
        ids = tokens[starts + torch.arange(200)].to("cuda")
        output = model(ids, labels=ids, use_cache=False, skip_logits=fused)
        assert (output.logits is None) == fused
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_correction_biases()
        losses.append(output.loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_200_steps_follow_pytorch_s(dtype, monkeypatch):
    """Within three times of what another order of the rows in each batch does to PyTorch's operators."""
    fused = trained(dtype, True, [0, 1, 2, 3])
    monkeypatch.setattr(availability, "device_serves", lambda device: False)
    plain, other = (trained(dtype, False, order) for order in ([0, 1, 2, 3], [2, 0, 3, 1]))
    ours, rounding = ((x - plain).abs() for x in (fused, other))
    print(f"{dtype}: loss {plain[0]:.4f} to {plain[-1]:.4f}, off by {ours[0]:.1e} in the first step")
    print(f"last 50 steps: ours {ours[-50:].mean():.1e} off, by rounding alone {rounding[-50:].mean():.1e}")
    assert plain[-20:].mean() < plain[:20].mean()
    assert ours[0] <= {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    assert ours[-50:].mean() <= 3 * rounding[-50:].mean()
