"""
Decoding by steps against decoding layer by layer, in Triton's interpreter on a CPU.

Logits in fp32 agree to 1e-5 of their norm: some hundred operations of eps 1.2e-7 each, in another order.
"""

import copy
import dataclasses
import gc
import pickle
import threading

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import MASK, PROMPT, close, few_programs, layer_by_layer, make_model, stepping
from transformers.generation import BaseStreamer, LogitsProcessor, LogitsProcessorList, stopping_criteria

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import loop as decode_loop
from kimi_linear.modeling.decode.step import DecodeStep

__all__ = ["few_programs", "stepping"]  # fixtures


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_step_equals_layers(batch, tokens, shared):
    model = make_model(num_shared_experts=shared)
    prompt, mask = PROMPT[-batch:], MASK[-batch:]
    caches = [KimiLinearCache(model.config), KimiLinearCache(model.config)]
    for cache in caches:
        model.model(prompt, attention_mask=mask, past_key_values=cache)
    step = DecodeStep(model, batch, tokens)
    for _ in range(3):
        new = torch.randint(0, 120, (batch, tokens))
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        hidden = model.model(new, attention_mask=mask, past_key_values=caches[0]).last_hidden_state
        logits = step(caches[1], new, mask.bool() if batch > 1 else None)
        assert close(logits, model.lm_head(hidden))
    assert caches[1].get_seq_length() == caches[0].get_seq_length()
    for stepped, expected in zip(caches[1].layers, caches[0].layers):
        kept = ("state", "window") if hasattr(expected, "state") else ("rows",)
        assert all(close(getattr(stepped, name), getattr(expected, name)) for name in kept)


@torch.no_grad()
def test_one_step_serves_caches_in_turn_and_growing_ones(model):
    """Addresses and lengths are data: another cache, or one that moved, needs no other step."""
    step = DecodeStep(model, 1, 1)
    caches = [KimiLinearCache(model.config) for _ in range(2)]
    expected = [KimiLinearCache(model.config) for _ in range(2)]
    for i in range(2):
        for cache in (caches[i], expected[i]):
            model.model(PROMPT[i : i + 1, : 5 + i], past_key_values=cache)
    new = torch.tensor([[7]])
    for turn in range(4):
        if turn == 2:
            for layer in caches[0].layers:
                if hasattr(layer, "reserve"):
                    layer.reserve(5000)
        for i in range(2):
            exact = model.lm_head(model.model(new, past_key_values=expected[i]).last_hidden_state)
            assert close(step(caches[i], new), exact)


def greedy(model, **options):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(PROMPT, attention_mask=MASK, **options)


def test_greedy_and_sampled_text(model, stepping):
    expected = layer_by_layer(model, lambda: greedy(model))
    assert not stepping and model.decode_path.startswith("captured steps")
    assert torch.equal(greedy(model), expected)
    assert stepping == [(2, 1)] * 3

    def sampled():
        torch.manual_seed(1)
        return greedy(model, do_sample=True, temperature=1.3, top_k=20, repetition_penalty=1.2)

    assert torch.equal(sampled(), layer_by_layer(model, sampled))


@pytest.mark.parametrize("seed", range(20))
def test_draws_are_those_of_multinomial(seed):
    scores = 3 * torch.randn(3, 200 + 37 * seed, generator=torch.Generator().manual_seed(seed))
    scores[:, ::3] = -torch.inf
    scores[1, 5:] = -torch.inf
    torch.manual_seed(seed)
    expected, following = torch.multinomial(scores.softmax(-1), 1)[:, 0], torch.rand(3)
    torch.manual_seed(seed)
    tokens, sound = decode_loop._draw(scores)
    assert torch.equal(tokens, expected) and bool(sound.all())
    assert torch.equal(torch.rand(3), following)


def test_sampling_from_nothing_is_refused(model, stepping):
    class Spoils(LogitsProcessor):
        def __init__(self, bad):
            self.bad = bad

        def __call__(self, input_ids, scores):
            return scores if input_ids.shape[1] < 10 else torch.full_like(scores, self.bad)

    for bad, eos_token_id in ((-torch.inf, None), (torch.inf, 119), (torch.nan, None), (-torch.inf, 119)):
        processors = LogitsProcessorList([Spoils(bad)])
        with pytest.raises(RuntimeError, match=r"nothing to sample from in rows \[0, 1\]"):
            greedy(model, do_sample=True, eos_token_id=eos_token_id, logits_processor=processors)
    assert len(stepping) < 4 * 3  # with an end token to look for, it stops there
    assert torch.equal(greedy(model), layer_by_layer(model, lambda: greedy(model)))


def test_a_text_longer_than_trained_for_is_warned_of(model, stepping, monkeypatch):
    heard = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", heard.append)
    monkeypatch.setattr(model.config, "model_max_length", 12)
    greedy(model, max_new_tokens=6)
    assert stepping and len(heard) == 1 and "(12)" in heard[0]


def test_stopping_rules_leave_the_cache_as_it_was(model, stepping):
    """The step after the last token runs before the host knows that it is the last: it must leave no trace."""
    text = layer_by_layer(model, lambda: greedy(model, max_new_tokens=6))[:, 9:]
    options = {"max_new_tokens": 6, "eos_token_id": [int(text[0, 1]), int(text[1, 3])], "return_dict_in_generate": True}
    expected = layer_by_layer(model, lambda: greedy(model, **options))
    output = greedy(model, **options)
    assert torch.equal(output.sequences, expected.sequences) and expected.sequences.shape[1] < 15
    assert len(stepping) == output.sequences.shape[1] - 9  # one more than needed, for nothing
    assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for layer, wanted in zip(output.past_key_values.layers, expected.past_key_values.layers):
        kept = ("state", "window") if hasattr(wanted, "state") else ("rows",)
        assert all(close(getattr(layer, name), getattr(wanted, name)) for name in kept)


def test_records_and_continued_chats(model, stepping):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": None}
    expected = layer_by_layer(model, lambda: greedy(model, **options))
    output = greedy(model, **options)
    for name in ("scores", "logits"):
        assert len(getattr(output, name)) == 4
        assert all(close(x, y) for x, y in zip(getattr(output, name), getattr(expected, name)))
    longer = torch.cat([output.sequences, PROMPT[:, :3]], dim=1)
    mask = torch.nn.functional.pad(MASK, (0, 7), value=1)

    def go_on(cache):
        return model.generate(longer, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip

    expected = layer_by_layer(model, lambda: go_on(expected.past_key_values))
    assert torch.equal(go_on(output.past_key_values), expected)


def test_beams_take_steps_through_forward(model, stepping):
    expected = layer_by_layer(model, lambda: greedy(model, num_beams=2, max_new_tokens=5))
    assert torch.equal(greedy(model, num_beams=2, max_new_tokens=5), expected)
    assert (4, 1) in stepping


@torch.no_grad()
def test_what_a_step_cannot_answer_goes_by_layers(model, stepping):
    cache = model(PROMPT, attention_mask=MASK, use_cache=True).past_key_values
    new, mask = torch.tensor([[5], [6]]), torch.nn.functional.pad(MASK, (0, 1), value=1)
    outputs = model(new, attention_mask=mask, past_key_values=cache, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    holes = torch.nn.functional.pad(mask, (0, 1))  # the new token of each row is padding
    model(new, attention_mask=holes, past_key_values=cache)
    assert not stepping
    model(new, attention_mask=torch.nn.functional.pad(holes, (0, 1), value=1), past_key_values=cache)
    assert stepping == [(2, 1)]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.tensor([[5], [999]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"position_ids are \[1, 11\]"):
        model(new, past_key_values=cache, position_ids=torch.arange(11)[None])


def test_reasons(model, stepping):
    def reason():
        return model.decode_path.removeprefix("layer by layer: ")

    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "model.layers.0 has a hook" in reason()
    handle.remove()
    model.config.kda_backend = "torch"
    assert "kda_backend is 'torch'" in reason()
    model.config.kda_backend = "auto"
    assert reason().startswith("captured steps")
    model.config.is_causal = False  # steps of several tokens are causal
    assert reason() == "is_causal is False" and model.prompt_path == f"layer by layer: {reason()}"
    del model.config.is_causal
    assert reason().startswith("captured steps")
    layer, plain = model.model.layers[0].mlp, model.model.layers[0].mlp.up_proj
    layer.up_proj = torch.nn.Sequential(plain)
    layer.up_proj[0].weight = torch.nn.Parameter(plain.weight.clone())
    assert "Sequential" in reason()
    layer.up_proj = plain
    assert reason().startswith("captured steps")


def test_backward_hooks_do_not_count(stepping):
    """Also where the first look comes with gradients on: what is remembered is for steps, which have none."""
    model = make_model()
    model.model.layers[0].self_attn.o_proj.register_full_backward_hook(lambda *args: None)
    assert model.decode_path.startswith("captured steps")
    assert model.prompt_path.startswith("packed plans")


def test_training_mode_takes_steps_too(model, stepping):
    """RL loops generate in training mode: nothing in the model depends on it but the counts of routed tokens."""
    expected = layer_by_layer(model, lambda: greedy(model))
    model.train()
    try:
        assert torch.equal(greedy(model), expected)
    finally:
        model.eval()
    assert len(stepping) == 3


def test_replaced_weights_are_seen(model, stepping):
    model = copy.deepcopy(model)
    before = greedy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    after = greedy(model)
    assert torch.equal(after, layer_by_layer(model, lambda: greedy(model)))
    assert not torch.equal(after, before)


def test_copies_and_pickles(stepping):
    model = make_model()  # transformers' recorders, which other tests leave on theirs, can't be pickled
    expected = layer_by_layer(model, lambda: greedy(model))
    greedy(model)  # a copy of a model with captured steps takes none of them along
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(greedy(twin), expected)


def test_inference_mode_and_a_model_that_goes(stepping):
    model = make_model()
    with torch.inference_mode():
        expected = greedy(model)
    assert torch.equal(greedy(model), expected)
    step = model._decode.step(model, 2, 1)
    assert step.plan._model() is model
    del model
    gc.collect()
    assert step.plan._model() is None


def test_interruption_leaves_the_model_usable(model, stepping):
    class Breaks(BaseStreamer):
        def __init__(self):
            self.left = 4

        def put(self, value):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def end(self):
            pass

    expected = layer_by_layer(model, lambda: greedy(model))
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT[:1], streamer=Breaks(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy(model), expected)


def test_two_threads(model, stepping):
    prompts, texts = [PROMPT[:1], PROMPT[1:]], [None, None]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = layer_by_layer(model, lambda: [model.generate(prompt, **options) for prompt in prompts])

    def work(i):
        texts[i] = model.generate(prompts[i], **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(text, wanted) for text, wanted in zip(texts, expected))


@torch.no_grad()
def test_steps_record_what_a_rollback_needs(model, stepping):
    """Tokens taken by steps go back bit for bit: the replay is the step's own kernel."""
    caches = []
    for taken in (2, 4):
        cache = KimiLinearCache(model.config)
        model.model(PROMPT, attention_mask=MASK, past_key_values=cache)
        cache.activate_past_recording()  # after the prompt, which the layers have stepped through in PyTorch
        for layer in cache.layers:
            if hasattr(layer, "weights"):  # "auto" on a GPU; here it has to be named for the replay
                layer.weights = dataclasses.replace(layer.weights, backend="triton")
        mask = MASK
        for i in range(taken):
            new = torch.tensor([[20 + i], [30 + i]]) if i < 2 else torch.tensor([[50], [60]])
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(new, attention_mask=mask, past_key_values=cache)
        caches.append(cache)
    assert stepping == [(2, 1)] * 6
    caches[1].crop(-2)
    assert caches[1].get_seq_length() == caches[0].get_seq_length()
    for layer, wanted in zip(caches[1].layers, caches[0].layers):
        kept = ("state", "window") if hasattr(wanted, "state") else ("rows",)
        assert all(torch.equal(getattr(layer, name), getattr(wanted, name)) for name in kept)


def test_prompt_lookup_takes_steps_of_several_tokens(model, stepping):
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 119, "pad_token_id": 0}
    expected = layer_by_layer(model, lambda: model.generate(prompt, **options))
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), expected)
    assert any(tokens > 1 for _, tokens in stepping)
