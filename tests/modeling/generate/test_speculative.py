"""Speculative decoding through transformers' own generate(): drafts change the speed and nothing else.

Greedy tokens are compared one by one. Verifying several tokens in one call rounds otherwise than one by one, so two
ways may part at a tie: where tokens differ, the gap between the best two logits must be below 1e-4, the bound on
differences between two ways to a logit in fp32 that test_cache.py keeps; logits spread over several units.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import tiny_config, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast
from transformers.generation.candidate_generator import CandidateGenerator

import kimi_linear.hub_card
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

CONFIGS = ["hybrid", "all_kda", "all_mla"]
GAP = 1e-4
EOS = 126  # random_ids doesn't draw it; transformers 5.10 can't look prompts up without a stop token
SMALL_CHECKPOINT = Path(kimi_linear.hub_card.__file__).parent / "small_checkpoint"


def generate(model, ids: torch.Tensor, **options):
    return model.generate(ids, **{"max_new_tokens": 24, "do_sample": False, "eos_token_id": EOS, **options})


def assert_same_tokens(model, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Rows [1, L] are equal, or part at a tie."""
    if torch.equal(tokens, expected):
        return
    length = min(tokens.shape[1], expected.shape[1])
    parted = (tokens[0, :length] != expected[0, :length]).nonzero()
    assert len(parted), f"{tokens.shape[1]} tokens, expected {expected.shape[1]}"
    first = int(parted[0])
    with torch.no_grad():
        logits = model(expected[:, :first], use_cache=False).logits[0, -1]
    best = logits.topk(2).values
    assert best[0] - best[1] < GAP, f"token {first} is {tokens[0, first]}, expected {expected[0, first]}"


@torch.no_grad()
def assert_greedy(model, ids: torch.Tensor, tokens: torch.Tensor, new: int) -> None:
    """`tokens` are `ids` and `new` more, of which each is the best after those before it, or ties with the best.

    One forward over the text asks for the same as generating it once more by plain decoding, which test_cache.py
    compares with such forwards.
    """
    length = ids.shape[1]
    assert torch.equal(tokens[:, :length], ids)
    assert tokens.shape[1] == length + new or int(tokens[0, -1]) == EOS
    logits = model(tokens[:, :-1], use_cache=False).logits[0, length - 1 :]
    chosen = logits.gather(1, tokens[0, length:, None])[:, 0]
    assert float((logits.amax(dim=1) - chosen).max()) < GAP


class ScriptedCandidates(CandidateGenerator):
    """Drafts of which the first so many are what the model will say, and the others are not.

    Args:
        expected: [1, L], the greedy tokens.
        script: (drafted, right) per round, from the start again when it ends.
        last_position: drafts end before it, as those of transformers' generators do.
    """

    def __init__(self, expected: torch.Tensor, script: list[tuple[int, int]], last_position: int) -> None:
        self.expected, self.script, self.last_position = expected, script, last_position
        self.matches: list[int] = []

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs):
        drafted, right = self.script[len(self.matches) % len(self.script)]
        start = input_ids.shape[1]
        drafts = self.expected[:, start : min(start + drafted, self.last_position)].clone()
        drafts[:, right:] = (drafts[:, right:] + 1) % 120
        return torch.cat([input_ids, drafts], dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches) -> None:
        self.matches.append(int(num_matches))


def generate_scripted(model, ids, expected, script, monkeypatch):
    """(tokens, tokens accepted in each round)."""
    candidates = ScriptedCandidates(expected, script, expected.shape[1] - 1)
    with monkeypatch.context() as patch:
        patch.setattr(model, "_get_candidate_generator", lambda **kwargs: candidates)
        tokens = generate(model, ids, max_new_tokens=expected.shape[1] - ids.shape[1], prompt_lookup_num_tokens=8)
    return tokens, candidates.matches


# Greedy tokens


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("drafted", [1, 2, 5, 16, 20])
def test_every_number_of_accepted_tokens(name, drafted, shared_tiny, random_ids, monkeypatch):
    model, ids = shared_tiny(name), random_ids(1, 9)
    expected = generate(model, ids, max_new_tokens=40)
    for right in range(drafted + 1) if drafted != 16 else (0, 1, 8, 15, 16):  # 20 has all that 16 can take back
        tokens, matches = generate_scripted(model, ids, expected, [(drafted, right)], monkeypatch)
        assert_same_tokens(model, tokens, expected)
        if right < drafted:
            assert set(matches[:-1]) <= {right}, "the script was not what happened"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), st.integers(1, 30))
def test_any_acceptance_pattern(shared_tiny, script, length):
    model = shared_tiny("hybrid")
    ids = torch.randint(0, 120, (1, length), generator=torch.Generator().manual_seed(length))
    expected = generate(model, ids, max_new_tokens=30)
    with pytest.MonkeyPatch.context() as monkeypatch:
        tokens, _ = generate_scripted(model, ids, expected, script, monkeypatch)
    assert_same_tokens(model, tokens, expected)


def test_many_prompts(shared_tiny):
    """Every length up to 20, repeated or not, with each mode: the remainders meet once in 60."""
    model, draft = shared_tiny("hybrid"), shared_tiny("dense")
    modes = [
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2},
        {"assistant_model": draft},
        {"assistant_early_exit": 2},
    ]
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        half = torch.randint(0, 120, (1, 1 + i % 20), generator=generator)
        ids = torch.cat([half, half], dim=1) if i % 2 else half
        assert_greedy(model, ids, generate(model, ids, max_new_tokens=8, **modes[i % 3]), 8)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["lookup", "assistant", "itself", "early_exit"])
@pytest.mark.parametrize("length", [1, 9, 70])
def test_modes_of_speculation(name, mode, length, shared_tiny, random_ids):
    model, half = shared_tiny(name), random_ids(1, length)
    ids = torch.cat([half, half], dim=1) if length > 1 else half
    options = {
        "lookup": {"prompt_lookup_num_tokens": 6},
        "assistant": {"assistant_model": shared_tiny("dense")},
        "itself": {"assistant_model": model},
        "early_exit": {"assistant_early_exit": 2},
    }[mode]
    assert_greedy(model, ids, generate(model, ids, **options), 24)


def test_drafts_that_grow_with_success(load_tiny, random_ids):
    model, draft, ids = load_tiny("hybrid"), load_tiny("hybrid"), random_ids(1, 9)
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    draft.generation_config.num_assistant_tokens = 30
    draft.generation_config.assistant_confidence_threshold = 0.0
    assert_greedy(model, ids, generate(model, ids, max_new_tokens=120, assistant_model=draft), 120)
    assert draft.generation_config.num_assistant_tokens > 30


def test_more_lookup_tokens_than_a_recording_has_by_default(model, random_ids):
    ids = random_ids(1, 100).repeat(1, 2)
    assert_same_tokens(model, generate(model, ids, prompt_lookup_num_tokens=90), generate(model, ids))


def test_left_padding(model, random_ids):
    half = random_ids(1, 8)
    ids = torch.cat([torch.full((1, 5), 119), half, half], dim=1)
    mask = (torch.arange(21) >= 5).long()[None]
    tokens = generate(model, ids, attention_mask=mask, prompt_lookup_num_tokens=4)
    assert_same_tokens(model, tokens[:, 5:], generate(model, ids[:, 5:]))


def test_fewer_calls_are_made_where_drafts_are_right(model, random_ids, monkeypatch):
    ids, calls = random_ids(1, 9), []
    expected = generate(model, ids, max_new_tokens=40)
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    try:
        generate_scripted(model, ids, expected, [(7, 7)], monkeypatch)
    finally:
        hook.remove()
    assert len(calls) == 5  # 8 tokens a call


def test_the_returned_cache_goes_on(model, random_ids):
    ids = random_ids(1, 8).repeat(1, 2)
    outputs = generate(model, ids, prompt_lookup_num_tokens=5, return_dict_in_generate=True)
    cache = outputs.past_key_values
    assert isinstance(cache, KimiLinearCache)
    assert cache.get_seq_length() == outputs.sequences.shape[1] - 1
    with torch.no_grad():
        logits = model(outputs.sequences[:, -1:], past_key_values=cache).logits
        expected = model(outputs.sequences, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_filled_cache_of_the_user(model, random_ids):
    ids = random_ids(1, 8).repeat(1, 3)
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(ids[:, :16], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 16 tokens and input_ids 16"):
        generate(model, ids[:, :16], past_key_values=cache, prompt_lookup_num_tokens=5)
    tokens = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=5)
    assert_same_tokens(model, tokens, generate(model, ids))


def test_only_speculation_records(model, random_ids):
    cache = KimiLinearCache(model.config)
    generate(model, random_ids(2, 9), past_key_values=cache)
    assert cache.recording_nbytes == 0


@pytest.fixture(scope="module")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 300 tokens that cuts text otherwise than the small checkpoint's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"]
    )
    tokenizer.train_from_iterator(["the cat and the dog and the bird " * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def test_a_draft_with_another_tokenizer(tmp_path, other_tokenizer):
    model = KimiLinearForCausalLM.from_pretrained(SMALL_CHECKPOINT, dtype=torch.float32).eval()
    tokenizer, size = AutoTokenizer.from_pretrained(SMALL_CHECKPOINT), len(other_tokenizer)
    config = tiny_config(vocab_size=size, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    write_checkpoint(tmp_path, config)
    draft = KimiLinearForCausalLM.from_pretrained(tmp_path).eval()
    inputs = tokenizer("The cat and the dog and the bird", return_tensors="pt")
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs, **options)
    tokens = model.generate(
        **inputs, **options, assistant_model=draft, tokenizer=tokenizer, assistant_tokenizer=other_tokenizer
    )
    assert_same_tokens(model, tokens, expected)


# Sampling


@pytest.fixture(scope="module")
def four_tokens(tmp_path_factory):
    """(a model over a vocabulary of 4, a draft that disagrees with it)."""
    models = []
    for seed in (0, 1):
        path = tmp_path_factory.mktemp(f"vocabulary{seed}")
        config = tiny_config(
            vocab_size=4, bos_token_id=0, eos_token_id=0, pad_token_id=0, kda_layers=(1,), full_attn_layers=(2,)
        )
        write_checkpoint(path, config, seed=seed)
        model = KimiLinearForCausalLM.from_pretrained(path).eval()
        model.generation_config.eos_token_id = None
        models.append(model)
    return models


@torch.no_grad()
def pair_probabilities(model, ids: torch.Tensor) -> torch.Tensor:
    """[4, 4], probability of each pair of the second and third token after `ids`."""
    firsts = torch.cat([ids.expand(4, -1), torch.arange(4)[:, None]], dim=1)
    seconds = torch.cat([firsts.repeat_interleave(4, 0), torch.arange(4).repeat(4)[:, None]], dim=1)
    first = model(ids, use_cache=False).logits[0, -1].softmax(-1)
    second = model(firsts, use_cache=False).logits[:, -1].softmax(-1)
    third = model(seconds, use_cache=False).logits[:, -1].softmax(-1).view(4, 4, 4)
    return torch.einsum("a,ab,abc->bc", first, second, third)


@pytest.mark.parametrize("mode", ["lookup", "assistant"])
def test_sampled_tokens_have_the_distribution_of_the_model(mode, four_tokens):
    model, draft = four_tokens
    ids = torch.tensor([[2, 1, 2, 1, 2]])  # its pairs are closest to equally likely: fewest samples are needed
    options = {"lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 99}, "assistant": {"assistant_model": draft}}
    probabilities, counts, samples = pair_probabilities(model, ids), torch.zeros(4, 4), 310
    torch.manual_seed(0)
    for _ in range(samples):
        tokens = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=4, **options[mode])[0, ids.shape[1] :]
        counts[tokens[1], tokens[2]] += 1
    expected = probabilities * samples
    assert expected.min() > 5, "too few for the chi-square approximation"
    statistic = ((counts - expected).square() / expected).sum()
    # With 15 degrees of freedom a correct sampler exceeds 37.7 once in 1,000 seeds; the seed is fixed.
    assert statistic < 37.7
    # The test can fail: this many samples of the draft's own distribution would exceed it.
    wrong = pair_probabilities(draft, ids) * samples
    assert ((wrong - expected).square() / expected).sum() > 2 * 37.7


# What is refused


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_caches_that_cannot_take_tokens_back_are_refused(options, model, random_ids):
    options = {name: model if value is True else value for name, value in options.items()}
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match=r"a DynamicCache can't do with KDA states.*KimiLinearCache\(model.config\)"):
        generate(model, ids, past_key_values=DynamicCache(config=model.config), **options)
    with pytest.raises(ValueError, match=r"a (Static|Dynamic)Cache can't do with KDA states"):  # 5.10 makes the second
        generate(model, ids, cache_implementation="static", **options)


def test_batches_are_refused_by_transformers(model, random_ids):
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(model, random_ids(2, 9), prompt_lookup_num_tokens=3)


def test_drafts_longer_than_can_be_recorded_are_refused(model, random_ids):
    ids = random_ids(1, 9)
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(random_ids(1, 300), past_key_values=cache)
    with pytest.raises(ValueError, match="300 tokens can't be taken back, only the last 64"):
        cache.crop(-300)
