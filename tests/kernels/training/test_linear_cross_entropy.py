"""The loss without logits against PyTorch's, in PyTorch's operators (its kernel: test_training_interpreted.py)."""

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.kernels.training import linear_cross_entropy as module
from kimi_linear.kernels.training.linear_cross_entropy import linear_cross_entropy_sum


def inputs(N, V, D=8, dtype=torch.float64):
    gen = torch.Generator().manual_seed(N + V)
    labels = torch.randint(0, V, (N,), generator=gen)
    labels[::3] = -100
    return torch.randn(N, D, generator=gen).to(dtype), torch.randn(V, D, generator=gen).to(dtype), labels


@pytest.fixture(params=[1, 3, 1000])
def chunk(request, monkeypatch):
    """Tokens of a chunk, whatever the sizes."""
    fwd = module._linear_cross_entropy_fwd
    monkeypatch.setattr(
        module, "_linear_cross_entropy_fwd", lambda h, w, l, i, _, *rest: fwd(h, w, l, i, request.param, *rest)
    )


def test_gradcheck(chunk):
    hidden, weight, labels = inputs(7, 11)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy_sum(h, w, labels), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "V"), [(0, 5), (1, 5), (7, 300)])
def test_loss_and_gradients(N, V, dtype, chunk):
    hidden, weight, labels = inputs(N, V, dtype=dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy_sum(*leaves, labels)
    found = torch.autograd.grad(loss * 0.3, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert abs(loss.double() - wanted) <= 4 * torch.finfo(dtype).eps * max(wanted, 1)
    for ours, want in zip(found, torch.autograd.grad(wanted * 0.3, exact)):
        assert ours.dtype == dtype
        assert (ours.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def test_only_what_is_wanted():
    hidden, weight, labels = inputs(4, 6)
    linear_cross_entropy_sum(hidden.requires_grad_(), weight, labels).backward()
    assert hidden.grad is not None and weight.grad is None
    assert not linear_cross_entropy_sum(hidden.detach(), weight, labels).requires_grad
    with torch.no_grad():
        assert linear_cross_entropy_sum(hidden, weight, labels) > 0


def test_twice_backward_and_ignored_tokens():
    """A kept graph gives the same again; a token without a label moves nothing."""
    hidden, weight, labels = inputs(6, 9)
    loss = linear_cross_entropy_sum(hidden.requires_grad_(), weight.requires_grad_(), labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight))))
    assert not first[0][::3].any() and first[0][1].any()
    none = torch.full_like(labels, -100)
    assert linear_cross_entropy_sum(hidden, weight, none) == 0
