"""
Steps of several parts, all on the CPU in Triton's interpreter: the bits are those of one part.

A made-up map says where the parts end. What devices do to them is in tests/gpu/test_two_gpus.py.
"""

import re
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import MASK, PROMPT, close, few_programs, layer_by_layer, make_model, same_cache, stepping
from tiny_checkpoints import tiny_config

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.decode import step as decode_step
from kimi_linear.modeling.decode.step import DecodeStep
from kimi_linear.modeling.placement import LayerSpan, layer_spans
from kimi_linear.modeling.prompt import path as prompt_path

__all__ = ["few_programs", "stepping"]  # fixtures
CPU = torch.device("cpu")
NEW = torch.tensor([[7]])


def spans_of(layers, ends):
    """Spans that end after these numbers of modules, of which the embedding is the first and the head the last."""
    begins = [0, *ends]
    return [
        LayerSpan(CPU, max(begin - 1, 0), min(end - 1, layers), begin == 0, end == layers + 2)
        for begin, end in zip(begins, [*ends, layers + 2])
    ]


@pytest.fixture
def split(monkeypatch):
    """Lets the steps made from here on have parts that end after so many modules."""

    def into(*ends):
        for module in (decode_step, prompt_path):
            monkeypatch.setattr(module, "layer_spans", lambda model: spans_of(len(model.model.layers), ends))

    return into


@pytest.fixture(scope="module")
def model():
    return make_model()


class Placed:
    """Stands for a module whose weight is on a device."""

    def __init__(self, device):
        self.weight = torch.empty(0, device=device)
        self.input_layernorm = self


@pytest.mark.parametrize(("map_", "expected"), [
    ("cccc", [("c", 0, 2, True, True)]),
    ("cmcm", [("c", 0, 0, True, False), ("m", 0, 1, False, False), ("c", 1, 2, False, False),
              ("m", 2, 2, False, True)]),
    ("ccmm", [("c", 0, 1, True, False), ("m", 1, 2, False, True)]),
    ("cccm", [("c", 0, 2, True, False), ("m", 2, 2, False, True)]),
    ("cmmm", [("c", 0, 0, True, False), ("m", 0, 2, False, True)]),
    ("cmcmcmc", [("c", 0, 0, True, False), ("m", 0, 1, False, False), ("c", 1, 2, False, False),
                 ("m", 2, 3, False, False), ("c", 3, 4, False, False), ("m", 4, 5, False, False),
                 ("c", 5, 5, False, True)]),
])  # fmt: skip
def test_spans_of_a_map(map_, expected):
    names = {"c": torch.device("cpu"), "m": torch.device("meta")}
    embed, *layers, head = (Placed(names[letter]) for letter in map_)
    decoder = type("Decoder", (), {"embed_tokens": embed, "layers": layers})
    spans = layer_spans(type("Model", (), {"model": decoder, "lm_head": head}))
    assert spans == [LayerSpan(names[letter], *rest) for letter, *rest in expected]
    if map_ == "cccc":
        assert spans == spans_of(2, ())


@torch.no_grad()
@pytest.mark.parametrize(("ends", "tokens"), [((2,), 1), ((1, 2, 3), 2)], ids=str)
def test_several_parts_give_the_bits_of_one(model, split, ends, tokens):
    caches = [KimiLinearCache(model.config) for _ in range(2)]
    for cache in caches:
        if tokens > 1:
            cache.activate_past_recording()
        model.model(PROMPT, attention_mask=MASK, past_key_values=cache)
    whole = DecodeStep(model, 2, tokens)
    split(*ends)
    parts = DecodeStep(model, 2, tokens)
    assert len(parts.parts) == len(ends) + 1 and len(whole.parts) == 1
    for part in parts.plans:
        for buffer in part.buffers():  # nothing depends on what a buffer held
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
    mask = MASK
    for turn in range(2):
        new = torch.tensor([[7, 5], [9, 3 + turn]])[:, -tokens:]
        mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
        assert torch.equal(parts(caches[0], new, mask.bool()), whole(caches[1], new, mask.bool()))
    for stepped, expected in zip(caches[0].layers, caches[1].layers):
        for name in ("state", "window") if hasattr(expected, "state") else ("rows",):
            assert torch.equal(getattr(stepped, name), getattr(expected, name))


@torch.no_grad()
def test_seven_parts_over_five_layers(split):
    """As a map that alternates, 0, 1, 0, 1, ..., gives them."""
    config = tiny_config(kda_layers=(1, 2, 3), full_attn_layers=(4, 5))
    model = make_model(linear_attn_config={**config["linear_attn_config"], "num_heads": 2}, num_hidden_layers=5)
    caches = [model.model(PROMPT[:1], use_cache=True).past_key_values for _ in range(2)]
    whole = DecodeStep(model, 1, 1)
    split(1, 2, 3, 4, 5, 6)
    parts = DecodeStep(model, 1, 1)
    assert len(parts.parts) == 7
    assert torch.equal(parts(caches[0], NEW), whole(caches[1], NEW))


def test_text_and_drafts_by_parts(model, stepping, split):
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 119, "pad_token_id": 0}
    expected = layer_by_layer(model, lambda: model.generate(PROMPT, attention_mask=MASK, **options))
    prompt = PROMPT[1:].repeat(1, 2)
    drafted = layer_by_layer(model, lambda: model.generate(prompt, prompt_lookup_num_tokens=3, **options))
    split(2, 3)
    model._decode._steps.clear()
    assert torch.equal(model.generate(PROMPT, attention_mask=MASK, **options), expected)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), drafted)
    assert stepping and all(len(step.parts) == 3 for step in model._decode._steps.values())
    model._decode._steps.clear()


@torch.no_grad()
def test_packed_prompts_by_parts(model, split, monkeypatch):
    monkeypatch.setattr(decode_path, "gpu_has_kernels", lambda model: True)
    mask, longer = MASK.clone(), PROMPT.repeat(1, 2)
    mask[1, 4] = 0  # a hole

    def outputs():
        first = model(PROMPT, attention_mask=mask, use_cache=True)
        cache = first.past_key_values
        second = model(longer, attention_mask=torch.cat([mask, mask, mask], dim=1), past_key_values=cache)
        held = [getattr(x, name) for x in cache.layers for name in ("state", "window", "rows") if hasattr(x, name)]
        return [first.logits, second.logits, *held]

    model._prompts.clear()
    whole = outputs()
    assert model._prompts._runs
    split(1, 2, 3)
    model._prompts.clear()
    assert all(map(torch.equal, outputs(), whole))
    assert {len(run.parts) for run in model._prompts._runs.values()} == {3}  # the head's device has no layers
    model._prompts.clear()


def test_rows_in_turn_through_parts(model, stepping, split, monkeypatch):
    monkeypatch.setattr(decode_path, "MAX_STEP_TOKENS", 1)
    split(2)
    model._decode._steps.clear()
    mask = torch.nn.functional.pad(MASK, (0, 1), value=1)
    new = torch.tensor([[7], [9]])
    with torch.no_grad():
        caches = [model.model(PROMPT, attention_mask=MASK, use_cache=True).past_key_values for _ in range(2)]
        expected = layer_by_layer(model, lambda: model(new, attention_mask=mask, past_key_values=caches[0]).logits)
        logits = model(new, attention_mask=mask, past_key_values=caches[1]).logits
    assert close(logits, expected) and same_cache(caches[1], caches[0])
    assert stepping == [(1, 1)] * 2
    model._decode._steps.clear()


@torch.no_grad()
def test_hooks_of_accelerate_that_place_are_honoured(stepping, tmp_path):
    """Real hooks on every module; one that brings weights from disk keeps the layers, and is named."""
    accelerate = pytest.importorskip("accelerate")
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = make_model()
    expected = layer_by_layer(model, lambda: model.generate(PROMPT[1:], **options))
    dispatch = partial(accelerate.dispatch_model, main_device="cpu", force_hooks=True)
    placed = dispatch(make_model(), dict.fromkeys(names, "cpu"))
    assert "_hf_hook" in placed.model.layers[0].self_attn.o_proj.__dict__
    assert placed.decode_path.startswith("captured steps: ")
    assert torch.equal(placed.generate(PROMPT[1:], **options), expected) and stepping == [(1, 1)] * 2
    stepping.clear()
    for disk in ("model.layers.1", "lm_head"):
        places = {name: "disk" if name == disk else "cpu" for name in names}
        offloaded = dispatch(make_model(), places, offload_dir=tmp_path / disk)
        assert re.match(f"layer by layer: {disk}.* has weights that accelerate brings", offloaded.decode_path)
        assert "all weights on GPUs" in offloaded.decode_path
        assert torch.equal(offloaded.generate(PROMPT[1:], **options), expected) and not stepping


@torch.no_grad()
def test_layers_that_a_step_can_not_read_are_named(stepping):
    model = make_model()
    model.model.layers[0].mlp.up_proj.to("meta")
    assert "model.layers.0.mlp.up_proj.weight is a Parameter of torch.float32 on meta" in model.decode_path
    model = make_model()
    model.model.layers[1].half()
    assert "layers.1.self_attn" in model.decode_path and "torch.float16 on cpu, beside" in model.decode_path


class Replays:
    """Stands for a part's graph: runs it, or raises before or after."""

    def __init__(self, part, when=None):
        self._plan, self.when = part.plan, when

    def replay(self):
        when, self.when = self.when, None
        if when == "before":
            raise KeyboardInterrupt
        self._plan.launch()
        if when == "after":
            raise KeyboardInterrupt


def fill(model, recording):
    cache = KimiLinearCache(model.config)
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model.model(PROMPT[1:], past_key_values=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize(("part", "when"), [(0, "before"), (1, "before"), (2, "after")])
def test_a_part_that_ran_while_another_did_not(model, stepping, split, part, when, recording):
    """Only where no part has changed the cache, or the past is recorded, the cache is what it was."""
    split(2, 3)
    step, cache, wanted = DecodeStep(model, 1, 1), fill(model, recording), fill(model, False)
    for i, held in enumerate(step.parts):
        held._graph = Replays(held, when if i == part else None)
    with pytest.raises(KeyboardInterrupt):
        step(cache, NEW)
    changed = (part, when) != (0, "before")
    if changed and not recording:
        with pytest.raises(ValueError, match="a decode step failed"):
            step(cache, NEW)
        return
    assert same_cache(cache, wanted)
    assert close(step(cache, NEW), DecodeStep(model, 1, 1)(wanted, NEW)) and same_cache(cache, wanted)


@pytest.mark.parametrize(("part", "when"), [(0, "before"), (0, "after"), (2, "before")])
def test_a_loop_finishes_a_step_that_an_interruption_divided(model, stepping, split, part, when):
    options = {"do_sample": False, "pad_token_id": 127, "eos_token_id": 126}
    split(2, 3)
    model._decode._steps.clear()
    whole = model.generate(PROMPT[1:], max_new_tokens=3, **options)
    step, cache, seen = model._decode.step(model, 1, 1), KimiLinearCache(model.config), []

    class Streams:
        def put(self, value):
            seen.append(int(value.flatten()[-1]))
            if len(seen) == 2:  # the prompt, and a token
                for i, held in enumerate(step.parts):
                    held._graph = Replays(held, when if i == part else None)

        def end(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT[1:], past_key_values=cache, streamer=Streams(), max_new_tokens=3, **options)
    for held in step.parts:
        held._graph = None
    length = PROMPT.shape[1] + len(seen) - 1
    held = length - 1 if (part, when) == (0, "before") else length
    assert {layer.get_seq_length() for layer in cache.layers} == {held}
    kept = None if held < length else cache.next_logits.logits.clone()
    model.generate(PROMPT[:1], max_new_tokens=3, **options)  # by the same step, whose logits the cache must not share
    assert kept is None or torch.equal(cache.next_logits.logits, kept)
    text = model.generate(whole[:, :length], past_key_values=cache, max_new_tokens=12 - length, **options)
    assert torch.equal(text, whole)
    model._decode._steps.clear()
