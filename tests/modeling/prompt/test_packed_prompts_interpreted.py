"""
Packed prompts against the layers, in Triton's interpreter on a CPU.

Logits and caches in fp32 agree to 1e-5 of their norm: some hundred operations of eps 1.2e-7 each, in another order.
"""

import threading

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import close, few_programs, layer_by_layer, make_model

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.cache.latent_layer import LatentCacheLayer
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.decode.step import DecodeStep
from kimi_linear.modeling.placement import layer_spans
from kimi_linear.modeling.prompt import path as prompt_path
from kimi_linear.modeling.prompt import plan as prompt_plan
from kimi_linear.modeling.prompt import segments as prompt_segments
from kimi_linear.modeling.prompt.packing import Packing
from kimi_linear.modeling.prompt.run import PromptPart, PromptRun

__all__ = ["few_programs"]  # fixture
# Each way once: (captured sizes, most tokens whose experts go in blocks, tokens of a part that is launched).
CAPTURED, LAUNCHED = ((8, 24, 48), 1024, 0), ((0,), 0, 35)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def running(monkeypatch):
    """Lets the interpreter stand in for a GPU; gives the packed runs, (room for tokens, rows, keys, masked) each."""
    runs, run = [], PromptRun.__call__

    def counted(self, *args):
        runs.append((self.plan.tokens, self.plan.sequences, self.plan.keys, self.plan.masked))
        self.plan.x.fill_(torch.nan)
        return run(self, *args)

    monkeypatch.setattr(PromptRun, "__call__", counted)
    monkeypatch.setattr(decode_path, "gpu_has_kernels", lambda model: True)
    # A guard band: what a plan allocates is NaN until it is written, and padding stays so.
    monkeypatch.setattr(prompt_plan.PromptPlan, "_empty", nan_filled)
    return runs


def nan_filled(plan, *shape, dtype=None):
    dtype = dtype or plan.dtype
    value = torch.nan if dtype.is_floating_point else 1 << 30
    return torch.full(shape, value, dtype=dtype, device=plan.device)


def go(way, patch):
    tokens, blocks, part = way
    patch.setattr(prompt_path, "TOKENS", tokens)
    patch.setattr(prompt_plan, "BLOCK_TOKENS", blocks)
    patch.setattr(prompt_plan, "_GROUPS", ((16, 16), (1 << 30, 32)))
    patch.setattr(prompt_path, "PART_TOKENS", part)


def draw(*shape):
    return torch.randint(0, 120, shape, generator=torch.Generator().manual_seed(sum(shape)))


def padded(lengths, right=()):
    """A mask of rows of these lengths, padded on the left, but on the right where the row is in `right`."""
    width = max(lengths)
    column = torch.arange(width)
    rows = [column < n if i in right else column >= width - n for i, n in enumerate(lengths)]
    return torch.stack(rows).long()


def check(ours, theirs, mask, new):
    """Logits of the `new` last positions, where they are tokens, and what caches hold of all tokens."""
    valid = mask.bool()
    kept = valid[:, -new:][:, -ours.logits.shape[1] :]
    assert close(ours.logits[kept], theirs.logits[kept])
    assert torch.isfinite(ours.logits).all()
    for mine, wanted in zip(ours.past_key_values.layers, theirs.past_key_values.layers):
        assert mine.get_seq_length() == wanted.get_seq_length() == mask.shape[1]
        if hasattr(wanted, "state"):
            assert close(mine.state, wanted.state) and close(mine.window, wanted.window)
            assert mine.weights is not None
        else:
            assert close(mine.rows[valid], wanted.rows[valid])
            assert torch.isfinite(mine.rows).all()


@torch.no_grad()
@pytest.mark.parametrize("way", [CAPTURED, LAUNCHED], ids=["captured", "launched"])
def test_ragged_rows_and_rows_over_their_cache(way, model, running, monkeypatch):
    """Rows shorter than the convolution, around a chunk and a block of attention, padded on both sides; then more."""
    go(way, monkeypatch)
    mask = padded((1, 33, 5), right=(2,))
    ids = draw(*mask.shape)
    theirs = layer_by_layer(model, lambda: model(ids, attention_mask=mask))
    ours = model(ids, attention_mask=mask)
    assert running.pop(0) == ((48, 8, None, False) if way is CAPTURED else (64, 2, 64, False))
    check(ours, theirs, mask, 33)
    more = padded((17, 2, 1))
    more[2] = 0
    mask, ids = torch.cat([mask, more], dim=1), draw(*more.shape)
    arguments = {"attention_mask": mask, "logits_to_keep": 2}
    theirs = layer_by_layer(model, lambda: model(ids, past_key_values=theirs.past_key_values, **arguments))
    ours = model(ids, past_key_values=ours.past_key_values, **arguments)
    assert running[-1][3] == (way is LAUNCHED)
    check(ours, theirs, mask, 17)


@torch.no_grad()
def test_lengths_share_a_plan(model, running, monkeypatch):
    """The numbers of a longer prompt are not left over."""
    go(((66,), 1024, 0), monkeypatch)
    model._prompts.clear()
    for length in (65, 1):
        ids = draw(1, length)
        theirs = layer_by_layer(model, lambda ids=ids: model(ids))
        check(model(ids), theirs, torch.ones_like(ids), length)
    assert running == [(66, 1, None, False)] * 2
    assert len(model._prompts._runs) == 1


@torch.no_grad()
def test_bf16_differs_by_rounding(running, monkeypatch):
    go(CAPTURED, monkeypatch)
    model = make_model().bfloat16()
    ids = draw(1, 7)
    exact = layer_by_layer(model.float(), lambda: model(ids).logits)
    model = model.bfloat16()
    theirs = layer_by_layer(model, lambda: model(ids).logits)
    ours = model(ids).logits
    assert running == [(8, 1, None, False)]
    of_ours, of_theirs = (float((x.float() - exact).norm() / exact.norm()) for x in (ours, theirs))
    assert of_ours < 2 * of_theirs + 2**-9


@torch.no_grad()
def test_logits_that_are_kept(model, running, monkeypatch):
    go(CAPTURED, monkeypatch)
    ids, mask = draw(2, 5), padded((5, 3))
    whole = model(ids, attention_mask=mask).logits
    assert torch.equal(whole[1, :2], torch.zeros_like(whole[1, :2]))
    for kept in (1, 3, torch.tensor([0, 4])):
        wanted = whole[:, kept] if isinstance(kept, torch.Tensor) else whole[:, -kept:]
        assert close(model(ids, attention_mask=mask, logits_to_keep=kept).logits, wanted)
    assert model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_token_ids_of_32_bits(model, running, monkeypatch):
    go(CAPTURED, monkeypatch)
    ids = draw(2, 5)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    assert len(running) == 2


@torch.no_grad()
def test_text_is_that_of_the_layers(model, running, monkeypatch):
    """A prompt, and a chat that goes on; between them decode steps over the same cache."""
    go(CAPTURED, monkeypatch)

    def chat():
        cache, options = KimiLinearCache(model.config), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = model.generate(draw(1, 6), past_key_values=cache, max_new_tokens=3, **options)
        text = torch.cat([text, draw(1, 18)], dim=1)
        mask = torch.ones_like(text)
        return model.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=2, **options)

    expected = layer_by_layer(model, chat)
    assert torch.equal(chat(), expected)
    assert [tokens for tokens, *_ in running] == [8, 24]


@torch.no_grad()
def test_what_goes_to_the_layers(model, running, monkeypatch):
    go(CAPTURED, monkeypatch)
    ids = draw(1, 4)
    recording = KimiLinearCache(model.config)
    recording.activate_past_recording(16)
    for options in ({"output_hidden_states": True}, {"labels": ids}, {"past_key_values": recording}):
        model(ids, **options)
    model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))  # packed samples
    with monkeypatch.context() as patch:
        patch.setattr(prompt_path, "MOST_POSITIONS", 11)
        patch.setattr(prompt_path, "TOKENS", (8,))
        model(draw(1, 9), past_key_values=filled(model, 3))
    with torch.enable_grad():
        model(ids)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert model.prompt_path == "layer by layer: model.layers.0.mlp has a hook"
    model(ids)
    handle.remove()
    assert running == []
    assert model.prompt_path.startswith("packed plans")
    model(ids)
    assert len(running) == 1


@torch.no_grad()
def test_rows_without_a_token_while_the_head_is_elsewhere(running, monkeypatch):
    """Parts of rows give their hidden states on the last layer's device, also where there was nothing to run."""
    go(LAUNCHED, monkeypatch)
    monkeypatch.setattr(prompt_path, "PART_TOKENS", 1)
    monkeypatch.setattr(prompt_path, "check_cache_dtype", lambda *args: None)  # asks for autocast, which meta hasn't
    model, ids, mask = make_model(), draw(2, 3), torch.tensor([[0, 0, 0], [0, 1, 1]])
    model.lm_head.to("meta")
    cache = KimiLinearCache(model.config)
    hidden = model._prompts.hidden_states(model, cache, ids, mask, None, slice(-2, None))
    assert hidden.shape == (2, 2, model.config.hidden_size) and len(running) == 1
    assert not hidden[0].any() and hidden[1].isfinite().all()


@torch.no_grad()
def test_a_prompt_of_several_segments_reports_its_progress(model, running, monkeypatch):
    """Whatever makes it several: their length, several GPUs, or so many rows that a segment is one chunk."""
    go(CAPTURED, monkeypatch)
    monkeypatch.setattr(prompt_segments, "SPREAD_SEGMENT_TOKENS", 64)
    monkeypatch.setattr(prompt_segments, "is_spread", lambda model: True)
    seen = []
    model(draw(1, 16), prompt_progress=lambda *done: seen.append(done))
    assert len(running) == 1 and seen == []  # one segment, which the layers wouldn't report either
    model(draw(1, 80), prompt_progress=lambda *done: seen.append(done))
    assert len(running) == 1 and seen == [(64, 80), (80, 80)]


@torch.no_grad()
def test_launched_plans_are_for_few_tokens_or_batches_with_padding(model, running, monkeypatch):
    """A row, rows of one length, rows over a cache: by their tokens. Padding in the cache alone is not computed."""
    go(LAUNCHED, monkeypatch)
    monkeypatch.setattr(prompt_path, "UNPADDED_TOKENS", 8)
    for shape, by_plan in (((1, 8), True), ((1, 9), False), ((2, 4), True), ((2, 5), False)):
        running.clear()
        ids = draw(*shape)
        for mask in (None, torch.ones_like(ids)):
            model(ids, attention_mask=mask)
        assert len(running) == (2 if by_plan else 0)
    running.clear()
    mask, ids = padded((7, 5)), draw(2, 7)
    theirs = layer_by_layer(model, lambda: model(ids, attention_mask=mask))
    ours = model(ids, attention_mask=mask)
    check(ours, theirs, mask, 7)
    assert len(running) == 1
    mask, more = torch.cat([mask, mask.new_ones(2, 17)], dim=1), draw(2, 17)
    theirs = layer_by_layer(model, lambda: model(more, attention_mask=mask, past_key_values=theirs.past_key_values))
    check(model(more, attention_mask=mask, past_key_values=ours.past_key_values), theirs, mask, 17)
    assert len(running) == 1


def filled(model, tokens):
    """A cache of one row that the layers filled."""
    cache = KimiLinearCache(model.config)
    layer_by_layer(model, lambda: model(draw(1, tokens), past_key_values=cache))
    return cache


@torch.no_grad()
def test_a_plan_is_dropped_with_the_weights_it_reads(running, monkeypatch):
    go(CAPTURED, monkeypatch)
    model, ids = make_model(), draw(1, 3)
    model(ids)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight * 2)
    old = next(iter(model._prompts._runs.values()))
    theirs = layer_by_layer(model, lambda: model(ids))
    check(model(ids), theirs, torch.ones_like(ids), 3)
    assert old not in model._prompts._runs.values()


@torch.no_grad()
@pytest.mark.parametrize("place", ["hand_over", "launch", "commit"])
def test_a_failure_leaves_a_whole_cache_or_a_refusal(place, model, running, monkeypatch):
    """An empty cache is empty again; a filled one is untouched before the launches, and refuses after them."""
    go(CAPTURED, monkeypatch)
    empty, held = KimiLinearCache(model.config), filled(model, 3)
    expected, ids = held.fork(1)[0], draw(1, 17)

    def fails(*args, **kwargs):
        raise KeyboardInterrupt("on purpose")

    for cache in (empty, held):
        with monkeypatch.context() as patch:
            patch.setattr(*((prompt_path, "commit", fails) if place == "commit" else (PromptPart, place, fails)))
            with pytest.raises(KeyboardInterrupt):
                model(ids, past_key_values=cache)
    assert empty.get_seq_length() == 0 and empty.wholeness.is_whole
    assert held.wholeness.is_whole == (place == "hand_over")
    if place == "hand_over":
        theirs = layer_by_layer(model, lambda: model(ids, past_key_values=expected))
        check(model(ids, past_key_values=held), theirs, torch.ones(1, 20), 17)
    else:
        with pytest.raises(ValueError, match="not whole"):
            model(ids, past_key_values=held)


@torch.no_grad()
def test_two_threads_with_one_cache(model, running, monkeypatch):
    """The second comes while the first waits for the plans' buffers, and is refused."""
    go(CAPTURED, monkeypatch)
    cache, lock, refused = KimiLinearCache(model.config), model._prompts._lock, []

    def second():
        with torch.no_grad(), pytest.raises(ValueError, match="being changed by another thread"):
            model(draw(1, 5), past_key_values=cache)
        refused.append(True)

    class Waiting:
        def __enter__(self):
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            lock.acquire()

        def __exit__(self, *args):
            lock.release()

    monkeypatch.setattr(model._prompts, "_lock", Waiting())
    monkeypatch.setattr(model._prompts, "reason", lambda model: None)
    model(draw(1, 5), past_key_values=cache)
    assert refused and cache.get_seq_length() == 5


@torch.no_grad()
def test_steps_go_on_over_what_a_packed_prompt_left(model, running, monkeypatch):
    """Latent rows of padding are finite, or a masked one would spoil the sum."""
    go(CAPTURED, monkeypatch)
    mask = padded((2, 7))
    cache = KimiLinearCache(model.config)
    reserve = LatentCacheLayer.reserve

    def reserve_nan(layer, length):
        reserve(layer, length)
        layer.storage[:, layer.get_seq_length() :] = torch.nan

    monkeypatch.setattr(LatentCacheLayer, "reserve", reserve_nan)
    model(draw(2, 7), attention_mask=mask, past_key_values=cache)
    monkeypatch.undo()
    longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1).bool()
    assert torch.isfinite(DecodeStep(model, 2, 1)(cache, draw(2, 1), longer)).all()


@torch.no_grad()
@pytest.mark.parametrize("keys", [None, 16])
def test_a_plan_without_rows_touches_no_memory_of_a_cache(keys, model, running, monkeypatch):
    """It is launched to compile, while its table holds no address: reading there would end the process."""
    go(LAUNCHED, monkeypatch)
    for launch in prompt_plan.PromptPlan(model, layer_spans(model)[0], 16, 1, keys, True).kinds_of_launches():
        launch()


def test_packing():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    packing = Packing.of(3, 3, 2, mask)
    assert packing.source.tolist() == [0, 2, 6, 7, 8] and packing.rows.tolist() == [0, 0, 2, 2, 2]
    assert packing.positions.tolist() == [2, 4, 2, 3, 4] and packing.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packing.starts.tolist() == [1, 0, 2] and packing.ends.tolist() == [5, 0, 5]
    assert packing.has_holes and packing.has_padding and (packing.tokens, packing.keys) == (5, 7)
    assert packing.places().tolist() == [[0, -1, 1], [-1, -1, -1], [2, 3, 4]]
    assert packing.row_parts(4, 100) == [(0, 2), (2, 3)] and packing.row_parts(100, 4) == [(0, 2), (2, 3)]
    assert packing.row_parts(1, 1) == [(0, 1), (1, 2), (2, 3)]
    last = packing.of_rows(2, 3)
    assert (last.source.tolist(), last.rows.tolist(), last.cu_seqlens.tolist()) == ([0, 1, 2], [0, 0, 0], [0, 3])
    assert not Packing.of(2, 4, 3, None).has_holes and not Packing.of(2, 4, 3, None).has_padding


def test_numbers_of_rows_without_tokens():
    """Where keys are, by the definition: rows that have none at both ends and between others."""
    mask = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    packing = Packing.of(6, 3, 0, mask)
    offsets, rows, positions = packing.numbers(8, 7, 8)[8 + 8 + 8 + 7 :].split([8, 8, 8, 8])[:3]
    assert offsets.tolist() == [0, 0, 2, 2, 2, 5, 5, 5]
    assert rows.tolist() == [1, 1, 4, 4, 4, -1, -1, -1] and positions[:5].tolist() == [1, 2, 0, 1, 2]
