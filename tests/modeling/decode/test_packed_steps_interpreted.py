"""
Steps over packed weights against the layers, which dequantise them, in Triton's interpreter.

fp32: some hundred operations of eps 6e-8 in another order; sums of one token's 4-bit products are 30 times larger than
what they sum up to (kernels/decode/tiles.py), so 1e-5 as for dense weights holds with room.
"""

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import MASK, PROMPT, close, few_programs, layer_by_layer, stepping
from packed_weights import EXPERTS, IGNORED, QUANTISED_CONFIG, config_of, quantised_tensors

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.kernels.decode.configs import GemvConfig
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import expert_launches
from kimi_linear.modeling.decode.step import DecodeStep
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

__all__ = ["few_programs", "stepping"]  # fixtures

READ = ["w4a16 g32", "fp8 channel", "fp8 tensor static"]
UNREAD = {
    "w4a16 g32 asymmetric": "pack-quantized int4, groups of 32, asymmetric",
    "w3a16": "pack-quantized int3",
    "nvfp4": "nvfp4-pack-quantized float4",
    "mxfp8": "mxfp8-quantized float8",
}


def packed_model(layout, **overrides):
    config = {**QUANTISED_CONFIG, **overrides, "quantization_config": config_of(layout, IGNORED)}
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict(config)).eval()
    if not overrides:
        model.load_state_dict(quantised_tensors(layout)[0])
    return model


@pytest.fixture(autouse=True)
def few_packed_programs(monkeypatch):
    few = (GemvConfig(32, 64, 1, 4), GemvConfig(32, 64, 1, 4))
    monkeypatch.setattr(expert_launches, "packed_experts_configs", lambda columns: few)
    monkeypatch.setattr(expert_launches, "packed_down_config", lambda columns, choices: GemvConfig(64, 64, choices, 4))


@torch.no_grad()
@pytest.mark.parametrize(("layout", "batch"), [*((layout, 1) for layout in READ), ("w4a16 g32", 2), ("fp8 block", 2)])
def test_step_equals_layers(layout, batch):
    model, prompt, mask = packed_model(layout), PROMPT[-batch:], MASK[-batch:]
    caches = [KimiLinearCache(model.config), KimiLinearCache(model.config)]
    for cache in caches:
        model.model(prompt, attention_mask=mask, past_key_values=cache)
    step = DecodeStep(model, batch, 1)
    for buffer in step.plan.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    new = torch.randint(0, 120, (batch, 1))
    mask = torch.cat([mask, torch.ones_like(new)], dim=1)
    hidden = model.model(new, attention_mask=mask, past_key_values=caches[0]).last_hidden_state
    assert close(step(caches[1], new, mask.bool() if batch > 1 else None), model.lm_head(hidden))


def test_greedy_text_is_that_of_the_layers(stepping):
    model = packed_model("w4a16 g32")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "attention_mask": MASK}
    expected = layer_by_layer(model, lambda: model.generate(PROMPT, **options))
    assert model.decode_path.startswith("captured steps")
    assert torch.equal(model.generate(PROMPT, **options), expected)
    assert stepping


@pytest.mark.parametrize("layout", UNREAD)
def test_formats_without_kernels_take_the_layers_and_say_so(layout, stepping):
    reason = packed_model(layout).decode_path
    assert reason.startswith(f"layer by layer: packed weights: no kernels for {UNREAD[layout]}"), reason


def test_several_shared_experts_take_the_layers(stepping):
    reason = packed_model("w4a16 g32", num_shared_experts=2).decode_path
    assert reason == "layer by layer: packed weights: no kernels for 2 shared experts"


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_adapters_on_packed_projections(batch, stepping):
    """QLoRA: PEFT's forward over dequantised weights, against the step's packed product and low-rank launches."""
    peft = pytest.importorskip("peft")
    model = packed_model("fp8 channel")
    torch.manual_seed(2)
    names = ["q_proj", "o_proj", "kv_b_proj", "gate_proj", "down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=names, init_lora_weights=False)).eval()
    cache = wrapped(PROMPT[-batch:], attention_mask=MASK[-batch:], use_cache=True).past_key_values
    new, twin = torch.arange(batch)[:, None] + 7, cache.fork(1)[0]
    mask = torch.nn.functional.pad(MASK[-batch:], (0, 1), value=1)
    expected = layer_by_layer(model, lambda: model(new, attention_mask=mask, past_key_values=twin).logits)
    assert close(model(new, attention_mask=mask, past_key_values=cache).logits, expected)
    assert stepping == [(batch, 1)]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_adapters_of_dense_experts_beside_a_packed_shared_one(batch, stepping):
    """Launches read packed weights or adapters of experts, so the shared expert goes apart."""
    peft = pytest.importorskip("peft")
    config = config_of("fp8 channel", [*IGNORED, rf"re:{EXPERTS}\..*"])
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict({**QUANTISED_CONFIG, "quantization_config": config}))
    stored, dense = quantised_tensors("fp8 channel")
    routed = {name: x.float() for name, x in dense.items() if name.startswith(EXPERTS)}
    model.load_state_dict({**{name: x for name, x in stored.items() if not name.startswith(EXPERTS)}, **routed})
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = peft.LoraConfig(r=3, target_modules=[], target_parameters=names, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, adapter).eval()
    cache, new = wrapped(PROMPT[-batch:], use_cache=True).past_key_values, torch.arange(batch)[:, None] + 7
    twin = cache.fork(1)[0]
    expected = layer_by_layer(model, lambda: model(new, past_key_values=twin).logits)
    assert close(model(new, past_key_values=cache).logits, expected)
    assert stepping == [(batch, 1)]
