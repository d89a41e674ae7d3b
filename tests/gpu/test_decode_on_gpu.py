"""Captured decode steps on a CUDA device. `python -m pytest -m gpu tests/gpu/test_decode_on_gpu.py`."""

import threading

import pytest
import torch
from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode.step import DecodeStep
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tiny_config(kda_layers=(1, 2, 3), full_attn_layers=(4, 5)))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cuda"})


@torch.no_grad()
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 1), (1, 5), (3, 2), (40, 1)])
def test_captured_step_equals_layers(model, batch, tokens):
    """fp32 to 1e-5: some hundred operations of eps 1.2e-7 in another order, on both sides of a chunk's border."""
    ids = torch.randint(0, 120, (batch, 70 + 4 * tokens), generator=torch.Generator().manual_seed(batch)).cuda()
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :4] = 0
    caches = [KimiLinearCache(model.config) for _ in range(2)]
    for cache in caches:
        model.model(ids[:, :70], attention_mask=mask[:, :70], past_key_values=cache)
    step = DecodeStep(model, batch, tokens)
    for begin in range(70, 70 + 4 * tokens, tokens):
        new, seen = ids[:, begin : begin + tokens], mask[:, : begin + tokens]
        exact = model.lm_head(model.model(new, attention_mask=seen, past_key_values=caches[0]).last_hidden_state)
        logits = step(caches[1], new, mask.bool() if batch > 1 else None)
        assert float((logits - exact).norm() / exact.norm()) < 1e-5
    states = [cache.layers[0].state for cache in caches]
    assert float((states[1] - states[0]).norm() / states[0].norm()) < 1e-5


@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_text_of_the_small_checkpoint(batch, by_layers):
    """512 tokens, left-padded: the same text by steps and by layers, in fp32 (in bf16 near-ties fall either way)."""
    model = KimiLinearForCausalLM.from_pretrained(SMALL_CHECKPOINT, dtype=torch.float32, device_map={"": "cuda"})
    ids = torch.randint(0, 1000, (batch, 20), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[0, : 5 * (batch > 1)] = 0
    options = {"max_new_tokens": 512, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    expected = by_layers(lambda: model.generate(ids, **options))
    assert model.decode_path.startswith("captured steps")
    assert torch.equal(model.generate(ids, **options), expected)


def test_logits_in_bf16_are_as_near_to_fp32_as_the_layers(folder, by_layers):
    models = {
        dtype: KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": "cuda"})
        for dtype in (torch.float32, torch.bfloat16)
    }
    ids = torch.randint(0, 120, (1, 64), generator=torch.Generator().manual_seed(2)).cuda()

    @torch.no_grad()
    def logits(model):
        cache = KimiLinearCache(model.config)
        model(ids[:, :32], past_key_values=cache)
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(32, 64)], dim=1).float()

    exact = by_layers(lambda: logits(models[torch.float32]))
    layers = by_layers(lambda: logits(models[torch.bfloat16]))
    assert float((logits(models[torch.bfloat16]) - exact).norm()) < 1.5 * float((layers - exact).norm())


def test_recording_by_steps_rolls_back(model):
    with torch.no_grad():
        ids = torch.randint(0, 120, (2, 40), generator=torch.Generator().manual_seed(3)).cuda()
        cache = KimiLinearCache(model.config)
        cache.activate_past_recording()
        model(ids[:, :30], past_key_values=cache)
        model(ids[:, 30:31], past_key_values=cache)
        wanted = [layer.state.clone() for layer in cache.layers if hasattr(layer, "state")]
        for i in range(31, 36):
            model(ids[:, i : i + 1], past_key_values=cache)
        cache.crop(-5)
        states = [layer.state for layer in cache.layers if hasattr(layer, "state")]
        # One kernel, compiled with and without the table of addresses: the same operations, to fp32 rounding at worst.
        assert all(float((state - kept).norm() / kept.norm()) < 1e-6 for state, kept in zip(states, wanted))


def test_prompt_lookup_gives_the_greedy_text(model):
    ids = torch.tensor([[5, 6, 7, 8, 9] * 4]).cuda()
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": 119, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **options), model.generate(ids, **options))


def test_two_threads(model):
    prompts = [torch.randint(0, 120, (1, 9 + i), generator=torch.Generator().manual_seed(i)).cuda() for i in range(2)]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected, texts = [model.generate(prompt, **options) for prompt in prompts], [None, None]

    def work(i):
        texts[i] = model.generate(prompts[i], **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(text, wanted) for text, wanted in zip(texts, expected))


def test_memory_does_not_grow(model):
    def generate(batch, length):
        ids = torch.randint(0, 120, (batch, length)).cuda()
        model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)

    for batch in (1, 2, 3):
        generate(batch, 40)
    held = torch.cuda.memory_allocated()
    for i in range(200):
        generate(1 + i % 3, 5 + i % 36)
    assert torch.cuda.memory_allocated() <= held
