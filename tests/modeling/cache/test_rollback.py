"""Taking tokens back: what is left is what a run that never saw them leaves, bit for bit where inputs are the same.

Bits are the same where kept and removed tokens came in calls of their own (test_cache_recording.py: for given inputs of
a layer always). Where they shared a call, a row of a matrix product may depend on the number of rows in its last bits,
so that states agree to 1e-5 in fp32 (some 10 layers' roundings of 6e-8 at values of order 1), and logits to 1e-4.
"""

import copy

import pytest
import torch

from kimi_linear.modeling.cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache

CONFIGS = ["hybrid", "all_kda", "all_mla"]


def tensors_of(cache: KimiLinearCache) -> list[torch.Tensor]:
    """Everything the cache holds, in order."""
    held = []
    for layer in cache.layers:
        held += [layer.state, layer.window] if isinstance(layer, KDACacheLayer) else [layer.rows]
    return held


def assert_same_bits(a: KimiLinearCache, b: KimiLinearCache) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    for i, (x, y) in enumerate(zip(tensors_of(a), tensors_of(b), strict=True)):
        assert torch.equal(x, y), f"tensor {i} differs by {(x - y).abs().max()}"


@torch.no_grad()
def run(model, cache, *parts: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the last of several calls over `cache`."""
    for part in parts:
        logits = model(part, past_key_values=cache, attention_mask=mask).logits
    return logits


def recording_cache(model, *parts: torch.Tensor, **options) -> KimiLinearCache:
    """A cache that has recorded `parts`."""
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording(**options)
    run(model, cache, *parts)
    return cache


# The model


@pytest.mark.parametrize("name", [*CONFIGS, "interleaved", "dense"])
@pytest.mark.parametrize("removed", [1, 3, 16, 60])
def test_tokens_in_calls_of_their_own_leave_no_trace(name, removed, shared_tiny, random_ids):
    model, ids, other, more = shared_tiny(name), random_ids(2, 30), random_ids(2, 60, seed=1), random_ids(2, 5, seed=2)
    cache = recording_cache(model, ids[:, :20], ids[:, 20:22], *ids[:, 22:].split(1, dim=1), other[:, :removed])
    cache.crop(-removed)
    never = recording_cache(model, ids[:, :20], ids[:, 20:22], *ids[:, 22:].split(1, dim=1))
    assert_same_bits(cache, never)
    assert torch.equal(run(model, cache, *more.split([1, 4], dim=1)), run(model, never, *more.split([1, 4], dim=1)))
    assert_same_bits(cache, never)


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_drafts_leave_no_trace(name, shared_tiny, random_ids):
    model, ids, other = shared_tiny(name), random_ids(1, 60), random_ids(1, 60, seed=1)
    cache = recording_cache(model, ids[:, :20])
    never = recording_cache(model, ids[:, :20])
    for t in range(20, 60):
        drafts = other[:, t : t + 1 + t % 7]
        run(model, cache, ids[:, t : t + 1], *drafts.split(1, dim=1))
        cache.crop(-drafts.shape[1])
        run(model, never, ids[:, t : t + 1])
        assert_same_bits(cache, never)


@pytest.mark.parametrize("name", ["dense", "all_kda"])
def test_what_was_removed_from_a_shared_call_leaves_no_trace(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(1, 22)
    caches = []
    for seed in (1, 2):
        shared = torch.cat([ids[:, 20:], random_ids(1, 4, seed)], dim=1)
        cache = recording_cache(model, ids[:, :20], shared)
        cache.crop(-4)
        caches.append(cache)
    if name == "dense":  # which tokens share an expert's product depends on the others
        assert_same_bits(*caches)
    plain = recording_cache(model, ids)
    for cache in caches:
        for held, expected in zip(tensors_of(cache), tensors_of(plain), strict=True):
            torch.testing.assert_close(held, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 30, 64, 65, 300])
def test_the_end_of_a_prompt_can_be_taken_back(name, length, shared_tiny, random_ids):
    model, ids, more = shared_tiny(name), random_ids(2, length), random_ids(2, 3, seed=1)
    cache = recording_cache(model, ids)
    removed = min(length, 10)
    cache.crop(-removed)
    assert cache.get_seq_length() == length - removed
    logits = run(model, cache, more)
    whole = run(model, KimiLinearCache(model.config), torch.cat([ids[:, : length - removed], more], dim=1))
    torch.testing.assert_close(logits, whole[:, -3:], atol=1e-4, rtol=0)


def test_recording_changes_no_bit_of_decoding(model, random_ids):
    ids = random_ids(2, 40)
    plain = KimiLinearCache(model.config)
    run(model, plain, ids[:, :20])
    recorded = plain.fork(1)[0]
    recorded.activate_past_recording()
    for part in ids[:, 20:].split([1, 1, 5, 1, 12], dim=1):
        assert torch.equal(run(model, plain, part), run(model, recorded, part))
    assert_same_bits(plain, recorded)


def test_padding_inside_recorded_calls(model, random_ids):
    ids, more = random_ids(3, 40), random_ids(3, 2, seed=1)
    mask = (torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.6).long()
    mask[1], mask[:, 0] = 1, 1
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    for start, end in ((0, 20), (20, 33), (33, 34), (34, 40)):
        run(model, cache, ids[:, start:end], mask=mask[:, :end])
    cache.crop(-11)
    logits = run(model, cache, more, mask=torch.cat([mask[:, :29], torch.ones_like(more)], dim=1))
    for row in range(3):
        kept = ids[row, :29][mask[row, :29].bool()]
        alone = run(model, KimiLinearCache(model.config), torch.cat([kept, more[row]])[None])
        torch.testing.assert_close(logits[row], alone[0, -2:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_a_batch_take_back_different_numbers(name, shared_tiny, random_ids):
    model, mask = shared_tiny(name), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :4] = 0  # left padding
    ids = random_ids(3, 12)
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    run(model, cache, ids, mask=mask)
    kept = [list(ids[row][mask[row].bool()]) for row in range(3)]
    for i, removed in enumerate([[0, 5, 2], [1, 1, 4], [3, 3, 3], [5, 0, 0], [0, 0, 0]]):
        drafts = random_ids(3, 5, seed=i)
        logits = run(model, cache, drafts, mask=torch.cat([mask, torch.ones_like(drafts)], dim=1))
        for row in range(3):
            alone = run(model, KimiLinearCache(model.config), torch.stack([*kept[row], *drafts[row]])[None])
            torch.testing.assert_close(logits[row], alone[0, -5:], atol=1e-4, rtol=0)
            kept[row] += list(drafts[row])[: 5 - removed[row]]
        before = torch.cat([mask, torch.ones_like(drafts)], dim=1)
        mask = cache.crop_rows(torch.tensor(removed), before)
        assert mask.shape == (3, cache.get_seq_length())
        assert mask.sum(1).tolist() == [len(row) for row in kept]


def test_rows_that_agree_take_back_what_crop_does(model, random_ids):
    ids = random_ids(2, 30)
    caches = [recording_cache(model, ids[:, :20], ids[:, 20:]) for _ in range(2)]
    caches[0].crop(-4)
    mask = caches[1].crop_rows(torch.tensor([4, 4]))
    assert torch.equal(mask, torch.ones(2, 26, dtype=torch.int64))
    assert_same_bits(*caches)


def test_addresses_stay(model, random_ids):
    cache = recording_cache(model, random_ids(2, 20))

    def addresses():
        held = [x.data_ptr() for x in tensors_of(cache)]
        return held + [layer.recording.inputs.data_ptr() for layer in cache.layers[:2]]

    before, snapshot = addresses(), cache.snapshot()
    for i in range(30):
        run(model, cache, random_ids(2, 1 + i % 3, seed=i))
        cache.crop(-1)
    cache.restore(snapshot)
    cache.reorder_cache(torch.tensor([1, 0]))
    run(model, cache, random_ids(2, 100))  # a call that is no short continuation
    assert addresses()[:4] + addresses()[-2:] == before[:4] + before[-2:]


def test_a_graph_may_write_states_rows_and_recording_by_itself(model, random_ids):
    ids, more = random_ids(1, 20), random_ids(1, 3, seed=1)
    eager, graph = recording_cache(model, ids), recording_cache(model, ids)
    for t in range(3):
        run(model, eager, more[:, t : t + 1])
        graph.prepare_recording(1)
        for source, layer in zip(eager.layers, graph.layers, strict=True):
            if isinstance(layer, KDACacheLayer):  # stands for what a captured kernel writes
                layer.state.copy_(source.state)
                layer.window.copy_(source.window)
                row = source.recording.inputs[:, source.recording.length - 1]
                layer.recording.inputs[:, layer.recording.length] = row
                layer.advance(1, recorded=True)
            else:
                layer.reserve(layer.get_seq_length() + 1)
                layer.storage[:, layer.get_seq_length()] = source.rows[:, -1]
                layer.advance(1)
    assert_same_bits(eager, graph)
    eager.crop(-2)
    graph.crop(-2)
    assert_same_bits(eager, graph)
    for layer in graph.layers:
        layer.advance(1)  # without recording
    refused(graph, "only the last 0 were recorded", lambda cache: cache.crop(-1))


def test_rows_of_a_recording_cache_can_be_moved(model, random_ids):
    ids = random_ids(3, 30)
    cache = recording_cache(model, ids[:, :20], ids[:, 20:])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.crop(-5)
    expected = recording_cache(model, ids[:, :20], ids[:, 20:])
    expected.crop(-5)
    for held, all_rows in zip(tensors_of(cache), tensors_of(expected), strict=True):
        # 1e-6: another number of rows in the products.
        torch.testing.assert_close(held, all_rows[[2, 0]], atol=1e-6, rtol=1e-6)


def test_crop_works_where_autograd_is_on(model, random_ids):
    ids = random_ids(1, 12)
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :8], past_key_values=cache)
    model(ids[:, 8:], past_key_values=cache)
    cache.crop(-4)
    assert_same_bits(cache, recording_cache(model, ids[:, :8]))
    assert not any(x.requires_grad for layer in cache.layers[:2] for x in (layer.state, layer.window))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_cache_made_in_inference_mode_goes_on_outside_of_it(mode, model, random_ids):
    ids = random_ids(1, 12)
    with torch.inference_mode():
        cache = model(ids[:, :8], use_cache=True).past_key_values
    with mode():
        logits = model(ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(logits, run(model, KimiLinearCache(model.config), ids)[:, 8:], atol=1e-4, rtol=0)


# What can't be done, and harms nothing


def refused(cache: KimiLinearCache, message: str, operation) -> None:
    before = [tensor.clone() for tensor in tensors_of(cache)]
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match=message):
        operation(cache)
    assert cache.get_seq_length() == length
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(cache), before, strict=True))


def test_crop_without_a_recording_is_refused(model, random_ids):
    cache = KimiLinearCache(model.config)
    run(model, cache, random_ids(2, 12))
    refused(cache, r"3 tokens can't be taken back.*activate_past_recording\(\)", lambda cache: cache.crop(-3))
    refused(cache, "7 tokens can't be taken back", lambda cache: cache.crop(5))
    refused(cache, "2 tokens", lambda cache: cache.crop_rows(torch.tensor([0, 2])))


def test_crop_beyond_what_was_recorded_is_refused(model, random_ids):
    cache = KimiLinearCache(model.config)
    run(model, cache, random_ids(2, 12))
    cache.activate_past_recording()
    run(model, cache, random_ids(2, 4))
    refused(cache, "5 tokens can't be taken back, only the last 4", lambda cache: cache.crop(-5))
    refused(cache, "only the last 4", lambda cache: cache.crop_rows(torch.tensor([1, 5])))
    cache.crop(-4)
    refused(cache, "only the last 0", lambda cache: cache.crop(-1))
    cache.deactivate_past_recording()
    assert cache.recording_nbytes == 0


@pytest.mark.parametrize(
    ("removed", "mask", "message"),
    [
        (torch.tensor([1]), None, "2 integers"),
        (torch.tensor([1.0, 1.0]), None, "2 integers"),
        (torch.tensor([-1, 1]), None, "from 0 to 12"),
        (torch.tensor([1, 13]), None, "from 0 to 12"),
        (torch.tensor([1, 1]), torch.ones(2, 13), r"\[2, 12\]"),
    ],
)
def test_crop_rows_with_what_does_not_fit_is_refused(removed, mask, message, model, random_ids):
    cache = recording_cache(model, random_ids(2, 12))
    refused(cache, message, lambda cache: cache.crop_rows(removed, mask))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("index", [2, -1, 99])
def test_rows_that_do_not_exist_are_refused(name, index, shared_tiny, random_ids):
    cache = KimiLinearCache(shared_tiny(name).config)
    run(shared_tiny(name), cache, random_ids(2, 12))
    message = f"row {index} was asked for, and the cache holds rows 0 to 1"
    refused(cache, message, lambda cache: cache.reorder_cache(torch.tensor([0, index])))
    refused(cache, message, lambda cache: cache.batch_select_indices(torch.tensor([0, index])))
    refused(cache, "mask over the 2 rows", lambda cache: cache.batch_select_indices(torch.tensor([True] * 3)))


def test_recording_needs_weights_that_can_be_read(load_tiny, random_ids):
    model = load_tiny("hybrid")
    model.model.layers[0].self_attn.o_norm.register_forward_hook(lambda module, inputs, output: output)
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"layer 0 can't record its past.*hooked"):
        run(model, cache, random_ids(1, 4))
    run(model, KimiLinearCache(model.config), random_ids(1, 4), random_ids(1, 2))


def test_a_recording_too_small_is_refused(model):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        KimiLinearCache(model.config).activate_past_recording(max_tokens=1)


def test_deep_copies_share_weights_and_nothing_else(model, random_ids):
    cache = recording_cache(model, random_ids(1, 20))
    twin = copy.deepcopy(cache)
    assert twin.layers[0].weights is cache.layers[0].weights
    run(model, twin, random_ids(1, 3))
    twin.crop(-3)
    assert_same_bits(cache, twin)
