"""What the operators of a training step say of themselves against what they do, in Triton's interpreter.

A traced graph is built from the shapes, dtypes and strides that an operator promises, and from which inputs it writes.
"""

import pytest
import torch

pytest.importorskip("triton")

from kimi_linear.kernels.training import (
    expert_adapters,
    expert_rows,
    grouped_experts,
    linear_cross_entropy,
    norms,
    routing,
    short_convolution,
    silu_mul,
)

M, D, I, E, K = 5, 16, 8, 4, 2


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def half(*shape):
    return draw(*shape, dtype=torch.bfloat16).requires_grad_()


X, WEIGHTS, EXPERTS = draw(M, D + 3)[:, 3:], draw(M, K), torch.arange(M * K).view(M, K) % E
POSITION = torch.arange(M * K, dtype=torch.int32).flip(0).view(M, K)
LABELS = torch.tensor([0, 3, -100, 1, 2])
CASES = [
    (norms.rms_norm_bwd, (X, X, None, draw(D, dtype=torch.bfloat16), 1e-5)),
    (norms.rms_norm_bwd, (X, X, X, draw(D), 1e-5)),
    (norms.gated_rms_norm_bwd, (X, X, X, draw(D), 1e-5)),
    (silu_mul.silu_mul_bwd, (*X.chunk(2, dim=1), X[:, :I])),
    (silu_mul.stacked_silu_mul_bwd, (X, X[:, :I])),
    (silu_mul.weighted_silu_mul_bwd, (X, X[:, :I], draw(M))),
    (expert_adapters.stacked_silu_mul_fwd, (draw(M, D).requires_grad_(),)),
    (routing.route_bwd, (WEIGHTS, draw(E, M).t(), draw(E), EXPERTS, True, 2.0, False)),
    (routing.router_logits, (half(M, D), half(E, D))),
    (expert_rows.combine_rows_bwd, (X, draw(M * K, D), POSITION, WEIGHTS)),
    (short_convolution.short_conv_bwd, (X[None], X[None], draw(D, 1, 4), None)),
    (short_convolution.short_conv_bwd, (X[None], X[None], half(D, 1, 4), torch.zeros(M, dtype=torch.int32))),
    (
        grouped_experts._grouped_experts_fwd,
        (half(M, D), EXPERTS, WEIGHTS.requires_grad_(), half(E, 2 * I, D), half(E, D, I), half(M, D)),
    ),
    (
        grouped_experts._grouped_experts_fwd,
        (half(M, D), EXPERTS, WEIGHTS, half(E, 2 * I, D).detach(), half(E, D, I), None),
    ),
    (linear_cross_entropy.cross_entropy_in_place, (draw(M, E), LABELS, -100)),
    (linear_cross_entropy._linear_cross_entropy_fwd, (half(M, D), half(E, D), LABELS, -100, 2, True, True)),
    (linear_cross_entropy._linear_cross_entropy_fwd, (draw(M, D), half(E, D).float(), LABELS, -100, 9, False, True)),
]


@pytest.mark.parametrize(("operator", "inputs"), CASES, ids=lambda x: getattr(x, "_name", ""))
def test_operators_keep_their_promises(operator, inputs):
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
