"""PEFT adapters on attention and on the stacked experts, and quantised loading on the CPU where packages allow it."""

import pytest
import torch
from torch import nn

from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

peft = pytest.importorskip("peft", reason="adapters need peft (in the dev extra)")

# fp32 logits of order 1 to 10, each behind some 1e3 roundings of 6e-8; merging adds one rounding of each weight.
BOUND = {"atol": 1e-4, "rtol": 1e-4}

TARGETS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj"]},
    "gates": {"target_modules": ["f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj"]},
    "latent expansion": {"target_modules": ["kv_b_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def trained(model: nn.Module, ids: torch.Tensor, targets: dict, steps: int = 2) -> tuple[nn.Module, list[float]]:
    """`model` with LoRA adapters after a few steps, and the loss before each step."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **targets)).train()
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=0.05)
    losses = []
    for _ in range(steps):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return adapted.eval(), losses


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_lora_trains_saves_and_reloads(load_tiny, shared_tiny, random_ids, tmp_path, targets):
    ids = random_ids(2, 20)
    adapted, losses = trained(load_tiny(), ids, targets, steps=3)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_tiny(), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, logits)
        base = shared_tiny()(ids).logits
        assert (logits - base).norm() > 0.01 * base.norm()  # the adapter does something
        with again.disable_adapter():
            torch.testing.assert_close(again(input_ids=ids).logits, base, **BOUND)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_merged_adapters_are_saved_in_the_released_layout(load_tiny, random_ids, tmp_path, targets):
    ids = random_ids(2, 20)
    adapted, _ = trained(load_tiny(), ids, targets)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, **BOUND)
        merged.save_pretrained(tmp_path)
        loaded, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, **BOUND)


@pytest.mark.parametrize("targets", [TARGETS["latent expansion"], TARGETS["attention"]], ids=["kv_b_proj", "attention"])
@torch.no_grad()
def test_cached_decoding_goes_through_the_adapter_of_kv_b_proj(load_tiny, random_ids, targets):
    # One token over a cache attends in latent space with kv_b_proj.weight itself, which the adapter is not part of.
    ids = random_ids(2, 20)
    with torch.enable_grad():
        adapted, _ = trained(load_tiny(), ids, targets)
    full = adapted(input_ids=ids).logits
    cache = adapted(input_ids=ids[:, :17]).past_key_values
    steps = [adapted(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(17, 20)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full[:, 17:], **BOUND)
    with adapted.disable_adapter():
        plain = adapted(input_ids=ids).logits
    assert (plain - full)[:, 17:].norm() > 0.01 * full[:, 17:].norm()  # ignoring the adapter would have failed above


@torch.no_grad()
def test_generation_with_an_adapter_equals_generation_with_merged_weights(load_tiny, random_ids):
    ids = random_ids(1, 8)
    with torch.enable_grad():
        adapted, _ = trained(load_tiny(), ids, TARGETS["attention"])
    options = {"max_new_tokens": 12, "do_sample": False}
    tokens = adapted.generate(input_ids=ids, **options)
    assert torch.equal(adapted.merge_and_unload().generate(ids, **options), tokens)


# Quantisation. int8 keeps 7 bits and a sign per weight, 0.4% of the largest of its row: through 8 projections and the
# routing of a random tiny model that makes 15% of the logits here; a layer whose weights were lost costs 100%.
QUANTISED_BOUND = 0.3


def check_quantised(model: nn.Module, reference: nn.Module, ids: torch.Tensor, cached_bound: float) -> torch.Tensor:
    """Logits of a quantised model, close to the reference and, within `cached_bound`, the same through a cache."""
    with torch.no_grad():
        logits, expected = model(ids).logits.float(), reference(ids).logits
        assert 0 < (logits - expected).norm() <= QUANTISED_BOUND * expected.norm()
        cache = model(ids[:, :-1]).past_key_values
        step = model(ids[:, -1:], past_key_values=cache).logits[:, 0].float()
        assert (step - logits[:, -1]).norm() <= cached_bound * logits[:, -1].norm()
    return logits


def assert_quantised_where_expected(model: nn.Module, kind: type) -> None:
    attention, moe = model.model.layers[-1].self_attn, model.model.layers[-1].block_sparse_moe
    assert isinstance(attention.kv_b_proj.weight, kind) and isinstance(moe.shared_experts.up_proj.weight, kind)
    assert moe.gate.weight.dtype == torch.float32  # the router and the gate stay as they are
    assert model.model.layers[0].self_attn.A_log.dtype == torch.float32


def test_torchao_int8_weights(load_tiny, shared_tiny, random_ids, tmp_path):
    torchao = pytest.importorskip("torchao", reason="needs torchao, which is no dependency")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = load_tiny(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert_quantised_where_expected(model, torchao.utils.TorchAOBaseTensor)
    ids = random_ids(2, 20)
    logits = check_quantised(model, shared_tiny(), ids, cached_bound=1e-4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(KimiLinearForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, logits)


def test_bitsandbytes_int8_weights(load_tiny, shared_tiny, random_ids, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is no dependency")
    from transformers import BitsAndBytesConfig

    model = load_tiny(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert_quantised_where_expected(model, bitsandbytes.nn.Int8Params)
    ids = random_ids(2, 20)
    # Its activations are int8 too: where a sum comes out another way, one of 127 levels goes up or down.
    logits = check_quantised(model, shared_tiny(), ids, cached_bound=0.02)
    model.save_pretrained(tmp_path)
    # The serialised checkpoint brings a converter for every `weight`, which must not swallow the experts.
    again, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits.float(), logits, **BOUND)
