"""torch.compile(fullgraph=True) and torch.export of the PyTorch path: no graph breaks, and what eager computes.

The backend traces, decomposes and functionalises as every backend does and then runs plain operators: its results are
those of eager up to the order of a few sums, 1e-5 in fp32 at logits of order 1. Inductor's code generation, a minute a
graph on a CPU, is torch's to test.
"""

import pytest
import torch
from tiny_checkpoints import tiny_config, write_checkpoint
from transformers import StaticCache

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

BOUND = {"atol": 1e-5, "rtol": 1e-5}
LENGTH = 33


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One dense KDA layer and one MLA layer with experts: every branch once, so that tracing is short."""
    path = tmp_path_factory.mktemp("compiled")
    write_checkpoint(path, tiny_config(kda_layers=(1,), full_attn_layers=(2,)))
    return path


@pytest.fixture
def eager(folder) -> KimiLinearForCausalLM:
    torch._dynamo.reset()
    return KimiLinearForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def compiled(eager):
    return torch.compile(eager, fullgraph=True, backend="aot_eager_decomp_partition")


@torch.no_grad()
def test_prompt(eager, compiled, random_ids):
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, eager(ids, use_cache=False).logits, **BOUND)


@torch.no_grad()
def test_prompt_with_padding(eager, compiled, random_ids):
    ids = random_ids(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 20:] = 0
    valid = mask.bool()
    logits = compiled(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[valid], eager(ids, attention_mask=mask).logits[valid], **BOUND)
    # The mask must not have been dropped: padding seen as tokens would change row 0.
    assert not torch.allclose(logits[0, 5:], eager(ids).logits[0, 5:], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [KimiLinearCache, lambda config: StaticCache(config=config, max_cache_len=64)],
    ids=["KimiLinearCache", "StaticCache"],
)
def test_decoding_steps(eager, compiled, random_ids, make):
    ids = random_ids(2, LENGTH + 3)
    logits = {}
    for name, step in (("eager", eager), ("compiled", compiled)):
        cache = make(eager.config)
        eager(ids[:, :LENGTH], past_key_values=cache)
        steps = [
            step(ids[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])).logits
            for i in range(LENGTH, LENGTH + 3)
        ]
        logits[name] = torch.cat(steps, dim=1)
    torch.testing.assert_close(logits["compiled"], logits["eager"], **BOUND)
    # 1e-4: the cached form sums in another order than one pass over the whole prompt.
    torch.testing.assert_close(logits["compiled"], eager(ids).logits[:, LENGTH:], atol=1e-4, rtol=1e-4)


def test_training_step(eager, compiled, random_ids):
    # The stand-in for grouped_mm on CPUs has no traceable backward in transformers 5.10; on a GPU it isn't used.
    eager.set_experts_implementation("batched_mm")
    eager.train()
    ids = random_ids(2, LENGTH)
    results = {}
    for name, model in (("eager", eager), ("compiled", compiled)):
        eager.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results[name] = loss.detach(), {n: p.grad.clone() for n, p in eager.named_parameters()}
    torch.testing.assert_close(results["compiled"][0], results["eager"][0], **BOUND)
    for name, expected in results["eager"][1].items():
        difference = (results["compiled"][1][name] - expected).norm()
        assert expected.norm() > 0, name
        assert difference <= 1e-5 * expected.norm(), name


@torch.no_grad()
def test_lengths_are_dynamic(eager, random_ids):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = torch.compile(eager, fullgraph=True, backend=count)
    for length in (5, 9, 12, 17, 33, 47, 64, 65, 90, 130):
        ids = random_ids(2, length)
        torch.testing.assert_close(model(ids, use_cache=False).logits, eager(ids, use_cache=False).logits, **BOUND)
    assert len(graphs) <= 3  # the first length, any length up to 16, any length above


@torch.no_grad()
def test_a_program_that_was_exported_runs_other_lengths(eager, random_ids):
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = eager

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    dynamic = ({1: torch.export.Dim.AUTO},)
    program = torch.export.export(Logits(), (random_ids(2, 20),), dynamic_shapes=dynamic, strict=False).module()
    for length in (17, 64, 75, 200):
        torch.testing.assert_close(program(random_ids(2, length)), eager(random_ids(2, length)).logits, **BOUND)


@torch.no_grad()
def test_export_of_a_prompt(eager, random_ids):
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = eager

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    program = torch.export.export(Logits(), (random_ids(2, LENGTH),), strict=False).module()
    other = random_ids(2, LENGTH, seed=1)
    torch.testing.assert_close(program(other), eager(other).logits, **BOUND)
