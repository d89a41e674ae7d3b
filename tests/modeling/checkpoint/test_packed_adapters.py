"""LoRA on packed experts, through PEFT's `target_parameters`: the same as over the dequantised model."""

import pytest
import torch
from packed_weights import quantised_tensors, write_quantised

from kimi_linear.modeling.checkpoint.packed_modules import KimiPackedExperts
from kimi_linear.modeling.layers.moe import KimiExperts
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytest.importorskip("compressed_tensors", reason="its files are read by transformers with it (in the dev extra)")
peft = pytest.importorskip("peft", minversion="0.18", reason="adapters need peft (in the dev extra)")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def load(tmp_path):
    """A tiny quantised model in fp32, packed or dequantised."""
    write_quantised(tmp_path / "w4", "w4a16 g32", quantised_tensors("w4a16 g32")[0])

    def make(dense: bool = False, dtype: torch.dtype = torch.float32) -> KimiLinearForCausalLM:
        model = KimiLinearForCausalLM.from_pretrained(
            tmp_path / "w4", dtype=dtype, quantization_config=_dequantised() if dense else None
        )
        return model.eval()

    return make


def _dequantised():
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(run_compressed=False)


def adapted(model, **fields):
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **targets, **fields))


def losses(model, ids, steps: int) -> list[float]:
    trainable = [x for x in model.parameters() if x.requires_grad]
    optimiser, found = torch.optim.AdamW(trainable, lr=0.02), []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(x.grad is not None for x in trainable)
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


def base_experts(model) -> KimiPackedExperts:
    return model.get_base_model().model.layers[1].block_sparse_moe.experts.get_base_layer()


def test_twenty_steps_equal_those_over_the_dequantised_model(load, random_ids, tmp_path):
    ids = random_ids(2, 12)
    packed, dense = adapted(load()), adapted(load(dense=True))
    assert type(base_experts(packed)) is KimiPackedExperts and type(base_experts(dense)) is KimiExperts
    before = {name: x.clone() for name, x in base_experts(packed).state_dict().items()}
    found, expected = losses(packed, ids, 20), losses(dense, ids, 20)
    # fp32 losses of order 5, and AdamW's steps, which a gradient of rounding errors alone would turn round.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=5e-4, rtol=0)
    assert found[-1] < 0.8 * found[0]
    assert all(torch.equal(before[name], x) for name, x in base_experts(packed).state_dict().items())
    # What is saved over packed weights is read over dense ones, and the other way round.
    packed.save_pretrained(tmp_path / "adapter")
    again, over_dense = (
        peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval() for model in (load(), load(dense=True))
    )
    with torch.no_grad():
        logits = packed.eval()(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, logits)
        torch.testing.assert_close(over_dense(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)
        with packed.disable_adapter():
            plain = packed(input_ids=ids).logits
        assert torch.equal(plain, load()(ids).logits)
        assert (plain - logits).norm() > 0.05 * plain.norm()


def test_several_adapters_and_autocast(load, random_ids):
    """Two active adapters add up; under autocast the products are in bf16, as those of the dense experts are."""
    ids = random_ids(2, 6)
    packed, dense = adapted(load()), adapted(load(dense=True))
    for model in (packed, dense):
        torch.manual_seed(1)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS))
        for name, x in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(x, std=0.1)
        model.base_model.set_adapter(["default", "second"])
        model.eval()
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        torch.testing.assert_close(packed(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            difference = packed(input_ids=ids).logits - expected
        assert difference.norm() < 0.05 * expected.norm()  # some dozen roundings of 2^-9, one after the other
        with packed.disable_adapter():
            assert (packed(input_ids=ids).logits - expected).norm() > 0.2 * expected.norm()


def test_no_dense_weight_is_kept_for_the_backward(load, random_ids):
    """What autograd keeps of an expert: its inputs and the factors, no tile, and nothing of a stack's size."""
    model, kept = adapted(load()), []
    experts = base_experts(model)
    rows, columns = experts.intermediate_dim, experts.hidden_dim
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x):
        model.train()(input_ids=random_ids(1, 3), labels=random_ids(1, 3))
    assert not {(rows, columns), (columns, rows), (2 * rows, columns)} & set(kept)
    factors = experts.num_experts * 4 * max(2 * rows, columns)
    assert max(torch.Size(shape).numel() for shape in kept if len(shape) == 3) <= factors
    names = [name for name, _ in experts.named_parameters()]
    assert names == ["gate_up_proj_packed", "down_proj_packed"]  # the search for targets alone sees more


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(load, safe):
    model = adapted(load())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"cannot be merged .*dequantize=True"):
            merge(safe_merge=safe)
    assert type(model.unload().model.layers[1].block_sparse_moe.experts) is KimiPackedExperts


def test_what_would_do_nothing_is_refused(load, random_ids):
    targets = [f"{name}_packed" for name in EXPERTS]
    model = peft.get_peft_model(load(), peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    with pytest.raises(ValueError, match=r"adapter is on 'down_proj_packed' of packed experts.*experts.gate_up_proj"):
        model(input_ids=random_ids(1, 4))
    model = adapted(load()).eval()
    with pytest.raises(ValueError, match="one adapter for a batch"):
        model(input_ids=random_ids(2, 4), adapter_names=["default", "__base__"])


def test_layers_of_the_checkpoint_keep_their_dtypes_for_kbit_training(load, random_ids):
    model = adapted(peft.prepare_model_for_kbit_training(load(dtype=torch.bfloat16)))
    experts = base_experts(model)
    assert experts.gate_up_proj_packed.dtype == torch.int32 and experts.gate_up_proj_scale.dtype == torch.bfloat16
    found = losses(model, random_ids(2, 6), 4)
    assert found[-1] < found[0]
