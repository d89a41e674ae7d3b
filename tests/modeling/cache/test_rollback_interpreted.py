"""Short continuations and rollback through the fused Triton step, in Triton's interpreter on a CPU.

Against the PyTorch path logits agree to 1e-4, as two ways to the same logits do in fp32 (test_cache.py).
"""

import pytest
import torch

pytest.importorskip("triton")

from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.kernels.kda import dispatch as kda_dispatch
from kimi_linear.modeling.cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One KDA layer of one head, which is what the interpreter has time for, and one MLA layer."""
    path, config = tmp_path_factory.mktemp("one_head"), tiny_config(kda_layers=(1,), full_attn_layers=(2,))
    config["linear_attn_config"] = {**config["linear_attn_config"], "num_heads": 1}
    write_checkpoint(path, config)
    return path


@pytest.fixture
def models(folder):
    """The model on Triton and on PyTorch."""
    backends = ("triton", "torch")
    return [KimiLinearForCausalLM.from_pretrained(folder, kda_backend=backend).eval() for backend in backends]


@pytest.fixture
def launches(monkeypatch):
    """Tokens of each launch of the fused step."""
    tokens, step = [], kda_dispatch.kda_step

    def counted(q, *args, **kwargs):
        tokens.append(q.shape[1])
        return step(q, *args, **kwargs)

    monkeypatch.setattr(kda_dispatch, "kda_step", counted)
    return tokens


def new_cache(model) -> KimiLinearCache:
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    return cache


@torch.no_grad()
def run(model, cache, *parts, mask=None):
    for part in parts:
        logits = model(part, past_key_values=cache, attention_mask=mask).logits
    return logits


def assert_same_bits(a: KimiLinearCache, b: KimiLinearCache) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        if isinstance(x, KDACacheLayer):
            assert torch.equal(x.state, y.state)
            assert torch.equal(x.window, y.window)


@pytest.mark.parametrize("batch", [1, 2])
def test_short_continuations_take_the_fused_step_in_place(batch, models, launches, random_ids):
    ids, caches = random_ids(batch, 20), [KimiLinearCache(model.config) for model in models]
    for model, cache in zip(models, caches):
        run(model, cache, ids[:, :8])
    assert launches == []  # a prompt
    held = [(layer.state.data_ptr(), layer.window.data_ptr()) for layer in caches[0].layers[:1]]
    for part in ids[:, 8:].split([1, 4, 1, 6], dim=1):
        logits = [run(model, cache, part) for model, cache in zip(models, caches)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    assert launches == [1, 4, 1, 6]
    assert held == [(layer.state.data_ptr(), layer.window.data_ptr()) for layer in caches[0].layers[:1]]
    run(models[0], caches[0], random_ids(batch, 17))
    assert len(launches) == 4


@pytest.mark.parametrize("batch", [1, 2])
def test_crop_leaves_the_bits_of_the_kept_tokens(batch, models, launches, random_ids):
    model, ids = models[0], random_ids(batch, 20)
    cache, never = new_cache(model), new_cache(model)
    run(model, cache, ids[:, :8], ids[:, 8:10])
    run(model, never, ids[:, :8], ids[:, 8:10])
    for i, removed in enumerate((4, 1, 3)):
        run(model, cache, random_ids(batch, removed, seed=i))
        cache.crop(-removed)
        assert_same_bits(cache, never)
    run(model, cache, ids[:, 10:13])
    cache.crop(-3)
    launches.clear()
    cache.crop(-1)  # steps through what is left since the last checkpoint
    assert len(launches) == 1
    never.crop(-1)
    assert_same_bits(cache, never)


@torch.no_grad()
def test_steps_leave_the_same_bits_however_they_are_split(models, random_ids):
    model, ids = models[0], random_ids(1, 13)
    recording = new_cache(model)
    run(model, recording, ids)
    inputs = recording.layers[0].recording.inputs[:, :13]
    weights, layer = recording.layers[0].weights, recording.layers[0]
    sizes = [16, 16, 16, 16, 1]
    for splits in ([13], [1] * 13, [5, 8]):
        window, state = torch.zeros_like(layer.window), torch.zeros_like(layer.state)
        for part in inputs.split(splits, dim=1):
            _, window, state = weights.step(part.split(sizes, dim=-1), None, window, state, None)
        assert torch.equal(state, layer.state)
        assert torch.equal(window, layer.window)


def test_padding_and_rows_that_keep_different_numbers(models, random_ids):
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    drafts, more = random_ids(2, 4, seed=1), random_ids(2, 2, seed=2)
    logits = []
    for model in models:
        cache = new_cache(model)
        run(model, cache, ids, mask=mask)
        drafted = torch.cat([mask, torch.ones_like(drafts)], dim=1)
        run(model, cache, drafts, mask=drafted)
        kept = cache.crop_rows(torch.tensor([1, 3]), drafted)
        logits.append(run(model, cache, more, mask=torch.cat([kept, torch.ones_like(more)], dim=1)))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_speculative_decoding(models, random_ids):
    ids = random_ids(1, 5).repeat(1, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 126}
    expected = models[1].generate(ids, **options)
    assert torch.equal(models[0].generate(ids, **options, prompt_lookup_num_tokens=3), expected)


def test_without_no_grad_a_frozen_model_takes_triton_too(models, launches, random_ids):
    model, ids = models[0].requires_grad_(False), random_ids(1, 9)
    cache = KimiLinearCache(model.config)
    model(ids[:, :8], past_key_values=cache)
    model(ids[:, 8:], past_key_values=cache)
    assert launches == [1]
