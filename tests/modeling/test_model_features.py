"""What transformers' users expect of a model class beyond parity: outputs, implementations, training, dtypes.

fp32 unless a test says otherwise; two ways to the same logits (order 1) differ in the order of sums: 1e-4 absolute.
"""

import math
import shutil

import pytest
import torch
from comparisons import assert_same_gradients, assert_same_logits, gradients_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.layers.kda_attention import KimiDeltaAttention, ShortConvolution
from kimi_linear.modeling.layers.moe import KimiTopkRouter
from kimi_linear.modeling.layers.norms import KimiRMSNorm
from kimi_linear.modeling.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearModel,
)

# Outputs


@pytest.mark.parametrize("cached", [0, 9], ids=["prompt", "continued"])
@torch.no_grad()
def test_eager_attention_returns_the_weights_of_mla_layers(cached, load_tiny, random_ids):
    model, ids = load_tiny("interleaved", attn_implementation="eager"), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = model(ids[:, :cached], attention_mask=mask[:, :cached]).past_key_values if cached else None
    outputs = model(ids[:, cached:], attention_mask=mask, past_key_values=cache, output_attentions=True)
    assert len(outputs.attentions) == 2  # layers 2 and 4 of five
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, 12 - cached, 12)
        valid = weights[:, :, 3:] if not cached else weights  # rows of padding mean nothing
        torch.testing.assert_close(valid.sum(-1), torch.ones(valid.shape[:-1]))
        assert (valid[0, ..., :3] == 0).all(), "padding is attended to"
        future = torch.ones(12, 12, dtype=torch.bool).triu(1)[-valid.shape[2] :]
        assert (valid.masked_select(future) == 0).all(), "the future is attended to"


@torch.no_grad()
def test_hidden_states_and_router_logits_come_one_per_layer(model, random_ids):
    ids = random_ids(2, 6)
    outputs = model(ids, output_hidden_states=True, output_router_logits=True)
    assert len(outputs.hidden_states) == 5
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
    assert_same_logits(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(12, 8)] * 3
    assert model(ids).router_logits is None
    assert model(ids).hidden_states is None
    as_tuple = model(ids, return_dict=False)
    assert_same_logits(as_tuple[0], outputs.logits)


@torch.no_grad()
def test_logits_to_keep_takes_the_last_or_the_named_positions(model, random_ids):
    ids = random_ids(2, 10)
    whole = model(ids).logits
    assert_same_logits(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    assert_same_logits(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    assert_same_logits(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, whole[:, [0, 7]])


@torch.no_grad()
def test_inputs_embeds_stand_for_input_ids(model, random_ids):
    ids = random_ids(2, 10)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**wrong)


@torch.no_grad()
def test_labels_are_shifted_and_minus_100_is_left_out(model, random_ids):
    ids = random_ids(2, 10)
    labels = ids.clone()
    labels[0, :6] = labels[1, 3] = -100
    outputs = model(ids, labels=labels)
    targets = labels[:, 1:].flatten()
    logits = outputs.logits[:, :-1].flatten(0, 1)[targets != -100]
    expected = -logits.log_softmax(-1).gather(1, targets[targets != -100, None]).mean()
    torch.testing.assert_close(outputs.loss, expected)


@torch.no_grad()
def test_use_cache_false_returns_none(model, random_ids):
    outputs = model(random_ids(2, 10), use_cache=False)
    assert outputs.past_key_values is None
    assert_same_logits(outputs.logits, model(random_ids(2, 10)).logits)


# Interchangeable implementations


@torch.no_grad()
def test_sdpa_agrees_with_eager(load_tiny, random_ids):
    models = [load_tiny("hybrid", attn_implementation=name) for name in ("eager", "sdpa")]
    ids = random_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 20:] = 0, 0
    valid, caches = mask.bool(), [None, None]
    for start, end in ((0, 18), (18, 19), (19, 24)):
        outputs = [
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            for model, cache in zip(models, caches)
        ]
        caches = [output.past_key_values for output in outputs]
        assert_same_logits(*(output.logits[valid[:, start:end]] for output in outputs))


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention on a CPU is compiled with g++")
@torch.no_grad()
def test_flex_attention_agrees_with_eager(load_tiny, random_ids):
    """One shape only: torch 2.13's C++ for flex attention with dynamic shapes does not compile."""
    eager, flex = (load_tiny("hybrid", attn_implementation=name) for name in ("eager", "flex_attention"))
    ids = random_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 20:] = 0, 0
    valid = mask.bool()
    torch._dynamo.reset()
    logits = flex(ids, attention_mask=mask).logits
    assert_same_logits(logits[valid], eager(ids, attention_mask=mask).logits[valid])


def test_grouped_experts_are_the_default(model):
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree_with_eager(implementation, load_tiny, random_ids):
    assert implementation in ALL_EXPERTS_FUNCTIONS
    ids = random_ids(2, 24)
    results = []
    for name in ("eager", implementation):
        model = load_tiny("hybrid", experts_implementation=name)
        assert model.config._experts_implementation == name
        outputs = model(ids, labels=ids)
        results.append((outputs.logits, gradients_of(model, outputs.loss)))
    assert_same_logits(results[1][0], results[0][0])
    assert_same_gradients(results[1][1], results[0][1])


# Training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(reentrant, load_tiny, random_ids):
    model, ids = load_tiny("hybrid").train(), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    plain = gradients_of(model, model(ids, attention_mask=mask, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # the reentrant form needs an input with a gradient
    outputs = model(ids, attention_mask=mask, labels=ids)
    assert_same_gradients(gradients_of(model, outputs.loss), plain)


def test_sequence_classification_trains_and_reads_the_last_valid_token(load_tiny, random_ids):
    model = load_tiny("hybrid", KimiLinearForSequenceClassification, num_labels=3)
    assert isinstance(model.model, KimiLinearModel)
    ids, labels = random_ids(3, 12), torch.tensor([0, 2, 1])
    padded = torch.cat([ids, torch.full((3, 4), 127)], dim=1)
    mask = (padded != 127).long()
    outputs = model(padded, attention_mask=mask, labels=labels)
    assert outputs.logits.shape == (3, 3)
    assert_same_logits(outputs.logits, model(ids).logits)
    assert_same_logits(model(padded.flip(1).roll(0), attention_mask=mask.flip(1)).logits, model(ids.flip(1)).logits)

    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs.loss.backward()
    optimiser.step()
    assert model(padded, attention_mask=mask, labels=labels).loss < outputs.loss


def test_new_weights_follow_the_stated_distributions():
    config = KimiLinearConfig(
        vocab_size=128,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        moe_intermediate_size=64,
        kv_lora_rank=32,
        num_experts=8,
        initializer_range=0.05,
        pad_token_id=127,
        linear_attn_config={"kda_layers": [1], "full_attn_layers": [2], "num_heads": 64, "head_dim": 16},
    )
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config)
    kda = next(module for module in model.modules() if isinstance(module, KimiDeltaAttention))
    rates, steps = kda.A_log.exp(), nn.functional.softplus(kda.dt_bias)
    assert rates.min() >= 1
    assert rates.max() <= 16
    assert abs(rates.mean() - 8.5) < 2  # 64 draws of a uniform with deviation 4.3
    assert steps.min() >= 1e-3 * (1 - 1e-3)
    assert steps.max() <= 1e-1 * (1 + 1e-3)
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.2  # 1024 draws of a uniform with deviation 1.3
    for module in model.modules():
        if isinstance(module, ShortConvolution):
            assert 0.45 < module.weight.abs().max() <= 0.5  # 4 taps: 4 ** -0.5
        elif isinstance(module, KimiRMSNorm):
            assert (module.weight == 1).all()
        elif isinstance(module, KimiTopkRouter):
            assert (module.e_score_correction_bias == 0).all()
            assert 0.045 < module.weight.std() < 0.055
        elif isinstance(module, nn.Linear):
            assert module.bias is None
            assert 0.045 < module.weight.std() < 0.055
    experts = model.model.layers[1].block_sparse_moe.experts
    assert 0.045 < experts.gate_up_proj.std() < 0.055
    assert 0.045 < experts.down_proj.std() < 0.055
    assert (model.model.embed_tokens.weight[127] == 0).all()  # the padding row
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_correction_biases_balance_the_load_and_are_saved(dtype, load_tiny, tiny_folder, random_ids, tmp_path):
    model = load_tiny("hybrid", dtype=dtype).train()
    router, ids = model.model.layers[1].block_sparse_moe.gate, random_ids(4, 64)
    before = router.e_score_correction_bias.float().clone()

    def imbalance():
        router.tokens_per_expert = None
        model(ids)
        counts = router.tokens_per_expert.float()
        assert counts.sum() == ids.numel() * router.top_k
        return counts, counts.max() / counts.mean()

    counts, at_first = imbalance()
    model.update_correction_biases(1e-3)
    moved = router.e_score_correction_bias - before
    torch.testing.assert_close(moved, 1e-3 * (counts.mean() - counts).sign(), atol=1e-7, rtol=0)
    assert router.tokens_per_expert is None
    for _ in range(30):
        model(ids)
        model.update_correction_biases(1e-2)
    assert imbalance()[1] < 0.7 * at_first

    final = router.e_score_correction_bias.clone()
    assert final.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.model.layers[1].block_sparse_moe.gate.e_score_correction_bias, final)


def test_correction_biases_stay_without_training(load_tiny, random_ids):
    model = load_tiny("hybrid")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(random_ids(2, 8))
    model.update_correction_biases()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# dtypes


def assert_only_gate_parameters_are_fp32(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        kept = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if kept else dtype), name


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_models_keep_the_gate_in_fp32(dtype, tiny_folder, random_ids):
    folder = tiny_folder("hybrid", torch.bfloat16)
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    exact = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    half = torch.bfloat16 if dtype == "auto" else dtype
    assert model.dtype == half
    assert_only_gate_parameters_are_fp32(model, half)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            assert torch.equal(parameter, exact.get_parameter(name)), f"{name} was rounded on the way"

    ids = random_ids(2, 24)
    outputs, expected = model(ids), exact(ids).logits
    assert outputs.logits.dtype == half
    # The four layers round some 40 times to 8 (bf16) or 11 (fp16) bits; an expert chosen otherwise costs more, so the
    # bound is on the mean: 10 roundings' worth.
    assert (outputs.logits.float() - expected).abs().mean() <= 10 * torch.finfo(half).eps * expected.abs().mean()
    decoded = model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values).logits
    assert (decoded.float() - expected[:, -1:]).abs().mean() <= 10 * torch.finfo(half).eps * expected.abs().mean()


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16], ids=str)
def test_gate_is_fp32_even_if_the_checkpoint_holds_it_in_bf16(dtype, tiny_folder, tmp_path):
    """transformers' native class saves such files."""
    folder = tmp_path / "saved"
    shutil.copytree(tiny_folder("hybrid", torch.bfloat16), folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    assert_only_gate_parameters_are_fp32(KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_from_config_keep_the_gate_in_fp32(dtype, tiny_folder):
    config = KimiLinearConfig.from_pretrained(tiny_folder("hybrid"))
    default = torch.get_default_dtype()
    assert_only_gate_parameters_are_fp32(KimiLinearForCausalLM._from_config(config, dtype=dtype), dtype)
    config.dtype = dtype
    assert_only_gate_parameters_are_fp32(KimiLinearForCausalLM._from_config(config), dtype)
    assert torch.get_default_dtype() == default


# Wrong input


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, 128]]), r"token 128, outside the vocabulary \[0, 128\)"),
        (torch.tensor([[3, -1]]), "token -1"),
        (torch.tensor([3, 4]), r"\[batch, tokens\]"),
        (torch.tensor([[0.5, 1.0]]), "integers"),
    ],
    ids=["too_large", "negative", "one_dimension", "floats"],
)
def test_wrong_token_ids_are_refused(ids, message, model):
    with pytest.raises(ValueError, match=message):
        model(ids)


@pytest.mark.parametrize("shape", [(2, 9), (2, 11), (3, 10), (10,), (2, 1, 10)], ids=str)
def test_masks_of_another_shape_are_refused(shape, model, random_ids):
    with pytest.raises(ValueError, match="attention_mask"):
        model(random_ids(2, 10), attention_mask=torch.ones(shape, dtype=torch.long))


@torch.no_grad()
def test_masks_must_cover_the_cached_tokens(model, random_ids):
    ids = random_ids(2, 10)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="10 cached tokens and 1 new"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 10
