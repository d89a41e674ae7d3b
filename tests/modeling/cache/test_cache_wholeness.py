"""A failure at any point leaves a cache that holds exactly the tokens that it counts, or one that refuses.

Logits that continue a cache agree with those of a plain forward to 1e-4 of their norm: fp32, in another order of sums.
"""

import threading

import pytest
import torch
from failures import Injected, Stops, raises_at, rule_raises_at
from transformers import LogitsProcessor, LogitsProcessorList

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.prompt import segments as prompt_segments

PROMPT, CONTINUATION = 9, 3


def raising(*args, **kwargs):
    raise Injected


def failure_points(model):
    """Modules whose forward can fail: the first and the last of each layer, those that a cache update sits between."""
    names = ["lm_head", "model.norm"]
    for i, layer in enumerate(model.model.layers):
        names += [f"model.layers.{i}.{name}" for name in ("input_layernorm", "self_attn.o_proj")]
        names += [f"model.layers.{i}.self_attn.{'g_b_proj' if layer.is_kda else 'kv_a_layernorm'}"]
        names += [f"model.layers.{i}.{'block_sparse_moe.gate' if layer.is_moe else 'mlp'}"]
    return names


def fill(model, ids, recording=False):
    cache = KimiLinearCache(model.config)
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def expect_tokens(model, cache, ids):
    """`cache` holds ids, all layers of it: what continues it is what continues a plain forward."""
    assert cache.get_seq_length() == ids.shape[1]
    assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1]}
    new = torch.tensor([[17, 4]]).expand(ids.shape[0], -1)
    with torch.no_grad():
        got = model(new, past_key_values=cache).logits
        wanted = model(torch.cat([ids, new], dim=1), use_cache=False).logits[:, -2:]
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


def expect_refusal(model, cache):
    """Every use of `cache` is refused in words; reset makes it usable."""
    uses = {
        "forward": lambda: model(torch.tensor([[5]]), past_key_values=cache),
        "generate": lambda: model.generate(torch.ones(1, 20, dtype=torch.int64), past_key_values=cache),
        "crop": lambda: cache.crop(-1),
        "crop_rows": lambda: cache.crop_rows(torch.tensor([1])),
        "snapshot": cache.snapshot,
        "fork": lambda: cache.fork(1),
        "save": lambda: cache.save("never_written"),
        "reorder_cache": lambda: cache.reorder_cache(torch.tensor([0])),
        "batch_repeat_interleave": lambda: cache.batch_repeat_interleave(2),
    }
    for name, use in uses.items():
        with torch.no_grad(), pytest.raises(ValueError, match=r"not whole.*restore.*reset"):
            use()
            pytest.fail(name)


def with_failure(monkeypatch, model, name, call):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.get_submodule(name), "forward", raising)
        with pytest.raises(Injected):
            call()


def test_a_failed_prompt_leaves_an_empty_cache_empty(model, monkeypatch, random_ids):
    ids = random_ids(1, PROMPT)
    for recording in (False, True):
        for name in failure_points(model):
            cache = KimiLinearCache(model.config)
            if recording:
                cache.activate_past_recording()
            with_failure(monkeypatch, model, name, lambda: model(ids, past_key_values=cache))  # noqa: B023
            assert cache.get_seq_length() == 0 and cache.is_recording == recording
            with torch.no_grad():
                model(ids, past_key_values=cache)
            expect_tokens(model, cache, ids)


@pytest.mark.parametrize("new_tokens", [1, CONTINUATION])
def test_a_failed_call_that_records_is_taken_back(model, monkeypatch, random_ids, new_tokens):
    ids, new = random_ids(1, PROMPT), random_ids(1, new_tokens, seed=1)
    cache = fill(model, ids, recording=True)
    for name in failure_points(model):
        with_failure(monkeypatch, model, name, lambda: model(new, past_key_values=cache))
        fork = cache.fork(1)[0]
        expect_tokens(model, fork, ids)
        fork = cache.fork(1)[0]
        with torch.no_grad():
            model(new, past_key_values=fork)
            fork.crop(-new_tokens)
        expect_tokens(model, fork, ids)


@pytest.mark.parametrize("new_tokens", [1, 20])
def test_any_other_failed_call_makes_the_cache_refuse(model, monkeypatch, random_ids, new_tokens):
    ids, new = random_ids(1, PROMPT), random_ids(1, new_tokens, seed=1)
    whole = fill(model, ids)
    snapshot, untouched = whole.snapshot(), []
    for name in failure_points(model):
        cache = whole.fork(1)[0]
        with_failure(monkeypatch, model, name, lambda: model(new, past_key_values=cache))  # noqa: B023
        if cache.wholeness.is_whole:
            untouched.append(name)
            expect_tokens(model, cache, ids)
            continue
        expect_refusal(model, cache)
        cache.restore(snapshot)
        expect_tokens(model, cache, ids)
        cache.reset()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        expect_tokens(model, cache, ids)
    early = ["input_layernorm"] if new_tokens > 16 else ["input_layernorm", "self_attn.g_b_proj"]
    assert untouched == [f"model.layers.0.{name}" for name in early]  # nothing had been changed there


def test_a_failure_between_segments(model, monkeypatch, random_ids):
    monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 64)
    ids, new = random_ids(1, 200), random_ids(1, 150, seed=1)

    def fails_after(tokens):
        def progress(done, total):
            if done >= tokens:
                raise Injected

        return progress

    for tokens in (1, 100, 200):
        cache = KimiLinearCache(model.config)
        with torch.no_grad(), pytest.raises(Injected):
            model(ids, past_key_values=cache, prompt_progress=fails_after(tokens))
        assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids, past_key_values=cache)
    snapshot = cache.snapshot()
    with torch.no_grad(), pytest.raises(Injected):
        model(new, past_key_values=cache, prompt_progress=fails_after(1))
    expect_refusal(model, cache)
    cache.restore(snapshot)
    expect_tokens(model, cache, ids)


def test_bad_input_changes_nothing(model, random_ids):
    ids = random_ids(1, PROMPT)
    cache = fill(model, ids)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask"):
        model(ids, past_key_values=cache, attention_mask=torch.ones(1, 4))
    expect_tokens(model, cache, ids)


WAYS = {
    "plain": {},
    "sampled": {"do_sample": True},
    "recording": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"assistant_model": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["streamer", "processor", "rule"])
def test_an_interrupted_generate_goes_on_where_it_was(model, random_ids, way, what):
    ids = random_ids(1, PROMPT)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 127, **WAYS[way]}
    if "assistant_model" in options:
        options["assistant_model"] = model
    whole = model.generate(ids, **{**options, "do_sample": False})
    for at in (0, 1, 4):
        cache = KimiLinearCache(model.config)
        if way == "recording":
            cache.activate_past_recording()
        streamer = Stops(at if what == "streamer" else 1000)
        extra = {
            "streamer": {},
            "processor": {"logits_processor": raises_at(PROMPT + at)},
            "rule": {"stopping_criteria": rule_raises_at(PROMPT + 1 + at)},
        }[what]
        if "assistant_model" in options and what == "processor":
            continue  # the assistant has the processors too, and fails by itself
        with pytest.raises((Injected, KeyboardInterrupt)):
            model.generate(ids, past_key_values=cache, streamer=streamer, **extra, **options)
        text = torch.cat([ids, torch.tensor([streamer.seen], dtype=torch.int64)], dim=1)
        held = cache.get_seq_length()
        assert text.shape[1] - 1 <= held <= text.shape[1] or (held == 0 and at == 0)
        if held:
            expect_tokens(model, cache.fork(1)[0], text[:, :held])
        if not options["do_sample"]:
            assert torch.equal(text, whole[:, : text.shape[1]])
        left = whole.shape[1] - text.shape[1]
        continued = model.generate(text, past_key_values=cache, max_new_tokens=left, do_sample=False, pad_token_id=127)
        assert continued.shape == whole.shape
        if not options["do_sample"]:
            assert torch.equal(continued, whole)


def test_a_prompt_that_is_shorter_than_the_cache_says_so(model, random_ids):
    ids = random_ids(1, PROMPT)
    cache = fill(model, ids)
    for length in (PROMPT, PROMPT - 2):
        with pytest.raises(ValueError, match=f"prompt has {length} tokens and past_key_values holds {PROMPT}"):
            model.generate(ids[:, :length], past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"prompt has {PROMPT} tokens"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache, max_new_tokens=2)
    expect_tokens(model, cache, ids)


def test_kept_logits_go_when_the_cache_changes(model, random_ids):
    ids = random_ids(1, PROMPT)
    cache = KimiLinearCache(model.config)
    with pytest.raises(Injected):
        model.generate(ids, past_key_values=cache, max_new_tokens=4, logits_processor=raises_at(PROMPT))
    assert cache.next_logits is not None
    cache.activate_past_recording()
    with torch.no_grad():
        model(torch.tensor([[7]]), past_key_values=cache)
    cache.crop(-1)
    assert cache.next_logits is None
    with pytest.raises(ValueError, match="nothing is left to run"):
        model.generate(ids, past_key_values=cache, max_new_tokens=4)


def test_a_loaded_or_restored_cache_can_take_tokens_back(model, tmp_path, random_ids):
    ids = random_ids(1, PROMPT)
    filled = fill(model, ids)
    filled.save(tmp_path / "cache")
    loaded, restored = KimiLinearCache.load(tmp_path / "cache", model), KimiLinearCache(model.config)
    restored.restore(filled.snapshot())
    for cache in (loaded, restored):
        cache.activate_past_recording()
        for layer in cache.layers:
            if hasattr(layer, "begin_step"):  # as a captured step leaves it, which asks no layer of the model
                inner = layer.window.shape[1] // 3
                inputs = [torch.randn(1, 2, size) for size in [inner] * 4 + [layer.state.shape[1]]]
                window, state = layer.begin_step(2, 1, layer.window.shape[1:], layer.state.shape[1:], inputs[0])
                layer.store_step(tuple(inputs), None, *layer.weights.step(tuple(inputs), None, window, state, None)[1:])
            else:
                layer.update(
                    torch.randn(1, 1, 2, layer.latent_dim), torch.randn(1, 1, 2, model.config.qk_rope_head_dim)
                )
        cache.crop(-2)
        expect_tokens(model, cache.fork(1)[0], ids)
        text = torch.cat([ids, ids[:, :3]], dim=1)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 127, "eos_token_id": 126}  # 5.10 wants one
        expected = model.generate(text, **options)
        output = model.generate(text, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(output, expected)


def test_recording_begun_in_inference_mode_goes_on_outside_of_it(model, random_ids):
    ids = random_ids(2, PROMPT + 200)
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording(40)
    with torch.inference_mode():
        model(ids[:, :PROMPT], past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 1]))
    with torch.no_grad():
        for t in range(PROMPT, PROMPT + 50):
            model(ids[:, t : t + 1], past_key_values=cache)
    with torch.inference_mode():
        model(ids[:, PROMPT + 50 : PROMPT + 52], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 1]))
    with torch.no_grad():
        model(ids[:, PROMPT + 52 : PROMPT + 54], past_key_values=cache)
        cache.crop(-3)
    expect_tokens(model, cache, ids[:, : PROMPT + 51])


def test_a_count_given_as_a_tensor_stays_out_of_the_counts(model, random_ids):
    """transformers gives crop a 0-dim tensor: an in-place sum over one would move checkpoints with the length."""
    ids = random_ids(1, PROMPT)
    cache = fill(model, ids, recording=True)
    for t in range(6):
        with torch.no_grad():
            model(random_ids(1, 5, seed=t), past_key_values=cache)
        cache.crop(torch.tensor(-4))
        new = random_ids(1, 5, seed=t)[:, :1]
        ids = torch.cat([ids, new], dim=1)
        assert all(type(layer.get_seq_length()) is int for layer in cache.layers)
    expect_tokens(model, cache.fork(1)[0], ids)
    cache.crop(torch.tensor(-5))
    expect_tokens(model, cache, ids[:, :-5])


@pytest.mark.parametrize("name", ["crop", "restore", "reorder_cache"])
def test_a_change_that_fails_half_way(model, monkeypatch, random_ids, name):
    ids = random_ids(1, PROMPT)
    cache = fill(model, ids, recording=True)
    snapshot = cache.snapshot()
    calls = {
        "crop": ("roll_back", lambda: cache.crop(-2)),
        "restore": ("restore", lambda: cache.restore(snapshot)),
        "reorder_cache": ("reorder_cache", lambda: cache.reorder_cache(torch.tensor([0]))),
    }
    method, call = calls[name]
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[-1], method, raising)
        with pytest.raises(Injected):
            call()
    expect_refusal(model, cache)
    cache.restore(snapshot)
    expect_tokens(model, cache, ids)


def test_a_second_thread_is_refused_while_a_forward_runs(model, monkeypatch, random_ids):
    ids = random_ids(1, PROMPT)
    cache = fill(model, ids)
    inside, done, errors = threading.Event(), threading.Event(), []
    norm = model.model.norm.forward

    def waits(*args, **kwargs):
        if not inside.is_set():
            inside.set()
            assert done.wait(60)
        return norm(*args, **kwargs)

    def other():
        inside.wait(60)
        for use in (lambda: model(torch.tensor([[5]]), past_key_values=cache), cache.snapshot, cache.reset):
            try:
                with torch.no_grad():
                    use()
            except ValueError as error:
                errors.append(str(error))
        done.set()

    monkeypatch.setattr(model.model.norm, "forward", waits)
    thread = threading.Thread(target=other)
    thread.start()
    with torch.no_grad():
        model(torch.tensor([[3]]), past_key_values=cache)
    thread.join()
    assert len(errors) == 3 and all("another thread (a forward)" in error for error in errors)
    expect_tokens(model, cache, torch.cat([ids, torch.tensor([[3]])], dim=1))


def test_kept_logits_are_those_before_the_processors(model, random_ids):
    """A processor that writes into its logits, as grammars do, must not ban its tokens in a later call without it."""

    class Bans(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill_(1, scores.argmax(dim=-1), -torch.inf)

    ids, cache = random_ids(1, PROMPT), KimiLinearCache(model.config)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 127}
    with pytest.raises(KeyboardInterrupt):
        processors = LogitsProcessorList([Bans()])
        model.generate(ids, past_key_values=cache, logits_processor=processors, streamer=Stops(0), **options)
    assert cache.get_seq_length() == PROMPT
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
