"""`generate()` and what stands on it: every way of decoding gives the tokens that plain forwards give.

Token comparisons are exact. They may be, because the random models' best and second logits lie 1e-3 or more apart at
every step taken here, and two ways to the same logits 1e-5.
"""

import threading

import pytest
import torch
from tiny_checkpoints import tiny_config, write_checkpoint
from transformers import (
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from kimi_linear.hub_card.tokenizer_conversion import write_tokenizer_folder
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

CONFIGS = ["hybrid", "all_kda", "all_mla"]
NEW = 24


@torch.no_grad()
def greedy_by_hand(model, ids: torch.Tensor, new_tokens: int = NEW) -> torch.Tensor:
    """The prompt and its greedy continuation by whole forwards, without any cache."""
    for _ in range(new_tokens):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model, ids: torch.Tensor, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


# Ways to decode


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_whole_forwards(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 9)
    expected = greedy_by_hand(model, ids)
    assert len(expected[0, 9:].unique()) > 4, "the model repeats itself: the test would not see a stale state"
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_prompt(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 1)
    assert torch.equal(generate(model, ids), greedy_by_hand(model, ids))


def test_sampling_with_a_seed_is_the_loop_by_hand(model, random_ids):
    ids = random_ids(3, 9)
    torch.manual_seed(7)
    sampled = generate(model, ids, do_sample=True, temperature=0.8, top_k=0)
    torch.manual_seed(7)
    assert torch.equal(generate(model, ids, do_sample=True, temperature=0.8, top_k=0), sampled)

    torch.manual_seed(7)
    expected = ids
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(expected, use_cache=False).logits[:, -1]
        drawn = torch.multinomial((logits / 0.8).softmax(-1), 1)
        expected = torch.cat([expected, drawn], dim=1)
    assert torch.equal(sampled, expected)
    assert not torch.equal(sampled, generate(model, ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_beams_are_the_same_with_and_without_cache(name, shared_tiny, random_ids):
    options = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    cached = generate(shared_tiny(name), random_ids(2, 9), **options)
    plain = generate(shared_tiny(name), random_ids(2, 9), use_cache=False, **options)
    assert cached.sequences.shape == (6, 9 + NEW)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-4, rtol=0)
    moved = cached.beam_indices[:, :NEW] != cached.beam_indices[:, :1]
    assert moved.any(), "no beam ever changed its row: the test would not see a cache that isn't reordered"


def test_several_samples_of_one_prompt_differ(model, random_ids):
    torch.manual_seed(0)
    sampled = generate(model, random_ids(2, 9), do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, 9 + NEW)
    assert torch.equal(sampled[:3, :9], random_ids(2, 9)[:1].expand(3, -1))
    assert len({tuple(row.tolist()) for row in sampled}) == 6


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_batch_gives_the_tokens_of_each_prompt_alone(name, shared_tiny, random_ids):
    model, lengths = shared_tiny(name), (3, 11, 7)
    prompts = [random_ids(1, length, seed=length) for length in lengths]
    padded = torch.full((3, 11), 127)
    for row, prompt in enumerate(prompts):
        padded[row, 11 - prompt.shape[1] :] = prompt
    together = generate(model, padded, attention_mask=(padded != 127).long())
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 11:], generate(model, prompt)[0, prompt.shape[1] :]), f"row {row}"


@pytest.mark.parametrize("name", CONFIGS)
def test_three_chat_turns_over_one_cache_equal_one_long_prompt(name, shared_tiny, random_ids):
    model, cache = shared_tiny(name), KimiLinearCache(shared_tiny(name).config)
    conversation = random_ids(1, 0)
    for turn in range(3):
        conversation = torch.cat([conversation, random_ids(1, 5 + turn, seed=turn)], dim=1)
        # Spelt out, because generate() would take a pad token that the model wrote for padding.
        options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(conversation)}
        expected = generate(model, conversation, **options)
        conversation = generate(model, conversation, past_key_values=cache, **options)
        assert torch.equal(conversation, expected), f"turn {turn}"
        assert cache.get_seq_length() == conversation.shape[1] - 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_gives_the_same_tokens(name, chunk, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 30)
    assert torch.equal(generate(model, ids, prefill_chunk_size=chunk), generate(model, ids))


def test_chunked_prefill_of_a_padded_batch_gives_the_same_tokens(model, random_ids):
    ids = random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"attention_mask": mask}
    assert torch.equal(generate(model, ids, prefill_chunk_size=6, **options), generate(model, ids, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_embeds_give_the_tokens_of_the_ids(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 9)
    generated = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(generated, generate(model, ids)[:, 9:])


def test_scores_and_logits_of_each_step_are_returned(model, random_ids):
    ids = random_ids(2, 9)
    options = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    outputs = generate(model, ids, return_dict_in_generate=True, **options)
    assert len(outputs.scores) == len(outputs.logits) == len(outputs.hidden_states) == NEW
    with torch.no_grad():
        expected = model(outputs.sequences).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(outputs.logits, 1), expected, atol=1e-4, rtol=0)
    assert outputs.past_key_values.get_seq_length() == 9 + NEW - 1


# Caches


def test_default_cache_is_ours(model, random_ids):
    outputs = generate(model, random_ids(1, 9), return_dict_in_generate=True)
    assert type(outputs.past_key_values) is KimiLinearCache
    with torch.no_grad():
        assert type(model(random_ids(1, 9)).past_key_values) is KimiLinearCache
    outputs = generate(model, random_ids(1, 9), cache_implementation="dynamic", return_dict_in_generate=True)
    assert type(outputs.past_key_values) is KimiLinearCache


OTHER_CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=80),
}


@pytest.mark.parametrize("name", ["hybrid", "all_mla"])
def test_static_implementation_gives_the_same_tokens(name, shared_tiny, random_ids):
    # compile=False: this is about the cache; transformers would compile the decoding step on a GPU.
    model, ids = shared_tiny(name), random_ids(2, 9)
    outputs = generate(model, ids, cache_implementation="static", return_dict_in_generate=True, disable_compile=True)
    assert isinstance(outputs.past_key_values, StaticCache)
    assert torch.equal(outputs.sequences, generate(model, ids))


@pytest.mark.parametrize("kind", list(OTHER_CACHES))
@pytest.mark.parametrize("name", ["hybrid", "interleaved", "all_mla"])
def test_caches_of_transformers_give_the_same_tokens(name, kind, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 9)
    cache = OTHER_CACHES[kind](model.config)
    generated = generate(model, ids, past_key_values=cache, disable_compile=True)
    assert torch.equal(generated, generate(model, ids))
    assert int(cache.get_seq_length()) == 9 + NEW - 1


@pytest.mark.parametrize("kind", list(OTHER_CACHES))
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_caches_of_transformers_continue_padded_prompts_in_parts(kind, side, model, random_ids):
    """Prompt with padding, then several tokens, then one: the states that ours leaves, in their cache."""
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 6) if side == "left" else slice(14, 20)] = 0
    caches = [KimiLinearCache(model.config), OTHER_CACHES[kind](model.config)]
    for start, end in ((0, 20), (20, 39), (39, 40)):
        ours, theirs = (
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits for cache in caches
        )
        valid = mask[:, start:end].bool()
        torch.testing.assert_close(theirs[valid], ours[valid], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", list(OTHER_CACHES))
@torch.no_grad()
def test_caches_of_transformers_keep_the_state_in_fp32(kind, load_tiny, random_ids):
    model = load_tiny("hybrid", dtype=torch.bfloat16)
    cache = OTHER_CACHES[kind](model.config)
    for part in random_ids(1, 12).split([9, 1, 2], dim=1):
        model(part, past_key_values=cache)
    states = cache.layers[0].recurrent_states
    assert (states[0] if isinstance(states, dict) else states).dtype == torch.float32


def test_dynamic_cache_of_an_all_kda_model_gives_the_same_tokens(shared_tiny, random_ids):
    """transformers' linear-attention layers don't count tokens, so this goes by forward, not by `generate`."""
    model, ids = shared_tiny("all_kda"), random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split([12, 1, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=0)


# Text


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A tiny checkpoint with a tokenizer of the 256 bytes, the special tokens and the chat template."""
    folder = tmp_path_factory.mktemp("with_tokenizer")
    write_checkpoint(folder, tiny_config(vocab_size=276, bos_token_id=256, eos_token_id=258, pad_token_id=275))
    write_tokenizer_folder({bytes([byte]): byte for byte in range(256)}, folder, slots=20)
    return folder


@pytest.fixture(scope="module")
def tokenizer(text_folder):
    return AutoTokenizer.from_pretrained(text_folder)


@pytest.fixture(scope="module")
def text_model(text_folder):
    return KimiLinearForCausalLM.from_pretrained(text_folder).eval()


def test_stopping_ids_come_from_the_generation_config(text_model, tokenizer):
    im_end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "[EOS]"])
    assert text_model.generation_config.eos_token_id == [im_end, eos]
    ids = tokenizer("Hello", return_tensors="pt")
    free = text_model.generate(**ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    stop = int(free[0, ids.input_ids.shape[1] + 5])
    stopped = text_model.generate(**ids, max_new_tokens=NEW, do_sample=False, eos_token_id=[stop, eos])
    assert stopped[0].tolist() == free[0, : (free[0] == stop).nonzero()[0, 0] + 1].tolist()


def test_streamers_print_and_iterate_the_text_that_generate_returns(text_model, tokenizer, capsys):
    ids = tokenizer("Hello", return_tensors="pt")
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    generated = text_model.generate(**ids, **options)[0, ids.input_ids.shape[1] :]
    expected = tokenizer.decode(generated, skip_special_tokens=True)
    assert expected

    text_model.generate(**ids, **options, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == expected + "\n"

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=text_model.generate, kwargs={**ids, **options, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_stop_strings_end_the_text(text_model, tokenizer):
    ids = tokenizer("Hello", return_tensors="pt")
    text_model.generation_config.eos_token_id, kept = None, text_model.generation_config.eos_token_id
    try:
        options = {"max_new_tokens": NEW, "do_sample": False, "tokenizer": tokenizer}
        free = text_model.generate(**ids, **options)[0].tolist()
        at = next(i for i, token in enumerate(free) if i > 6 and 32 < token < 127)  # a whole character
        stop = tokenizer.decode(free[at])
        stopped = text_model.generate(**ids, **options, stop_strings=[stop])[0].tolist()
    finally:
        text_model.generation_config.eos_token_id = kept
    assert at < len(free) - 1
    assert stopped == free[: free.index(ord(stop), 5) + 1]


def test_custom_stopping_criteria_end_single_rows(model, random_ids):
    def first_row_after_twelve(ids, scores, **_):
        return torch.tensor([ids.shape[1] >= 12, False])

    ids = random_ids(2, 9)
    expected = generate(model, ids)
    assert not (expected == 125).any()
    # Finished rows are padded only where there is a stop id.
    options = {"stopping_criteria": StoppingCriteriaList([first_row_after_twelve]), "eos_token_id": 125}
    generated = generate(model, ids, **options)
    assert torch.equal(generated[0, :12], expected[0, :12])
    assert generated[0, 12:].tolist() == [127] * (9 + NEW - 12)  # the pad token
    assert torch.equal(generated[1], expected[1])


@pytest.fixture(scope="module")
def generator(text_model, tokenizer):
    return pipeline("text-generation", model=text_model, tokenizer=tokenizer)


def continuation(text_model, tokenizer, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    generated = text_model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(generated[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


def test_pipeline_continues_one_prompt_and_a_batch(generator, text_model, tokenizer):
    prompts = ["Hello", "A much longer prompt than that", "中文"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = [continuation(text_model, tokenizer, prompt) for prompt in prompts]
    assert generator(prompts[0], **options) == [{"generated_text": expected[0]}]
    batch = generator(prompts, batch_size=3, **options)
    assert [outputs[0]["generated_text"] for outputs in batch] == expected


def test_pipeline_answers_a_chat(generator, text_model, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_assistant|>assistant<|im_middle|>")
    outputs = generator(messages, max_new_tokens=8, do_sample=False)
    answer = outputs[0]["generated_text"]
    assert answer[:-1] == messages
    assert answer[-1] == {"role": "assistant", "content": continuation(text_model, tokenizer, prompt)}
