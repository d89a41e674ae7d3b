"""bitsandbytes and torchao configs: the experts are packed while loading, trained over, saved and loaded again."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from kimi_linear.modeling.checkpoint import packing_on_load
from kimi_linear.modeling.checkpoint.packed_modules import KimiPackedExperts
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is no dependency")
pytest.importorskip("torchao", reason="needs torchao, which is no dependency")


def torchao(name: str):
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)())


CONFIGS = {
    "bitsandbytes 8-bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), "int8"),
    "torchao int8": (lambda: torchao("Int8WeightOnlyConfig"), "int8"),
    "torchao fp8": (lambda: torchao("Float8WeightOnlyConfig"), "float8"),
}
# Logits of a random tiny model, as in test_adapters_and_quantization: int8 costs 15%, lost weights 100%.
QUANTISED_BOUND = 0.3


def experts_of(model):
    return model.model.layers[-1].block_sparse_moe.experts


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_experts_are_packed_in_the_same_width_and_reload(load_tiny, shared_tiny, random_ids, tmp_path, name):
    make, kind = CONFIGS[name]
    model, ids = load_tiny(quantization_config=make()), random_ids(2, 9)
    experts = experts_of(model)
    assert isinstance(experts, KimiPackedExperts) and kind in str(experts.gate_up_proj_packed.dtype)
    logits, expected = model(ids).logits.float(), shared_tiny()(ids).logits
    assert 0 < (logits - expected).norm() <= QUANTISED_BOUND * expected.norm()
    model.save_pretrained(tmp_path)
    again = KimiLinearForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(x, y) for x, y in zip(experts_of(again).buffers(), experts.buffers()))
    assert experts_of(again).down_proj_packed.view(torch.uint8).equal(experts.down_proj_packed.view(torch.uint8))
    torch.testing.assert_close(again(ids).logits.float(), logits, atol=1e-4, rtol=1e-4)
    names = load_file(tmp_path / "model.safetensors") if name.startswith("bits") else {}
    assert not names or "model.layers.3.block_sparse_moe.experts.0.w1.weight_scale" in names


def test_off_by_an_argument_and_by_the_library_s_own(load_tiny, tmp_path):
    model = load_tiny(quantization_config=CONFIGS["bitsandbytes 8-bit"][0](), packed_experts=False)
    assert experts_of(model).gate_up_proj.dtype.is_floating_point
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["packed_experts"] is False
    skipping = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["experts", "lm_head"])
    assert experts_of(load_tiny(quantization_config=skipping)).gate_up_proj.dtype.is_floating_point


def test_said_in_one_line(load_tiny, monkeypatch):
    said = []
    monkeypatch.setattr(packing_on_load.logger, "warning_once", said.append)
    load_tiny(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    (line,) = set(said)
    assert "int-quantized int8, channel" in line and "packed_experts=False" in line


def test_a_form_of_its_own(load_tiny, shared_tiny, random_ids, tmp_path):
    group = {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int", "group_size": 16}}
    model, ids = load_tiny(packed_experts=group), random_ids(2, 9)
    experts = experts_of(model)
    assert experts.down_proj_scale.shape == (8, 64, 2)
    with torch.no_grad():
        logits, expected = model(ids).logits, shared_tiny()(ids).logits
        assert 0 < (logits - expected).norm() <= 2 * QUANTISED_BOUND * expected.norm()
        model.save_pretrained(tmp_path)
        assert torch.equal(KimiLinearForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, logits)
    with pytest.raises(ValueError, match="packed_experts='int4' must be"):
        load_tiny(packed_experts="int4")


def test_qlora_trains_and_keeps_the_experts_packed(load_tiny, random_ids):
    peft = pytest.importorskip("peft")
    model = load_tiny(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    before = {name: x.clone() for name, x in experts_of(model).state_dict().items()}
    model = peft.prepare_model_for_kbit_training(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"])).train()
    trainable = [x for x in adapted.parameters() if x.requires_grad]
    optimiser, losses, ids = torch.optim.AdamW(trainable, lr=0.05), [], random_ids(2, 9)
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(x.grad is not None for x in trainable)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = experts_of(adapted.get_base_model()).state_dict()
    assert all((after[name].dtype, after[name].shape) == (x.dtype, x.shape) for name, x in before.items())


@torch.no_grad()
def test_four_bits(load_tiny, shared_tiny, random_ids, tmp_path):
    # bitsandbytes' CPU kernel wants rows that 32 divides and columns that 64 divides.
    odd = ["lm_head", "b_proj", "kv_a_proj_with_mqa", "mlp", "shared_experts.down_proj", "f_a_proj", "g_a_proj"]
    odd += ["down_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=odd)
    model, ids = load_tiny(quantization_config=config), random_ids(2, 9)
    experts = experts_of(model)
    assert experts.gate_up_proj_packed.dtype == torch.int32 and experts.gate_up_proj_scale.shape == (8, 64, 2)
    model.save_pretrained(tmp_path)
    logits, expected = model(ids).logits.float(), shared_tiny()(ids).logits
    assert 0 < (logits - expected).norm() <= 3 * QUANTISED_BOUND * expected.norm()
    again = KimiLinearForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits.float(), logits, atol=1e-4, rtol=1e-4)
    layer = model.model.layers[0].self_attn.q_proj
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):  # only with AVX512 bf16
        with pytest.raises(NotImplementedError, match="save the model before its first forward"):
            model.save_pretrained(tmp_path / "late")
