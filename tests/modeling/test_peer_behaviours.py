"""What transformers' own ModelTesterMixin asks of a model, as far as no other test here asks it.

tests/PEER_TESTS.md goes through the mixins one by one and says which test of ours stands for which of theirs.
"""

import copy
import logging

import pytest
import torch
from tiny_checkpoints import TINY_CONFIGS
from torch import nn

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearModel,
)

CLASSES = [KimiLinearModel, KimiLinearForCausalLM, KimiLinearForSequenceClassification]


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@pytest.fixture
def config():
    return KimiLinearConfig(**TINY_CONFIGS["hybrid"])


def trainable_parts(loss: torch.Tensor, model: nn.Module) -> set[str]:
    loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


# Outputs


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_flags_in_the_config_ask_for_outputs_and_arguments_win(model_class, config, random_ids):
    ids = random_ids(2, 6)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    fields = ("hidden_states", "attentions", "router_logits")
    plain = model(ids)
    assert all(plain.get(field) is None for field in fields)
    for field in fields:
        setattr(model.config, f"output_{field}", True)
    asked = model(ids)
    lengths = {"hidden_states": 5, "attentions": 2, "router_logits": 3}
    if model_class is KimiLinearForSequenceClassification:  # whose output has no field for router logits
        lengths.pop("router_logits")
    assert {field: len(asked[field]) for field in lengths} == lengths
    refused = model(ids, output_hidden_states=False, output_attentions=False, output_router_logits=False)
    assert all(refused.get(field) is None for field in fields)
    close(asked[0], plain[0])


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_tuples_hold_the_fields_in_order(model_class, config, random_ids):
    model = model_class._from_config(config, attn_implementation="eager").eval()
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    named = model(random_ids(2, 6), **options)
    listed = model(random_ids(2, 6), **options, return_dict=False)
    first = "last_hidden_state" if model_class is KimiLinearModel else "logits"
    assert list(named) == [first, "hidden_states", "attentions"]
    assert len(named.to_tuple()) == len(listed)
    for expected, got in zip(named.to_tuple(), listed):
        if isinstance(expected, tuple):
            assert len(expected) == len(got)
            [close(x, y) for x, y in zip(expected, got)]
        else:
            close(got, expected)


def test_gradients_of_hidden_states_and_attentions_can_be_kept(config, random_ids):
    model = KimiLinearForCausalLM._from_config(config, attn_implementation="eager")
    outputs = model(random_ids(2, 6), output_hidden_states=True, output_attentions=True, use_cache=False)
    kept = [*outputs.hidden_states, *outputs.attentions]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits.flatten()[0].backward()
    assert all(tensor.grad is not None for tensor in kept)


@torch.no_grad()
def test_forwards_repeat_to_the_bit_and_rows_do_not_depend_on_the_batch(model, random_ids):
    ids = random_ids(3, 11)
    first = model(ids, output_hidden_states=True, use_cache=False)
    second = model(ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(first.logits, second.logits)
    for row in range(3):
        alone = model(ids[row : row + 1], output_hidden_states=True, use_cache=False)
        for whole, one in zip((*first.hidden_states, first.logits), (*alone.hidden_states, alone.logits)):
            close(whole[row : row + 1], one, atol=1e-4)


@torch.no_grad()
def test_positions_mean_nothing_beyond_packing(model, random_ids):
    ids = random_ids(2, 9)
    positions = torch.arange(9).expand(2, -1)
    assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)
    assert torch.equal(model(ids, position_ids=positions + 100).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_sdpa_agrees_with_eager_in_half_precision(dtype, side, load_tiny, random_ids):
    """Each rounds its own way: the median logit, near 1, may differ by 16 units in the last place.

    The median, because rounding may make a router choose another expert, which moves all logits of a token.
    """
    ids = random_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if side == "left" else slice(11, 16)] = 0
    logits = [
        load_tiny(dtype=dtype, attn_implementation=name)(ids, attention_mask=mask).logits[mask.bool()].float()
        for name in ("eager", "sdpa")
    ]
    assert logits[0].isfinite().all()
    assert (logits[0] - logits[1]).abs().median() < 16 * torch.finfo(dtype).eps


@torch.no_grad()
def test_the_attention_implementation_can_be_changed(load_tiny, random_ids):
    model, ids = load_tiny(), random_ids(2, 9)
    expected = model(ids).logits
    assert not model(ids, output_attentions=True).attentions, "sdpa has no weights to return"
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True)
    assert len(outputs.attentions) == 2
    close(outputs.logits, expected)
    model.config._attn_implementation = "sdpa"
    close(model(ids).logits, expected)
    with pytest.raises(ValueError, match="bogus"):
        model.set_attn_implementation("bogus")


@torch.no_grad()
def test_a_4d_mask_is_what_mla_layers_see(shared_tiny, random_ids):
    """Additive or boolean, over a prompt and over a continuation."""
    model, ids = shared_tiny("all_mla"), random_ids(2, 12)
    expected = model(ids).logits
    allowed = torch.ones(12, 12).tril().bool().expand(2, 1, 12, 12)
    additive = torch.zeros(2, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        close(model(ids, attention_mask=mask).logits, expected, atol=1e-4)
        cache = model(ids[:, :7], attention_mask=mask[:, :, :7, :7]).past_key_values
        continued = model(ids[:, 7:], attention_mask=mask[:, :, 7:], past_key_values=cache).logits
        close(continued, expected[:, 7:], atol=1e-4)


# Training


def test_labels_that_are_shifted_already(model, random_ids):
    """What trainers with sequence parallelism pass beside the labels."""
    ids = random_ids(2, 10)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
        close(model(ids, labels=ids, shift_labels=shifted).loss, expected)
        shifted[:, 4:] = -100
        assert (model(ids, labels=ids, shift_labels=shifted).loss - expected).abs() > 1e-3


PROBLEMS = {
    "single_label_classification": torch.tensor([2, 0]),
    "multi_label_classification": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    "regression": torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_problem_types_of_the_classifier(kind, config, random_ids):
    config.num_labels, config.problem_type = 3, kind
    model, labels = KimiLinearForSequenceClassification(config), PROBLEMS[kind]
    outputs = model(random_ids(2, 6), labels=labels)
    assert outputs.logits.shape == (2, 3)
    losses = {
        "single_label_classification": nn.functional.cross_entropy,
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": nn.functional.mse_loss,
    }
    close(outputs.loss, losses[kind](outputs.logits, labels))
    assert "score.weight" in trainable_parts(outputs.loss, model)


def test_gradient_checkpointing_switches_on_and_off(config, random_ids):
    model, ids = KimiLinearForCausalLM(config).train(), random_ids(2, 6)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    on = trainable_parts(model(ids, labels=ids).loss, model)
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    model.zero_grad()
    assert on == trainable_parts(model(ids, labels=ids).loss, model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_through_a_frozen_model(checkpointing, config, random_ids):
    """As adapters need it: the embedding's output asks for gradients although no weight does."""
    model = KimiLinearForCausalLM(config).train()
    model.requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = random_ids(2, 6)
    assert trainable_parts(model(ids, labels=ids).loss, model) == {"model.layers.0.input_layernorm.weight"}
    model.disable_input_require_grads()


def test_a_batch_can_be_learnt_by_heart(config, random_ids):
    torch.manual_seed(0)
    model, ids = KimiLinearForCausalLM(config).train(), random_ids(2, 12)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert loss < 0.05
    generated = model.eval().generate(ids[:, :3], max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, ids)


# Embeddings


def test_embeddings_can_be_read_and_replaced(config, random_ids):
    model = KimiLinearForCausalLM(config)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    model.set_input_embeddings(table := nn.Embedding(10, config.hidden_size))
    assert model.model.embed_tokens is table
    model.set_output_embeddings(head := nn.Linear(config.hidden_size, 10, bias=False))
    assert model.lm_head is head


@pytest.mark.parametrize("size", [140, 100])
@torch.no_grad()
def test_the_vocabulary_can_be_resized(size, load_tiny, tmp_path, random_ids):
    model, ids = load_tiny(), random_ids(2, 6).clamp_max(99)
    model.config.pad_token_id = 0
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.vocab_size == size
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (size, 64)
    kept = min(size, 128)
    close(model(ids).logits[..., :kept], before[..., :kept])
    last = torch.full((1, 2), size - 1)
    assert model(last).logits.isfinite().all()
    with pytest.raises(ValueError, match=rf"token {size}"):
        model(last + 1)
    model.save_pretrained(tmp_path)
    close(KimiLinearForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_tied_embeddings_are_one_tensor(config, random_ids, tmp_path):
    """The released checkpoints tie nothing; who asks for it gets it."""
    config.tie_word_embeddings = True
    model = KimiLinearForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    close(again(random_ids(2, 6)).logits, model(random_ids(2, 6)).logits)
    untied = KimiLinearForCausalLM(KimiLinearConfig(**TINY_CONFIGS["hybrid"]))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# Loading


def test_weights_can_be_given_as_a_dictionary(config, load_tiny, random_ids):
    source = load_tiny()
    given = KimiLinearForCausalLM.from_pretrained(None, config=config, state_dict=source.state_dict())
    with torch.no_grad():
        close(given(random_ids(2, 6)).logits, source(random_ids(2, 6)).logits)


@pytest.mark.parametrize("model_class", CLASSES)
def test_state_dicts_survive_torch_save(model_class, config, tmp_path):
    model = model_class(config)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = model_class(copy.deepcopy(config))
    other.load_state_dict(torch.load(tmp_path / "weights.pt"), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_loaded_weights_are_contiguous(load_tiny):
    assert all(parameter.is_contiguous() for parameter in load_tiny().parameters())


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_weight_that_is_missing_is_initialised(model_class, config):
    """With no weights at all the loader starts from the meta device, where nothing has a value."""
    model = model_class.from_pretrained(None, config=config, state_dict={})
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu", name
        assert tensor.isfinite().all(), name
        assert tensor.std() > 0 or name.endswith(("norm.weight", "layernorm.weight", "correction_bias")), name
        assert tensor.abs().max() < 20, name


@pytest.mark.parametrize("model_class", CLASSES)
def test_no_tensor_hides_from_the_state_dict(model_class, config):
    """Attributes that are tensors but neither parameters nor buffers would stay behind when the model moves."""
    for name, module in model_class(config).named_modules():
        hidden = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not hidden, f"{name}: {hidden}"


def test_the_language_model_loads_from_the_decoder_s_folder(load_tiny, tmp_path, caplog):
    decoder = load_tiny(model_class=KimiLinearModel)
    decoder.save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    model, report = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    assert not report["unexpected_keys"]
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


def test_weights_of_another_size_are_refused_or_on_request_left_out(tiny_folder, random_ids):
    folder = tiny_folder("hybrid")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        KimiLinearForCausalLM.from_pretrained(folder, vocab_size=140)
    model = KimiLinearForCausalLM.from_pretrained(folder, vocab_size=140, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (140, 64)
    assert model(random_ids(1, 4)).logits.isfinite().all()


def test_loading_under_a_device_context(tiny_folder):
    with torch.device("cpu"):
        assert KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid")).device.type == "cpu"
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"))


def test_older_names_of_arguments(tiny_folder):
    model = KimiLinearForCausalLM.from_pretrained(tiny_folder("hybrid"), torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert KimiLinearForCausalLM.main_input_name == "input_ids"


def test_class_attributes_name_what_the_model_has(config):
    """Names in plans and lists are patterns, and a typing error in one does nothing without a word."""
    model = KimiLinearForCausalLM(config)
    names = [name for name, _ in model.named_parameters()]
    for ending in model._keep_in_fp32_modules_strict:
        assert any(name.endswith(ending) for name in model.state_dict()), ending
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    assert getattr(model, model.base_model_prefix) is model.model
    found = names + [name for name, _ in model.named_modules()]
    patterns = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in found}
    # Loading a quantised file of another test, 5.10's quantiser writes Llama 4's names into the class's plan.
    assert {name for name in model.tp_plan if ".feed_forward." not in name} <= patterns
    assert {f"model.{pattern}" for pattern in config.base_model_ep_plan} <= patterns
