"""Long prompts in segments, and attention over a cache by blocks: the same result as in one piece."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peak_memory import PeakMemory
from transformers import DynamicCache

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.layers import masks as layers_masks
from kimi_linear.modeling.layers import mla_attention
from kimi_linear.modeling.layers.mla_attention import KimiMLAAttention
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM
from kimi_linear.modeling.prompt import segments as prompt_segments
from kimi_linear.modeling.prompt.segments import segment_bounds

# fp32 sums of a few hundred terms in another order, through four layers.
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 64 tokens a row in a batch of two, and blocks of 32 cached rows."""
    monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 128)
    monkeypatch.setattr(mla_attention, "_EXPANDED_ROWS", 1)


def whole_and_cut(model, monkeypatch, ids, **options):
    """Outputs of one piece and of segments, each with a cache of its own."""
    with torch.no_grad():
        whole = model(ids, **options)
        monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 64 * ids.shape[0])
        cut = model(ids, **options)
    return whole, cut


def check_same_state(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers):
        names = ("state", "window") if hasattr(a, "window") else ("rows",)
        for name in names:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), **CLOSE)


@pytest.mark.parametrize(
    ("batch", "length", "most", "count"),
    [(1, 1, 128, 1), (1, 128, 128, 1), (1, 129, 128, 2), (2, 128, 128, 2), (300, 65, 128, 2), (1, 1000, 128, 8)],
)
def test_bounds(batch, length, most, count, monkeypatch):
    monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", most)
    bounds = segment_bounds(batch, length)
    assert len(bounds) == count
    assert [bounds[0][0], bounds[-1][1]] == [0, length]
    assert all(a[1] == b[0] and a[1] % 64 == 0 for a, b in zip(bounds, bounds[1:]))
    assert all(begin < end <= begin + max(most // batch, 64) for begin, end in bounds)


@pytest.mark.parametrize("name", ["hybrid", "interleaved", "all_mla", "all_kda", "dense"])
def test_a_cut_prompt_equals_a_whole_one(name, shared_tiny, random_ids, monkeypatch):
    whole, cut = whole_and_cut(shared_tiny(name), monkeypatch, random_ids(2, 300))
    torch.testing.assert_close(cut.logits, whole.logits, **CLOSE)
    check_same_state(cut.past_key_values, whole.past_key_values)


@torch.no_grad()
def test_in_bf16_a_cut_prompt_is_as_near_to_fp32_as_a_whole_one(load_tiny, random_ids, monkeypatch):
    """Cut and whole round at other places, and where routing is random one rounding can choose another expert."""
    ids = random_ids(2, 300)
    want = load_tiny("hybrid")(ids).logits.double()
    model = load_tiny("hybrid", dtype=torch.bfloat16)
    of_whole, of_cut = (
        (outputs.logits.double() - want).norm() / want.norm() for outputs in whole_and_cut(model, monkeypatch, ids)
    )
    assert of_cut < 1.25 * of_whole


@torch.no_grad()
def test_the_trained_checkpoint_in_segments(random_ids, monkeypatch):
    """Trained weights: in fp32 the same tokens behind the prompt, in bf16 far nearer to each other than to fp32."""
    folder = Path(__file__).parents[3] / "hub_card" / "small_checkpoint"
    ids = random_ids(1, 640)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        generate = partial(model.generate, ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
        monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 1 << 20)
        tokens = generate()
        logits[dtype] = [outputs.logits.double() for outputs in whole_and_cut(model, monkeypatch, ids)]
        assert dtype == torch.bfloat16 or torch.equal(generate(), tokens)
    exact = logits[torch.float32][0]
    whole, cut = logits[torch.bfloat16]
    assert (cut - whole).norm() < 0.5 * (whole - exact).norm()


def test_every_cut_gives_the_same(model, random_ids, monkeypatch):
    ids = random_ids(1, 400)
    with torch.no_grad():
        whole = model(ids)
        for tokens in (64, 128, 192, 256):
            monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", tokens)
            cut = model(ids)
            torch.testing.assert_close(cut.logits, whole.logits, **CLOSE)
            check_same_state(cut.past_key_values, whole.past_key_values)


@pytest.mark.parametrize("large_mask", [0, 1 << 28])
@pytest.mark.parametrize("side", ["left", "right", "both", "row", "holes"])
def test_padded_prompts(side, large_mask, model, random_ids, monkeypatch):
    """With masks, and without one where the padding is at the ends (whole rows and segments of it among them)."""
    ids, mask = random_ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    padding = {"left": slice(0, 90), "right": slice(70, None), "row": slice(None), "holes": slice(60, 150)}
    mask[1, padding.get(side, slice(0, 70))] = 0
    if side == "both":
        mask[1, 150:] = 0
    whole = model(ids, attention_mask=mask)  # with gradients, hence by a mask
    monkeypatch.setattr(layers_masks, "_LARGE_MASK", large_mask)
    uncut, cut = whole_and_cut(model, monkeypatch, ids, attention_mask=mask)
    for got in (uncut, cut):
        assert torch.isfinite(got.logits).all()
        torch.testing.assert_close(got.logits[mask.bool()], whole.logits[mask.bool()].detach(), **CLOSE)
    for a, b in zip(cut.past_key_values.layers, whole.past_key_values.layers):
        if hasattr(a, "window"):
            torch.testing.assert_close(a.state, b.state.detach(), **CLOSE)


@pytest.mark.parametrize("options", [{"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}])
def test_continuing_a_cache(options, load_tiny, random_ids, monkeypatch):
    """Segments over a cache that already holds tokens, and with transformers' own cache."""
    model = load_tiny("hybrid", **options)
    ids = random_ids(1, 300)
    with torch.no_grad():
        whole = model(ids)
        monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 64)
        for cache in (KimiLinearCache(model.config), DynamicCache(config=model.config)):
            model(ids[:, :70], past_key_values=cache)
            cut = model(ids[:, 70:], past_key_values=cache)
            assert cut.past_key_values is cache and cache.get_seq_length() == 300
            torch.testing.assert_close(cut.logits, whole.logits[:, 70:], **CLOSE)


@pytest.mark.parametrize("new", [17, 40, 130])
def test_attention_by_blocks_equals_attention_with_a_mask(new, model, random_ids, monkeypatch):
    """The same continuation without a mask (blocks of the cache) and with an explicit 4D one."""
    calls = []
    by_blocks = KimiMLAAttention._attend_by_blocks
    monkeypatch.setattr(mla_attention, "_EXPANDED_ROWS", 60)
    monkeypatch.setattr(
        KimiMLAAttention, "_attend_by_blocks", lambda self, *args: calls.append(1) or by_blocks(self, *args)
    )
    ids = random_ids(2, 100 + new)
    mask = torch.ones(new, 100 + new, dtype=torch.bool).tril(100)[None, None]
    with torch.no_grad():
        caches = [model(ids[:, :100]).past_key_values for _ in range(2)]
        calls.clear()
        got = model(ids[:, 100:], past_key_values=caches[0])
        assert len(calls) == 2  # both MLA layers
        want = model(ids[:, 100:], past_key_values=caches[1], attention_mask=mask)
        assert len(calls) == 2
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)


def test_generate_and_progress(model, random_ids, short_segments):
    ids = random_ids(2, 150)
    seen = []
    options = {"max_new_tokens": 5, "do_sample": False}
    cut = model.generate(ids, prompt_progress=lambda done, total: seen.append((done, total)), **options)
    assert seen == [(64, 150), (128, 150), (150, 150)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_segments, "SEGMENT_TOKENS", 1 << 20)
        assert torch.equal(cut, model.generate(ids, **options))


@torch.no_grad()
def test_only_wanted_positions_are_kept(model, random_ids, short_segments):
    ids = random_ids(2, 200)
    every = model.model(ids).last_hidden_state
    for keep in (1, 70, 200, 500):
        last = model.model(ids, keep_last=keep).last_hidden_state
        assert last.shape[1] == min(keep, 200)
        assert torch.equal(last, every[:, -keep:])
    assert model(ids, logits_to_keep=3).logits.shape[1] == 3
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, return_dict=False)[0].shape == (2, 200, 128)


@torch.no_grad()
def test_what_is_recorded_or_packed_stays_in_one_piece(model, random_ids, short_segments, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("cut")

    monkeypatch.setattr("kimi_linear.modeling.modeling_kimi_linear.forward_in_segments", refuse)
    ids = random_ids(1, 300)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 5
    restarts = torch.cat([torch.arange(100), torch.arange(200)])[None]
    model(ids, position_ids=restarts)
    model(ids, cu_seq_lens_q=torch.tensor([0, 100, 300], dtype=torch.int32))
    with torch.enable_grad():
        model(ids)
    with pytest.raises(AssertionError, match="cut"):
        model(ids, position_ids=torch.arange(300)[None])


@torch.no_grad()
def test_bad_input_is_refused_before_the_cache_changes(model, random_ids, short_segments):
    ids = random_ids(1, 300)
    cache = KimiLinearCache(model.config)
    bad = ids.clone()
    bad[0, -1] = 4000
    for options, message in (
        ({"input_ids": bad}, "outside the vocabulary"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 299)}, "attention_mask is"),
        ({"input_ids": ids, "position_ids": torch.zeros(1, 3, dtype=torch.long)}, "position_ids are"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(1, 300, 64)}, "exactly one"),
        ({"inputs_embeds": torch.zeros(1, 300, 63)}, "inputs_embeds must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model(past_key_values=cache, **options)
        assert cache.get_seq_length() == 0


@torch.no_grad()
def test_memory_of_a_long_prompt_is_that_of_a_segment(model, random_ids, monkeypatch):
    """Four times the prompt, the same largest tensor (embeddings, scores and masks included)."""
    monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 128)
    monkeypatch.setattr(mla_attention, "_EXPANDED_ROWS", 128)
    largest = []
    for length in (256, 1024):
        with PeakMemory() as memory:
            model(random_ids(1, length), logits_to_keep=1)
        largest.append(memory.largest)
    rows_growth = 1024 * 40 * 4  # one layer's latents are larger, if they are what is largest
    assert largest[1] <= max(largest[0], rows_growth)
