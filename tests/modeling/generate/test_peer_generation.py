"""What transformers' GenerationTesterMixin and CausalLMModelTest ask of `generate()` and no other test here does.

tests/PEER_TESTS.md says which test of ours stands for which of theirs.
"""

import pytest
import torch
from tiny_checkpoints import TINY_CONFIGS
from transformers import AutoTokenizer, DynamicCache, pipeline

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForSequenceClassification, KimiLinearModel

CONFIGS = ["hybrid", "all_kda", "all_mla"]
NEW = 8
# Processors that edit logits in every step, as the mixin runs each method with.
PROCESSORS = {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}


def generate(model, ids=None, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **options})


METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7, "num_return_sequences": 2},
    "beams": {"num_beams": 2, "length_penalty": 2.0, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2, "top_k": 10, "temperature": 0.7},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_methods_with_logits_processors_need_no_cache(name, method, shared_tiny, random_ids):
    model, results = shared_tiny(name), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, random_ids(2, 9), use_cache=use_cache, **METHODS[method], **PROCESSORS))
    assert torch.equal(*results)
    assert results[0].shape == (2 * METHODS[method].get("num_return_sequences", 1), 9 + NEW)


def test_generation_can_begin_from_nothing(model):
    """From the [BOS] token of the generation config."""
    generated = generate(model)
    assert generated.shape == (1, 1 + NEW)
    assert generated[0, 0] == model.generation_config.bos_token_id == 120
    assert torch.equal(generated, generate(model, torch.tensor([[120]])))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}], ids=str)
def test_all_logits_or_the_last_give_the_same_tokens(options, model, random_ids):
    ids = random_ids(2, 9)
    assert torch.equal(generate(model, ids, logits_to_keep=0, **options), generate(model, ids, **options))


def test_an_all_ones_mask_and_explicit_positions_change_nothing(model, random_ids):
    ids = random_ids(2, 9)
    expected = generate(model, ids)
    positions = torch.arange(9).expand(2, -1)
    assert torch.equal(generate(model, ids, attention_mask=torch.ones_like(ids)), expected)
    assert torch.equal(generate(model, ids, position_ids=positions), expected)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_left_padding_leaves_the_logits_of_the_next_token_alone(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 9)
    padded = torch.cat([torch.full((2, 23), 127), ids], dim=1)
    mask = (torch.arange(32) >= 23).long().expand(2, -1)
    got = model(padded, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(got, model(ids).logits[:, -1], atol=1e-4, rtol=0)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(got, model(ids).logits[:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_generate_the_same(implementation, load_tiny, shared_tiny, random_ids):
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model = load_tiny(attn_implementation=implementation)
    expected = generate(shared_tiny("hybrid"), ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("kind", ["static", None])
def test_embeddings_in_place_of_ids(kind, model, random_ids):
    """Beside the ids they win for the prompt; the ids only lead the returned sequence."""
    ids = random_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    expected = generate(model, ids)
    options = {"cache_implementation": kind}
    assert torch.equal(generate(model, inputs_embeds=embeds, **options), expected[:, 9:])
    assert torch.equal(generate(model, ids, inputs_embeds=embeds, **options), expected)
    other = generate(model, ids, inputs_embeds=embeds.flip(1), **options)
    assert torch.equal(other[:, 9:], generate(model, ids.flip(1))[:, 9:])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_generation_from_embeddings_goes_on_over_its_cache(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(1, 9)
    table = model.get_input_embeddings()
    options = {"return_dict_in_generate": True}
    first = generate(model, inputs_embeds=table(ids), **options)
    text = torch.cat([ids, first.sequences], dim=1)
    mask = torch.ones_like(text)
    options |= {"past_key_values": first.past_key_values, "attention_mask": mask}
    second = generate(model, inputs_embeds=table(text), **options)
    assert torch.equal(second.sequences, generate(model, text, attention_mask=mask)[:, text.shape[1] :])


@torch.no_grad()
def test_a_padded_second_turn_leaves_the_states_alone(model, random_ids):
    """Turn 2 is padded on its left, between cached and new tokens: KDA layers must not swallow the padding."""
    ids = random_ids(2, 12)
    for cache in (KimiLinearCache(model.config), DynamicCache(config=model.config)):
        model(ids[:, :7], past_key_values=cache)
        mask = torch.ones_like(ids)
        mask[1, 7:10] = 0
        second = ids[:, 7:].clone()
        second[1, :3] = 5
        logits = model(second, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits[:1], model(ids[:1]).logits[:, 7:], atol=1e-4, rtol=0)
        kept = ids[1:, [0, 1, 2, 3, 4, 5, 6, 10, 11]]
        torch.testing.assert_close(logits[1:, 3:], model(kept).logits[:, 7:], atol=1e-4, rtol=0)


def test_a_dynamic_cache_holds_windows_states_and_latents(model, random_ids):
    """W - 1 inputs (the native class keeps W), a state, and latents and shared keys as keys and values of one head."""
    cache = generate(
        model, random_ids(2, 9), past_key_values=DynamicCache(config=model.config), return_dict_in_generate=True
    ).past_key_values
    assert len(cache) == len(cache.layers) == 4
    for layer, kind in zip(cache.layers, model.config.layer_types):
        if kind == "full_attention":
            assert (layer.keys.shape, layer.values.shape) == ((2, 1, 9 + NEW - 1, 32), (2, 1, 9 + NEW - 1, 8))
            continue
        window, state = (x[0] if isinstance(x, dict) else x for x in (layer.conv_states, layer.recurrent_states))
        assert (window.shape, state.shape) == ((2, 3 * 64, 3), (2, 4, 16, 16))


# Pipelines of CausalLMModelTest; text generation is in test_generation.py


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMALL_CHECKPOINT)


def wide_config(**options) -> KimiLinearConfig:
    """A tiny config with the vocabulary of that tokenizer."""
    return KimiLinearConfig(**{**TINY_CONFIGS["hybrid"], "vocab_size": 1280, "pad_token_id": 1279, **options})


def test_feature_extraction_pipeline(tokenizer):
    model = KimiLinearModel(wide_config()).eval()
    features = pipeline("feature-extraction", model=model, tokenizer=tokenizer)("Hello there", return_tensors=True)
    with torch.no_grad():
        expected = model(**tokenizer("Hello there", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected)


def test_text_classification_pipeline(tokenizer):
    model = KimiLinearForSequenceClassification(wide_config(id2label={0: "no", 1: "yes", 2: "perhaps"})).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    texts = ["Hello there", "A rather longer sentence than that one"]
    for text, scores in zip(texts, classify(texts, batch_size=2)):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
        got = {entry["label"]: entry["score"] for entry in scores}
        assert got == pytest.approx(dict(zip(("no", "yes", "perhaps"), expected)), abs=1e-4)
