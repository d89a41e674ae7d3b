"""Captured steps that fail or are interrupted, in Triton's interpreter.

What continues a cache agrees with the layers to 1e-5 of the norm, as in test_decode_step_interpreted.py.
"""

# ruff: noqa: F811 (fixtures are imported by name)
import threading

import pytest
import torch

pytest.importorskip("triton")

from failures import Injected, Stops, raises_at, rule_raises_at
from test_decode_step_interpreted import close, few_programs, make_model, model, stepping  # noqa: F401

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import loop as decode_loop
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.decode import plan as decode_plan
from kimi_linear.modeling.decode.step import DecodeStep

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32]])
LAUNCHES = [name for name in vars(decode_plan) if name.startswith(("decode_", "kda_step"))]


def fill(model, recording):
    cache = KimiLinearCache(model.config)
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model.model(IDS, past_key_values=cache)
    return cache


def expect_tokens(model, cache, ids, monkeypatch):
    """All layers of `cache` hold `ids`; checked layer by layer."""
    assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1]}
    new = torch.tensor([[17]])
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(decode_path, "gpu_has_kernels", lambda model: False)
        got = model(new, past_key_values=cache.fork(1)[0]).logits
        assert close(got, model(torch.cat([ids, new], dim=1), use_cache=False).logits[:, -1:])


def failing_launches(patch, at):
    """Lets the `at`-th launch of a step fail; returns the list of launches that were tried."""
    tried = []

    def wrapped(launch):
        def counted(*args, **kwargs):
            tried.append(launch.__name__)
            if len(tried) == at:
                raise Injected
            return launch(*args, **kwargs)

        return counted

    for name in LAUNCHES:
        patch.setattr(decode_plan, name, wrapped(getattr(decode_plan, name)))
    return tried


@pytest.mark.parametrize("recording", [True, False])
def test_a_launch_that_fails(model, stepping, monkeypatch, recording):
    new = torch.tensor([[5]])
    with monkeypatch.context() as patch, torch.no_grad():
        launches = failing_launches(patch, at=0)
        model(new, past_key_values=fill(model, recording))
    assert len(launches) > 8 and stepping == [(1, 1)]
    whole = fill(model, recording)
    snapshot = whole.snapshot()
    for at in range(1, len(launches) + 1, 1 if recording else 5):
        cache = whole.fork(1)[0]
        with monkeypatch.context() as patch, torch.no_grad():
            failing_launches(patch, at)
            with pytest.raises(Injected):
                model(new, past_key_values=cache)
        if not recording:
            with pytest.raises(ValueError, match="a decode step failed"), torch.no_grad():
                model(new, past_key_values=cache)
            cache.restore(snapshot)
        expect_tokens(model, cache, IDS, monkeypatch)
    with torch.no_grad():
        model(new, past_key_values=cache)
    expect_tokens(model, cache, torch.cat([IDS, new], dim=1), monkeypatch)


def test_a_step_that_fails_before_it_runs_changes_nothing(model, stepping, monkeypatch):
    cache = fill(model, recording=False)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(cache.layers[-1]), "reserve", lambda *args: (_ for _ in ()).throw(Injected()))
        with pytest.raises(Injected):
            model(torch.tensor([[5]]), past_key_values=cache)
    expect_tokens(model, cache, IDS, monkeypatch)


@pytest.mark.parametrize(
    ("point", "recording"),
    [
        ("streamer", False),
        ("processor", False),
        ("rule", False),
        ("before_run", False),
        ("before_run", True),
        ("after_run", True),
        ("answer", False),
        ("commit", True),
        ("after_commit", False),
    ],
)
def test_an_interrupted_loop_of_steps(model, stepping, monkeypatch, point, recording):
    """Ctrl-C at any point: the cache holds the tokens that were yielded, maybe but the last, and generate() goes on."""
    options = {"do_sample": False, "pad_token_id": 127, "eos_token_id": 126}
    whole, at = model.generate(IDS, max_new_tokens=4, **options), 2
    cache, calls = fill(model, recording), []
    cache.reset()
    streamer = Stops(at if point == "streamer" else 99)
    extra = {}
    if point == "processor":
        extra["logits_processor"] = raises_at(IDS.shape[1] + at)
    if point == "rule":
        extra["stopping_criteria"] = rule_raises_at(IDS.shape[1] + at)

    def interrupts(function, late):
        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == at and not late:
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            if len(calls) == at:
                raise KeyboardInterrupt
            return result

        return wrapped

    places = {
        "before_run": (DecodeStep, "run", False),
        "after_run": (DecodeStep, "run", True),
        "answer": (decode_loop._Answer, "read", False),
        "commit": (type(cache.layers[-1]), "advance", False),
        "after_commit": (DecodeStep, "commit", True),
    }
    with monkeypatch.context() as patch:
        if point in places:
            owner, name, late = places[point]
            patch.setattr(owner, name, interrupts(getattr(owner, name), late))
        with pytest.raises((Injected, KeyboardInterrupt)):
            model.generate(IDS, past_key_values=cache, streamer=streamer, max_new_tokens=4, **extra, **options)
    text = torch.cat([IDS, torch.tensor([streamer.seen], dtype=torch.int64)], dim=1)
    assert torch.equal(text, whole[:, : text.shape[1]]) and text.shape[1] > IDS.shape[1]
    if point == "before_run" and not recording:  # outside a GPU nobody knows how far such a step came
        with pytest.raises(ValueError, match="a decode step failed"):
            model.generate(text, past_key_values=cache, max_new_tokens=2, **options)
        return
    held = cache.get_seq_length()
    assert text.shape[1] - 1 <= held <= text.shape[1]
    expect_tokens(model, cache, text[:, :held], monkeypatch)
    left = whole.shape[1] - text.shape[1]
    assert torch.equal(model.generate(text, past_key_values=cache, max_new_tokens=left, **options), whole)


def test_a_graph_that_was_not_launched_left_the_cache_alone(model, stepping, monkeypatch):
    """On a GPU a step runs whole or not at all, and the device knows which."""
    step = DecodeStep(model, 1, 1)
    cache = fill(model, recording=False)

    class Replays:
        def __init__(self, launches):
            self.launches = launches

        def replay(self):
            if self.launches:
                step.plan.launch()
            raise KeyboardInterrupt

    new = torch.tensor([[5]])
    for launches in (False, True):
        step.parts[0]._graph = Replays(launches)
        taken = cache.fork(1)[0]
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            step(taken, new)
        if launches:  # the caller doesn't know that it ran, so it can't count
            with pytest.raises(ValueError, match="a decode step failed"), torch.no_grad():
                model(new, past_key_values=taken)
        else:
            expect_tokens(model, taken, IDS, monkeypatch)


def test_two_threads_on_one_cache(model, stepping, monkeypatch):
    """Every step of either thread is counted once, or refused because the other one is at it."""
    cache, taken = fill(model, recording=False), []

    def work():
        for _ in range(3):
            try:
                with torch.no_grad():
                    model(torch.tensor([[5]]), past_key_values=cache)
                taken.append(5)
            except ValueError as error:
                assert "another thread" in str(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) >= 3
    expect_tokens(model, cache, torch.cat([IDS, torch.tensor([taken])], dim=1), monkeypatch)
