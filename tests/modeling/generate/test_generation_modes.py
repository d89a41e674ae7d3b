"""Ways of generating beyond greedy: each gives what the same method gives by whole forwards, without a cache."""

import inspect
import time

import decoding_recipes
import pytest
import torch
from transformers import (
    AutoTokenizer,
    SynthIDTextWatermarkingConfig,
    WatermarkDetector,
    WatermarkingConfig,
)

from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

CONFIGS = ["hybrid", "all_kda", "all_mla"]
NEW = 12


def generate(model, ids: torch.Tensor, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


@torch.no_grad()
def log_probabilities(model, sequences: torch.Tensor, prompt: int) -> torch.Tensor:
    """[B, new], of each generated token given what stands before it, by one forward without a cache."""
    scores = model(sequences[:, :-1], use_cache=False).logits[:, prompt - 1 :].log_softmax(-1)
    return scores.gather(2, sequences[:, prompt:, None])[..., 0]


def padded_prompts(random_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 9 tokens, the second with 4 tokens of padding on the left, and their mask."""
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


# Beams


@torch.no_grad()
def beams_by_hand(model, ids: torch.Tensor, beams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search of one prompt [1, T], nothing stops it: the beams [beams, T + NEW] and their log-probabilities."""
    rows, totals = ids, torch.zeros(1)
    for _ in range(NEW):
        scores = totals[:, None] + model(rows, use_cache=False).logits[:, -1].log_softmax(-1)
        totals, flat = scores.flatten().topk(beams)
        rows = torch.cat([rows[flat // scores.shape[1]], flat[:, None] % scores.shape[1]], dim=1)
    return rows, totals


@pytest.mark.parametrize("name", CONFIGS)
def test_beam_search_is_the_loop_by_hand(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(1, 9)
    options = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    outputs = generate(model, ids, num_beams=4, num_return_sequences=4, **options)
    rows, totals = beams_by_hand(model, ids, 4)
    assert torch.equal(outputs.sequences, rows)
    torch.testing.assert_close(outputs.sequences_scores, totals, atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_transition_scores_are_the_log_probabilities_of_the_tokens(options, model, random_ids):
    ids = random_ids(2, 9)
    outputs = generate(model, ids, return_dict_in_generate=True, output_scores=True, output_logits=True, **options)
    scores = model.compute_transition_scores(
        outputs.sequences, outputs.scores, outputs.get("beam_indices"), normalize_logits=True
    )
    torch.testing.assert_close(scores, log_probabilities(model, outputs.sequences, 9), atol=1e-4, rtol=0)
    assert len(outputs.logits) == NEW


def test_beams_that_end_early_are_the_same_without_cache(model, random_ids):
    ids = random_ids(2, 9)
    stop = generate(model, ids, num_beams=3)[0, 12].item()
    options = {"num_beams": 3, "eos_token_id": stop, "length_penalty": -1.0}
    cached = generate(model, ids, **options)
    assert (cached[:, 9:] == stop).any()
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))


def test_beam_sampling_draws_the_same_with_and_without_cache(model, random_ids):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "temperature": 1.5}
        drawn.append(generate(model, random_ids(2, 9), use_cache=use_cache, **options))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], generate(model, random_ids(2, 9), num_beams=3, num_return_sequences=2))


def test_beams_keep_to_the_allowed_tokens(model, random_ids):
    def even_then_odd(row: int, ids: torch.Tensor) -> list[int]:
        return list(range(len(ids) % 2, 120, 2))

    options = {"num_beams": 3, "prefix_allowed_tokens_fn": even_then_odd}
    cached = generate(model, random_ids(2, 9), **options)
    assert (cached[:, 9:] % 2 == torch.arange(9, 9 + NEW) % 2).all()
    assert torch.equal(cached, generate(model, random_ids(2, 9), use_cache=False, **options))


# Methods that transformers keeps on the Hub

MOVED = {
    "contrastive-search": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "high"},
    "group-beam-search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "constrained-beam-search": {"num_beams": 4, "force_words_ids": [[3, 4]]},
}


@pytest.mark.parametrize("repository", MOVED)
def test_methods_that_moved_to_the_hub_name_their_repository(repository, model, random_ids):
    with pytest.raises(ValueError, match=f"trust_remote_code=True.*transformers-community/{repository}"):
        generate(model, random_ids(1, 9), **MOVED[repository])


RECIPES = {
    "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {},
    "group_beam_search": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5},
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_give_the_same_tokens_with_and_without_cache(name, recipe, padded, shared_tiny, random_ids):
    model = shared_tiny(name)
    ids, mask = padded_prompts(random_ids)
    options = {"custom_generate": getattr(decoding_recipes, recipe), **RECIPES[recipe]}
    options["attention_mask"] = mask if padded else torch.ones_like(ids)
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert cached.shape == (2 * options.get("num_beams", 1), 9 + NEW)
    greedy = generate(model, ids, attention_mask=options["attention_mask"])
    assert not torch.equal(cached[:: options.get("num_beams", 1)], greedy)


def test_one_group_of_beams_is_beam_search(model, random_ids):
    options = {"custom_generate": decoding_recipes.group_beam_search, "num_beams": 4, "num_beam_groups": 1}
    groups = generate(model, random_ids(2, 9), diversity_penalty=0.0, **options)
    assert torch.equal(groups, generate(model, random_ids(2, 9), num_beams=4, num_return_sequences=4))


def test_recipe_from_a_local_folder_needs_trust(model, random_ids, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    tail = (
        "\n\ndef generate(model, **kwargs):\n    return type(model).generate(model, custom_generate=dola, **kwargs)\n"
    )
    (tmp_path / "custom_generate" / "generate.py").write_text(inspect.getsource(decoding_recipes) + tail)
    options = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    expected = generate(model, random_ids(2, 9), custom_generate=decoding_recipes.dola)
    assert torch.equal(generate(model, random_ids(2, 9), **options), expected)


# Guidance, stopping, watermarks


@pytest.mark.parametrize("name", CONFIGS)
def test_classifier_free_guidance_runs_beside_the_cache(name, shared_tiny, random_ids):
    """The guided steps keep a second cache, of the negative prompt."""
    model, ids, negative = shared_tiny(name), random_ids(1, 9), random_ids(1, 5, seed=1)
    guided = generate(model, ids, guidance_scale=1.5, negative_prompt_ids=negative)
    expected = ids
    with torch.no_grad():
        for _ in range(NEW):
            wanted, unwanted = (
                model(torch.cat([start, expected[:, 9:]], 1), use_cache=False).logits[:, -1].log_softmax(-1)
                for start in (ids, negative)
            )
            token = (unwanted + 1.5 * (wanted - unwanted)).argmax(-1, keepdim=True)
            expected = torch.cat([expected, token], dim=1)
    assert torch.equal(guided, expected)
    assert not torch.equal(guided, generate(model, ids))


def test_max_time_ends_within_a_step(model, random_ids):
    ids = random_ids(1, 9)
    generate(model, ids)  # what is done once
    start = time.monotonic()
    stopped = generate(model, ids, max_new_tokens=4000, max_time=0.2)
    assert time.monotonic() - start < 2
    steps = stopped.shape[1] - 9
    assert 0 < steps < 4000
    assert torch.equal(stopped, generate(model, ids, max_new_tokens=steps))


def test_green_list_watermark_is_detected(model, random_ids):
    watermark = WatermarkingConfig(greenlist_ratio=0.25, bias=4.0, seeding_scheme="lefthash")
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 40}
    marked = generate(model, ids, watermarking_config=watermark, **options)
    assert torch.equal(marked, generate(model, ids, watermarking_config=watermark, use_cache=False, **options))
    detector = WatermarkDetector(model_config=model.config, device="cpu", watermarking_config=watermark)
    found, plain = (
        detector(tokens[:, 9:], return_dict=True).z_score for tokens in (marked, generate(model, ids, **options))
    )
    assert (found > 3).all()
    assert (plain < 3).all()


def test_synthid_watermark_draws_the_same_with_and_without_cache(model, random_ids):
    watermark = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=3)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"do_sample": True, "watermarking_config": watermark, "use_cache": use_cache}
        drawn.append(generate(model, random_ids(2, 9), **options))
    assert torch.equal(*drawn)
    torch.manual_seed(5)
    assert not torch.equal(drawn[0], generate(model, random_ids(2, 9), do_sample=True))


# Text


@pytest.fixture(scope="module")
def small_model():
    return KimiLinearForCausalLM.from_pretrained(SMALL_CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def small_tokenizer():
    return AutoTokenizer.from_pretrained(SMALL_CHECKPOINT)


def test_token_healing_mends_the_last_token(small_model, small_tokenizer):
    """A prompt that breaks off within a word: its last token is given back and chosen again, with what it begins."""
    ids = small_tokenizer("if the expr", return_tensors="pt").input_ids
    broken = small_tokenizer.decode(ids[0, -1])
    options = {"max_new_tokens": 1, "do_sample": False, "token_healing": True, "tokenizer": small_tokenizer}
    mended = small_model.generate(ids, **options)[0, ids.shape[1] - 1]
    texts = {token: small_tokenizer.decode(token) for token in small_tokenizer.get_vocab().values()}
    with torch.no_grad():
        logits = small_model(ids[:, :-1], use_cache=False).logits[0, -1]
    logits[ids[0, -1]] += 1  # transformers favours the token itself by so much
    assert mended == max((token for token in texts if texts[token].startswith(broken)), key=lambda token: logits[token])
    assert len(texts[int(mended)]) > len(broken)


def test_stop_strings_end_each_row_of_a_batch_by_itself(small_model, small_tokenizer):
    prompts = ["The following exam", "This module is part of the standard"]
    inputs = small_tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 40, "do_sample": False}
    free = small_model.generate(**inputs, **options)
    stopped = small_model.generate(**inputs, **options, stop_strings=["\n"], tokenizer=small_tokenizer)
    width, lengths = inputs.input_ids.shape[1], []
    for row in range(2):
        kept = small_tokenizer.decode(stopped[row, width:], skip_special_tokens=True)
        lengths.append(len(kept))
        assert kept.count("\n") == kept.strip(" ").endswith("\n") == 1
        assert small_tokenizer.decode(free[row, width:], skip_special_tokens=True).startswith(kept)
    assert lengths[0] != lengths[1]
