"""KDA's PyTorch path as one operator: values and gradients of the plain functions, and what torch asks of operators."""

import pytest
import torch

from kimi_linear.kernels.kda.torch_compiled import kda_torch_fwd
from kimi_linear.kernels.kda.torch_forward import chunk_kda_torch, recurrent_kda_torch


def inputs_of(length: int, rows: int = 2, state: bool = True, packed: bool = False) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(length)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v, g = (
        randn(rows, length, 3, 4),
        randn(rows, length, 3, 4),
        randn(rows, length, 3, 5),
        randn(rows, length, 3, 4),
    )
    cu_seqlens = torch.tensor([0, 3, 3, length]) if packed else None
    initial = randn(3 if packed else rows, 3, 4, 5) if state else None
    return [q, k, v, g, randn(rows, length, 3), randn(3), randn(12), initial, cu_seqlens]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", [1, 5, 15, 16, 64, 65])
def test_values_and_gradients(length, state):
    # The same functions run inside: equal to the bit, but for the order in which autograd adds up (float64: 1e-12).
    q, k, v, g, beta, A_log, dt_bias, initial, _ = inputs = inputs_of(length, state=state)
    run = chunk_kda_torch if length >= 16 else recurrent_kda_torch
    options = {"A_log": A_log, "dt_bias": dt_bias, "initial_state": initial, "output_final_state": True}
    wanted, got = run(q, k, v, g, beta, **options), kda_torch_fwd(*inputs)
    learned = [x for x in inputs if x is not None]
    gradients = []
    for outputs in (wanted, got):
        loss = (outputs[0].sin().sum() + outputs[1].cos().sum(),)
        gradients.append(torch.autograd.grad(loss, learned))
    for a, b in (*zip(got, wanted), *zip(gradients[1], gradients[0])):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("case", [{"state": False}, {}, {"rows": 1, "packed": True}], ids=["plain", "state", "packed"])
def test_torch_finds_nothing_wrong_with_the_operator(case):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(kda_torch_fwd, inputs_of(20, **case), test_utils=checks)
