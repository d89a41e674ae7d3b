"""
Captured steps with PEFT's LoRA, unmerged: in Triton's interpreter, against PEFT's own forward through the layers.

Logits in fp32 agree as in test_decode_step_interpreted.py. An adapter's B is drawn, as PEFT begins it with zeros.
"""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft")

import peft
from interpreted_steps import (
    PROMPT,
    close,
    few_programs,
    frozen,
    layer_by_layer,
    make_model,
    same_cache,
    stepping,
)

__all__ = ["few_programs", "frozen", "stepping"]  # fixtures
NEW = torch.tensor([[7], [11]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
EVERYTHING = [
    *ATTENTION, "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens",
]  # fmt: skip
TARGETS = {
    "attention and experts": (ATTENTION, EXPERTS),
    "everything": (EVERYTHING, EXPERTS),
    "values only": (["v_proj"], None),
    "one stacked projection": (["o_proj"], EXPERTS[1:]),
    "shared expert": ("model.layers.1.block_sparse_moe.shared_experts.down_proj", EXPERTS[:1]),
}


def adapted(name="attention and experts", r=3, **options):
    torch.manual_seed(1)
    modules, parameters = TARGETS[name]
    config = peft.LoraConfig(r=r, lora_alpha=5, target_modules=modules, target_parameters=parameters, **options)
    wrapped = peft.get_peft_model(make_model(), config).eval()
    draw(wrapped)
    return wrapped


def draw(wrapped):
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)


@torch.no_grad()
def step_beside_layers(wrapped, rows, tokens=1):
    """(logits and cache of a forward by layers, the same by a step) over a cache of `rows` sequences."""
    model = wrapped.get_base_model()
    generator = torch.Generator().manual_seed(rows)
    prompt = torch.randint(0, 120, (rows, 7), generator=generator)
    mask = torch.ones(rows, 7 + tokens, dtype=torch.long)
    mask[0, :3] = 0
    cache = model(prompt, attention_mask=mask[:, :7], use_cache=True).past_key_values
    twin = cache.clone() if hasattr(cache, "clone") else cache.fork(1)[0]
    new = torch.randint(0, 120, (rows, tokens), generator=generator)
    expected = layer_by_layer(model, lambda: model(new, attention_mask=mask, past_key_values=twin).logits)
    return (expected, twin), (model(new, attention_mask=mask, past_key_values=cache).logits, cache)


@pytest.mark.parametrize("name", TARGETS)
def test_one_token_and_several(name, stepping):
    wrapped = adapted(name)
    base = make_model()
    for rows, tokens in ((1, 1), (3, 1)):
        (expected, twin), (logits, cache) = step_beside_layers(wrapped, rows, tokens)
        assert close(logits, expected)
        assert same_cache(cache, twin)
        assert not close(base(PROMPT).logits, wrapped(PROMPT).logits)  # the adapter counts
    assert stepping == [(1, 1), (3, 1)]
