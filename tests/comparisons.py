"""Two ways to the same numbers in fp32: how far logits and gradients may lie apart."""

import torch
from torch import nn


def assert_same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Logits of order 1, some 1e3 fp32 terms summed in another order: 1e-4 absolute."""
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of each norm: sums of some 1e3 fp32 terms in another order."""
    assert set(a) == set(b)
    for name, gradient in b.items():
        assert (a[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name
