"""What `generate()` returns beside tokens, the caches it can be asked for, and the requests it must refuse."""

import contextlib

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.generate.refusals import check_cache_implementation

CONFIGS = ["hybrid", "all_kda", "all_mla"]
NEW = 8


def generate(model, ids: torch.Tensor, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **options})


# Outputs

ALL_OUTPUTS = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_every_output_comes_once_a_step_and_layer(options, load_tiny, random_ids):
    model = load_tiny(attn_implementation="eager")
    outputs = generate(model, random_ids(2, 9), **ALL_OUTPUTS, **options)
    rows = 2 * options.get("num_beams", 1)
    for name in ("scores", "logits", "attentions", "hidden_states"):
        assert len(outputs[name]) == NEW, name
    for step in range(NEW):
        tokens = 9 if step == 0 else 1
        assert outputs.scores[step].shape == outputs.logits[step].shape == (rows, 128)
        # One attention map for each of the 2 MLA layers; the embedding and 4 layers.
        assert [tuple(a.shape) for a in outputs.attentions[step]] == [(rows, 4, tokens, 9 + step)] * 2
        assert [tuple(h.shape) for h in outputs.hidden_states[step]] == [(rows, tokens, 64)] * 5


def test_outputs_of_decoding_steps_are_those_of_a_whole_forward(load_tiny, random_ids):
    model = load_tiny(attn_implementation="eager")
    outputs = generate(model, random_ids(2, 9), **ALL_OUTPUTS)
    with torch.no_grad():
        whole = model(outputs.sequences, use_cache=False, output_attentions=True, output_hidden_states=True)
    for step in range(1, NEW):
        at = 8 + step
        for got, expected in zip(outputs.hidden_states[step], whole.hidden_states):
            torch.testing.assert_close(got[:, 0], expected[:, at], atol=1e-4, rtol=0)
        for got, expected in zip(outputs.attentions[step], whole.attentions):
            torch.testing.assert_close(got[:, :, 0], expected[:, :, at, : at + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("field", ["scores", "logits", "attentions", "hidden_states"])
def test_outputs_are_those_of_the_native_class(field, native_class, load_tiny, tiny_folder, random_ids):
    native = native_class.from_pretrained(tiny_folder("hybrid"), attn_implementation="eager").eval()
    native.generation_config.eos_token_id = None
    ours, theirs = (
        generate(model, random_ids(2, 9), **ALL_OUTPUTS) for model in (load_tiny(attn_implementation="eager"), native)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours[field], theirs[field], atol=1e-4, rtol=0)


def test_router_logits_may_be_asked_for_while_generating(model, random_ids):
    """transformers' generate outputs have no field for them; asking must not change the tokens."""
    ids = random_ids(2, 9)
    assert torch.equal(generate(model, ids, output_router_logits=True), generate(model, ids))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 3}], ids=["greedy", "samples"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_returned_cache_carries_on(name, options, shared_tiny, random_ids):
    """Tokens generated in two calls over the returned cache are those of a fresh one, row by row."""
    model = shared_tiny(name)
    torch.manual_seed(0)
    first = generate(model, random_ids(1, 9), return_dict_in_generate=True, **options)
    sequences, mask = first.sequences, torch.ones_like(first.sequences)
    assert first.past_key_values.batch_size == sequences.shape[0] == options.get("num_return_sequences", 1)
    continued = generate(model, sequences, past_key_values=first.past_key_values, attention_mask=mask)
    assert torch.equal(continued, generate(model, sequences, attention_mask=mask))


def test_one_cache_can_start_several_continuations(model, random_ids):
    """A cache that a forward filled with a shared prompt is expanded to the samples that are asked for."""
    ids = random_ids(1, 9)
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    drawn = []
    for past in (cache, None):
        torch.manual_seed(11)
        options = {"do_sample": True, "past_key_values": past}
        drawn.append(generate(model, ids.expand(3, -1), **options))
    assert torch.equal(*drawn)


# Caches


def test_the_static_cache_serves_one_call_after_another(model, random_ids):
    for length, rows in ((9, 2), (5, 2), (12, 1)):
        ids = random_ids(rows, length)
        assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


@pytest.mark.parametrize("name", ["hybrid", "all_mla"])
def test_chunked_prefill_into_a_static_cache(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 30)
    options = {"prefill_chunk_size": 7, "cache_implementation": "static"}
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


def test_beams_over_a_static_cache(model, random_ids):
    options = {"num_beams": 3, "num_return_sequences": 3}
    static = generate(model, random_ids(2, 9), cache_implementation="static", **options)
    assert torch.equal(static, generate(model, random_ids(2, 9), **options))


def test_decoding_steps_of_generate_compile_as_one_graph_once(load_tiny, random_ids):
    """Without generating code: the graph is captured whole, and neither a step nor a second call captures another."""
    model, ids = load_tiny(), random_ids(2, 9)
    expected = generate(model, ids)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # transformers would compile on a GPU only
    torch.compiler.reset()
    options = {"cache_implementation": "static", "compile_config": compile_config, "disable_compile": False}
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for _ in range(2):
            outputs = generate(model, ids, return_dict_in_generate=True, output_hidden_states=True, **options)
            assert torch.equal(outputs.sequences, expected)
            assert len(outputs.hidden_states[-1]) == 5
    assert hasattr(model, "_compiled_call")


class Stream:
    """A stream of a machine where everything is done at once."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_offloading_caches_of_transformers_give_the_same_tokens(make, model, random_ids, monkeypatch):
    """Moving between CPU and CPU still goes through every call that offloading makes."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    limit = {"max_cache_len": 40} if make is StaticCache else {}
    cache = make(config=model.config, offloading=True, **limit)
    moved = []
    monkeypatch.setattr(type(cache), "offload", lambda self, index, *_: moved.append(index))
    ids = random_ids(2, 9)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))
    assert set(moved) == {2, 3}  # the MLA layers; KDA states are small and stay


# Refusals


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloading_without_an_accelerator_is_refused(name, model, random_ids, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"cache_implementation='{name}'.*no accelerator.*leave it out"):
        generate(model, random_ids(1, 9), cache_implementation=name)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check_cache_implementation(name, model.config.layer_types)


def test_the_quantized_cache_is_refused_where_there_are_states(model, random_ids):
    with pytest.raises(ValueError, match=r"cache_implementation='quantized'.*KDA.*leave it out"):
        generate(model, random_ids(1, 9), cache_implementation="quantized")
    check_cache_implementation("quantized", ["full_attention"])


def test_unknown_cache_implementations_are_refused(model, random_ids):
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, random_ids(1, 9), cache_implementation="vast")


PAGED = {
    "generate_batch": lambda model, config: model.generate_batch([[1, 2, 3]], generation_config=config),
    "init_continuous_batching": lambda model, config: model.init_continuous_batching(generation_config=config),
    "context manager": lambda model, config: model.continuous_batching_context_manager(config).__enter__(),
    "cache_implementation": lambda model, config: generate(
        model, torch.ones(1, 3).long(), cache_implementation="paged"
    ),
}


@pytest.mark.parametrize("way", PAGED)
@pytest.mark.parametrize("name", ["hybrid", "all_mla"])
def test_continuous_batching_is_refused_with_what_to_do_instead(name, way, shared_tiny, random_ids):
    model = shared_tiny(name)
    before = generate(model, random_ids(1, 9))
    with pytest.raises(ValueError, match=r"continuous batching.*KDA.*call generate\(\) with a left-padded batch"):
        PAGED[way](model, GenerationConfig(max_new_tokens=2))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, random_ids(1, 9)), before)


def test_an_interrupted_generation_leaves_the_model_usable(model, random_ids):
    """A streamer that raises, as servers do when a client goes away."""

    class Hangup(Exception):
        pass

    class Impatient:
        def __init__(self) -> None:
            self.calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 5:
                raise Hangup

        def end(self):
            raise AssertionError("the generation went on")

    ids = random_ids(1, 9)
    before = generate(model, ids)
    for options in ({}, {"cache_implementation": "static"}):
        with contextlib.suppress(Hangup):
            generate(model, ids, streamer=Impatient(), **options)
        assert torch.equal(generate(model, ids, **options), before)
