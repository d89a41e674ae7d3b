"""Training mode and gradient checkpointing: generation stays right, experts are counted once."""

import pytest
import torch
from tiny_checkpoints import tiny_config

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 127}
KINDS = {"without": None, "reentrant": True, "not reentrant": False}


@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_training_mode(load_tiny, model, random_ids, kind):
    training = load_tiny().train()
    if KINDS[kind] is not None:
        training.gradient_checkpointing_enable({"use_reentrant": KINDS[kind]})
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(training.generate(ids, attention_mask=mask, **OPTIONS), expected)
    # A loop of one's own, cache in hand.
    with torch.no_grad():
        outputs = training(ids, attention_mask=mask, past_key_values=KimiLinearCache(training.config))
        step = training(ids[:, :1], past_key_values=outputs.past_key_values).logits
        whole = model(ids, attention_mask=mask, use_cache=True)
        assert torch.equal(step, model(ids[:, :1], past_key_values=whole.past_key_values).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_count_each_token_once(load_tiny, random_ids, kind):
    model, ids = load_tiny().train(), random_ids(2, 10)
    if KINDS[kind] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": KINDS[kind]})
        model.enable_input_require_grads()
    model.generate(ids, **OPTIONS)  # what is generated is no training
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers[1:]:
        router = layer.block_sparse_moe.gate
        assert router.tokens_per_expert.sum() == ids.numel() * router.top_k
        assert not router.in_checkpoint


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_over_a_filled_cache_is_refused(load_tiny, random_ids, reentrant):
    model, ids = load_tiny().train(), random_ids(1, 5)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values holds 5 tokens, and gradient checkpointing keeps the cache"):
        model(ids, past_key_values=cache)


def test_counting_compiles():
    config = KimiLinearConfig(**tiny_config(kda_layers=(), full_attn_layers=(1, 2)))
    model = KimiLinearForCausalLM(config).train()
    router = model.model.layers[1].block_sparse_moe.gate
    torch.compile(router, backend="eager", fullgraph=True)(torch.randn(5, 64))
    assert router.tokens_per_expert.sum() == 5 * router.top_k
