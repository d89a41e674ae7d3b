"""What a caller gets wrong is refused with the value seen and what to do, and the model works afterwards."""

from typing import Any

import pytest
import torch
from tiny_checkpoints import tiny_config
from transformers import BatchEncoding, DynamicCache, StaticCache

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM, KimiLinearForSequenceClassification
from kimi_linear.modeling.prompt import segments

BATCH, LENGTH = 2, 9


@pytest.fixture
def refused(model, random_ids):
    """Call the model with wrong arguments; it must raise a ValueError holding `parts`, and then work as before."""
    ids = random_ids(BATCH, LENGTH)
    with torch.no_grad():
        before = model(ids).logits

    def call(*parts: str, call=None, **arguments: Any) -> None:
        with torch.no_grad(), pytest.raises(ValueError) as error:
            (call or model)(**arguments)
        for part in parts:
            assert part in str(error.value)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)

    return call


# Tokens


@pytest.mark.parametrize("token", [-1, -100, 128, 163839])
@pytest.mark.parametrize("entry", ["forward", "generate"])
def test_token_outside_the_vocabulary(model, refused, token, entry):
    ids = torch.tensor([[1, 2, 3], [4, token, 6]])
    refused(f"token {token}", "[0, 128)", "tokenizer", call=getattr(model, entry), input_ids=ids)


def test_the_last_token_of_the_vocabulary_is_fine(model):
    assert model(torch.tensor([[0, 127]])).logits.isfinite().all()


@pytest.mark.parametrize(
    "ids, seen", [(torch.tensor([1, 2]), "[2] torch.int64"), (torch.tensor([[1.0]]), "[1, 1] torch.float32")]
)
def test_ids_of_wrong_rank_or_dtype(refused, ids, seen):
    refused("[batch, tokens] integers", seen, input_ids=ids)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_empty_input(refused, shape):
    ids = torch.zeros(shape, dtype=torch.long)
    refused("empty", f"{shape[0]} rows of {shape[1]} tokens", "at least one", input_ids=ids)
    refused("empty", f"{shape[0]} rows of {shape[1]} tokens", input_ids=ids, attention_mask=torch.ones(shape))


def test_both_or_neither_of_ids_and_embeddings(model, refused, random_ids):
    ids = random_ids(BATCH, LENGTH)
    refused("exactly one of input_ids and inputs_embeds", input_ids=ids, inputs_embeds=model.model.embed_tokens(ids))
    refused("exactly one of input_ids and inputs_embeds")


@pytest.mark.parametrize("shape", [(9, 64), (2, 9, 32)])
def test_embeddings_of_wrong_shape(refused, shape):
    refused("[batch, tokens, 64]", str(list(shape)), inputs_embeds=torch.zeros(shape))


# Masks and positions


@pytest.mark.parametrize("shape", [(BATCH, LENGTH + 1), (BATCH, LENGTH - 1), (1, LENGTH), (BATCH + 1, LENGTH)])
def test_mask_of_wrong_shape(refused, random_ids, shape):
    refused(
        f"attention_mask is {list(shape)}",
        f"must be {[BATCH, LENGTH]}",
        input_ids=random_ids(BATCH, LENGTH),
        attention_mask=torch.ones(shape),
    )


@pytest.mark.parametrize("shape", [(LENGTH,), (BATCH, LENGTH, LENGTH)])
def test_mask_of_wrong_rank(refused, random_ids, shape):
    refused(
        "[batch, tokens] or [batch, 1, new, all]",
        str(list(shape)),
        input_ids=random_ids(BATCH, LENGTH),
        attention_mask=torch.ones(shape),
    )


def test_mask_that_is_a_list(refused, random_ids):
    refused("tensor [batch, tokens]", "list", input_ids=random_ids(1, 2), attention_mask=[[1, 1]])


@pytest.mark.parametrize("shape", [(BATCH, 1, LENGTH, LENGTH - 1), (BATCH, 1, 1, LENGTH), (3, 1, LENGTH, LENGTH)])
def test_4d_mask_of_wrong_shape(refused, random_ids, shape):
    refused(str(list(shape)), input_ids=random_ids(BATCH, LENGTH), attention_mask=torch.ones(shape, dtype=torch.bool))


def test_mask_that_forgets_the_cached_tokens(model, refused, random_ids):
    ids = random_ids(BATCH, LENGTH)
    cache = model(ids).past_key_values
    refused(
        "attention_mask is [2, 1] but must be [2, 10]",
        "9 cached tokens and 1 new",
        input_ids=ids[:, :1],
        attention_mask=torch.ones(BATCH, 1),
        past_key_values=cache,
    )
    assert cache.get_seq_length() == LENGTH  # refused before anything was appended
    model(ids[:, :1], attention_mask=torch.ones(BATCH, LENGTH + 1), past_key_values=cache)


@pytest.mark.parametrize("shape", [(1, LENGTH - 1), (BATCH + 1, LENGTH), (LENGTH,)])
def test_positions_of_wrong_shape(refused, random_ids, shape):
    refused(
        f"position_ids are {list(shape)}",
        f"{[BATCH, LENGTH]}",
        input_ids=random_ids(BATCH, LENGTH),
        position_ids=torch.zeros(shape, dtype=torch.long),
    )


# Caches


def config_with(**changes: Any) -> KimiLinearConfig:
    linear = changes.pop("linear", {})
    config = tiny_config(**changes)
    config["linear_attn_config"].update(linear)
    return KimiLinearConfig(**config)


@pytest.mark.parametrize("cache", [((torch.zeros(1),),), [], {}, "dynamic"], ids=["tuple", "list", "dict", "string"])
def test_cache_that_is_no_cache(refused, random_ids, cache):
    refused(type(cache).__name__, "KimiLinearCache", input_ids=random_ids(BATCH, LENGTH), past_key_values=cache)


@pytest.mark.parametrize("make", [KimiLinearCache, lambda config: DynamicCache(config=config)], ids=["ours", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_cache_of_another_batch_size(model, refused, random_ids, make, rows):
    cache = make(model.config)
    model(random_ids(rows, 4), past_key_values=cache)
    refused(f"holds {rows} sequences", f"{BATCH} rows", input_ids=random_ids(BATCH, LENGTH), past_key_values=cache)


@pytest.mark.parametrize(
    "layers, part",
    [
        ({"kda_layers": (1, 3), "full_attn_layers": (2, 4)}, "KDA and MLA layers"),
        ({"kda_layers": (1,), "full_attn_layers": (2,)}, "has 2 layers and the model 4"),
        ({"kda_layers": (1, 2, 5), "full_attn_layers": (3, 4)}, "has 5 layers and the model 4"),
    ],
)
def test_empty_cache_of_another_config(refused, random_ids, layers, part):
    refused(part, input_ids=random_ids(BATCH, LENGTH), past_key_values=KimiLinearCache(config_with(**layers)))


def test_cache_made_without_a_config(refused, random_ids):
    refused("KimiLinearCache(model.config)", input_ids=random_ids(BATCH, LENGTH), past_key_values=DynamicCache())


@pytest.mark.parametrize("make", [KimiLinearCache, lambda config: DynamicCache(config=config)], ids=["ours", "dynamic"])
@pytest.mark.parametrize(
    "changes, held, wanted",
    [
        ({"kv_lora_rank": 16}, "16]", "32]"),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 16}, "24]", "32]"),  # rows of the same total width
        ({"linear": {"num_heads": 2}}, "[2, 16, 16]", "[4, 16, 16]"),
        ({"linear": {"short_conv_kernel_size": 3}}, "[192, 2]", "[192, 3]"),
    ],
    ids=["latent", "latent split", "heads", "taps"],
)
def test_filled_cache_of_another_config(refused, random_ids, make, changes, held, wanted):
    config = config_with(**changes)
    cache = make(config)
    with torch.no_grad():
        KimiLinearForCausalLM(config)(random_ids(BATCH, LENGTH), past_key_values=cache)
    refused("another config", held, wanted, input_ids=random_ids(BATCH, LENGTH), past_key_values=cache)


@pytest.mark.parametrize(
    "make",
    [
        KimiLinearCache,
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=32),
    ],
    ids=["ours", "dynamic", "static"],
)
def test_fitting_caches_pass_the_checks(model, random_ids, make):
    ids = random_ids(BATCH, LENGTH)
    cache = make(model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        logits = model(ids[:, 5:], past_key_values=cache).logits
        expected = model(ids).logits[:, 5:]
    # fp32 logits of order 1 after some 1e3 roundings of 6e-8
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# Packed sequences


@pytest.mark.parametrize(
    "ends",
    [[0, 6, 5, 9], [1, 5, 9], [0, 5, 8], [0, 5, 10], [0], [-1, 9], [[0, 9]]],
    ids=["falling", "not from 0", "ends early", "ends late", "one number", "negative", "2D"],
)
def test_boundaries_that_do_not_fit(refused, random_ids, ends):
    refused(
        "rise from 0 to the number of tokens 9",
        str(ends),
        input_ids=random_ids(1, LENGTH),
        cu_seq_lens_q=torch.tensor(ends),
    )


@pytest.mark.parametrize("ends", [[0, 9], torch.tensor([0.0, 9.0])], ids=["list", "float"])
def test_boundaries_that_are_no_integer_tensor(refused, random_ids, ends):
    refused("integer tensor", input_ids=random_ids(1, LENGTH), cu_seq_lens_q=ends)


def test_boundaries_over_several_rows(refused, random_ids):
    refused(
        "batch of one row, got 2 rows",
        "end to end",
        input_ids=random_ids(BATCH, LENGTH),
        cu_seq_lens_q=torch.tensor([0, 9]),
    )


def test_boundaries_with_a_cache(model, refused, random_ids):
    refused(
        "cu_seq_lens_q",
        "past_key_values exclude one another",
        input_ids=random_ids(1, LENGTH),
        cu_seq_lens_q=torch.tensor([0, 9]),
        past_key_values=KimiLinearCache(model.config),
    )


def test_boundaries_with_a_mask(refused, random_ids):
    # transformers' mask functions forget the packing as soon as there is a mask, and MLA would mix the sequences.
    refused(
        "cu_seq_lens_q",
        "attention_mask exclude one another",
        "leave out the mask",
        input_ids=random_ids(1, LENGTH),
        cu_seq_lens_q=torch.tensor([0, 4, 9]),
        attention_mask=torch.ones(1, LENGTH),
    )


# Labels


@pytest.mark.parametrize("shape", [(BATCH, LENGTH - 1), (1, LENGTH), (LENGTH,), (LENGTH, BATCH)])
def test_labels_of_wrong_shape(refused, random_ids, shape):
    # The last one has the right number of elements and would give a loss, of the wrong tokens.
    refused(
        f"integers {[BATCH, LENGTH]}",
        str(list(shape)),
        input_ids=random_ids(BATCH, LENGTH),
        labels=torch.zeros(shape, dtype=torch.long),
    )


def test_labels_of_wrong_dtype(refused, random_ids):
    ids = random_ids(BATCH, LENGTH)
    refused("integers", "torch.float32", input_ids=ids, labels=ids.float())


def test_labels_with_logits_of_some_positions(refused, random_ids):
    ids = random_ids(BATCH, LENGTH)
    refused("logits_to_keep=0 keeps all", input_ids=ids, labels=ids, logits_to_keep=3)


@pytest.mark.parametrize("label", [-1, 128])
def test_labels_outside_the_vocabulary(refused, random_ids, label):
    ids = random_ids(BATCH, LENGTH)
    labels = ids.clone()
    labels[1, 3] = label
    refused(f"labels hold {label}", "[0, 128)", "-100", input_ids=ids, labels=labels)


def test_ignored_labels_are_fine(model, random_ids):
    ids = random_ids(BATCH, LENGTH)
    labels = ids.clone()
    labels[:, :4] = -100
    assert model(ids, labels=labels).loss.isfinite()
    assert model(ids, labels=ids.clone().clamp(min=5), ignore_index=5).loss.isfinite()


# The classifier and refusals under way


def test_classifier_refuses_the_same(load_tiny):
    classifier = load_tiny("hybrid", KimiLinearForSequenceClassification)
    with pytest.raises(ValueError, match="token 128"):
        classifier(torch.tensor([[1, 128]]))
    with pytest.raises(ValueError, match="attention_mask is"):
        classifier(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 3))


def test_a_refused_call_leaves_the_cache_as_it_was(model, random_ids):
    ids = random_ids(BATCH, LENGTH)
    with torch.no_grad():
        cache = model(ids[:, :5]).past_key_values
        held = [getattr(layer, "state", None) for layer in cache.layers]
        for wrong in ({"input_ids": ids[:1, 5:]}, {"input_ids": ids[:, 5:] + 200}):
            with pytest.raises(ValueError):
                model(past_key_values=cache, **wrong)
        assert [getattr(layer, "state", None) is state for layer, state in zip(cache.layers, held)] == [True] * 4
        logits = model(ids[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", [None, [[0, 1, 2, 0, 1, 2]]])
@pytest.mark.parametrize("mask", [[[1, 1, 1, 2, 2, 2]], [[0, 1, 1, 1, 1, -1]], [[1.0, 1.0, 0.5, 1.0, 1.0, 1.0]]])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(model, random_ids, mask, positions):
    positions = None if positions is None else torch.tensor(positions)
    with pytest.raises(ValueError, match=r"attention_mask holds (2|-1|0\.5), but must be 1 .* cu_seq_lens_q"):
        model(random_ids(1, 6), attention_mask=torch.tensor(mask), position_ids=positions)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_mask_of_any_dtype_is_read(model, random_ids, dtype):
    ids, mask = random_ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = model(ids[:, 2:]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask.to(dtype)).logits[:, 2:], expected, atol=1e-4, rtol=1e-4)


def test_what_apply_chat_template_returns_is_no_input_of_generate(model, random_ids):
    encoding = BatchEncoding({"input_ids": random_ids(1, 4), "attention_mask": torch.ones(1, 4)})
    for call in (lambda: model.generate(inputs=encoding), lambda: model.generate(encoding)):
        with pytest.raises(ValueError, match=r"got a BatchEncoding; give its tensors, by name: generate\(\*\*inputs\)"):
            call()
    with pytest.raises(ValueError, match="got a list; give a tensor"):
        model.generate([[1, 2]])


def test_a_cache_that_generate_was_told_not_to_use_is_refused(model, random_ids):
    cache = KimiLinearCache(model.config)
    with pytest.raises(ValueError, match="use_cache=False with past_key_values"):
        model.generate(random_ids(1, 5), past_key_values=cache, use_cache=False, max_new_tokens=3)


def test_a_cache_of_a_wider_dtype_is_refused_before_it_changes(load_tiny, random_ids):
    ids, cache = random_ids(1, 5), KimiLinearCache(load_tiny().config)
    with torch.no_grad():
        load_tiny()(ids, past_key_values=cache)
        half = load_tiny(dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"made in torch.float32 .* model is in torch.bfloat16"):
            half(ids, past_key_values=cache)
        assert load_tiny()(ids, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_masks_of_long_prompts_are_checked_by_value(model, random_ids, monkeypatch, value):
    monkeypatch.setattr(segments, "SEGMENT_TOKENS", 64)
    mask = torch.ones(1, 200)
    mask[:, 150:] = value
    with torch.no_grad(), pytest.raises(ValueError, match="but must be 1 at tokens and 0 at padding"):
        model(random_ids(1, 200), attention_mask=mask)
