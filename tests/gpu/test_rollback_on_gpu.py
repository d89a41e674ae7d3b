"""Taking tokens back on a CUDA device: the same bits as if they had never been seen. `python -m pytest -m gpu`."""

import pytest
import torch
from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.kernels.kda import dispatch as kda_dispatch
from kimi_linear.modeling.cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["auto", "triton", "torch"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tiny_config())
    model = KimiLinearForCausalLM.from_pretrained(folder, kda_backend=request.param, device_map={"": "cuda"}).eval()
    model.generation_config.eos_token_id = 126
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 120, (batch, length), generator=torch.Generator().manual_seed(seed)).cuda()


@torch.no_grad()
def recorded(model, *parts: torch.Tensor) -> KimiLinearCache:
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    for part in parts:
        model(part, past_key_values=cache)
    return cache


def assert_same_states(a: KimiLinearCache, b: KimiLinearCache) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        if isinstance(x, KDACacheLayer):
            assert torch.equal(x.state, y.state)
            assert torch.equal(x.window, y.window)
        else:
            assert torch.equal(x.rows, y.rows)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("removed", [1, 4, 16, 60])
def test_tokens_in_calls_of_their_own_leave_no_trace(batch, removed, model):
    ids = random_ids(batch, 30)
    parts = [ids[:, :20], ids[:, 20:22], *ids[:, 22:].split(1, dim=1)]
    cache, never = recorded(model, *parts, random_ids(batch, removed, seed=1)), recorded(model, *parts)
    cache.crop(-removed)
    assert_same_states(cache, never)
    with torch.no_grad():
        for part in random_ids(batch, 5, seed=2).split([1, 4], dim=1):
            assert torch.equal(model(part, past_key_values=cache).logits, model(part, past_key_values=never).logits)
    assert_same_states(cache, never)


def test_short_continuations_by_layers_take_the_fused_step(model, by_layers, monkeypatch):
    launches, step = [], kda_dispatch.kda_step

    def counted(q, *args, **kwargs):
        launches.append(q.shape[1])
        return step(q, *args, **kwargs)

    monkeypatch.setattr(kda_dispatch, "kda_step", counted)
    cache = KimiLinearCache(model.config)

    @torch.no_grad()
    def fill():
        for part in random_ids(1, 30).split([20, 1, 9], dim=1):
            model(part, past_key_values=cache)

    by_layers(fill)
    assert launches == ([] if model.config.kda_backend == "torch" else [1, 1, 9, 9])


def test_rows_take_back_different_numbers(model):
    ids, drafts, more = random_ids(2, 12), random_ids(2, 5, seed=1), random_ids(2, 2, seed=2)
    cache = recorded(model, ids, drafts)
    mask = cache.crop_rows(torch.tensor([1, 4], device="cuda"))
    with torch.no_grad():
        logits = model(more, past_key_values=cache, attention_mask=torch.cat([mask, torch.ones_like(more)], 1)).logits
        for row, kept in enumerate((4, 1)):
            alone = model(torch.cat([ids[row], drafts[row, :kept], more[row]])[None], use_cache=False).logits
            torch.testing.assert_close(logits[row], alone[0, -2:], atol=1e-3, rtol=0)


def test_prompt_lookup_gives_the_greedy_tokens(model):
    ids, options = random_ids(1, 10).repeat(1, 2), {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=5), expected)
