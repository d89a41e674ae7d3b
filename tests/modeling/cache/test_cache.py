"""KimiLinearCache: what it holds, the Cache protocol, and that whatever is done to it, decoding goes on from there.

Behaviour is judged by logits: a cache is right if the next tokens get the logits they get without it. Runs are fp32 and
the two sides differ in the order of sums only: 1e-4 absolute on logits of order 1, 1e-5 on states.
"""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.cache.kda_states import write_kda_states
from kimi_linear.modeling.cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache, LatentCacheLayer

CONFIGS = ["hybrid", "all_kda", "all_mla"]


def assert_same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def tensors_of(cache: KimiLinearCache) -> list[torch.Tensor]:
    """Everything the cache holds, in order."""
    held = []
    for layer in cache.layers:
        held += [layer.state, layer.window] if isinstance(layer, KDACacheLayer) else [layer.keys, layer.values]
    return held


@torch.no_grad()
def run(model, ids, cache=None, mask=None):
    """(logits, cache) of a forward that continues `cache`."""
    outputs = model(ids, past_key_values=cache, attention_mask=mask, use_cache=True)
    return outputs.logits, outputs.past_key_values


# What it holds


def filled_released_cache(tokens: int) -> KimiLinearCache:
    """The cache of the released model after `tokens` tokens, without memory."""
    cache = KimiLinearCache(KimiLinearConfig())
    with torch.device("meta"):
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, KDACacheLayer):
                window = torch.empty(1, 3 * 32 * 128, 3, dtype=torch.bfloat16)
                write_kda_states(cache, i, window, torch.empty(1, 32, 128, 128), tokens)
            else:
                latent = torch.empty(1, 1, tokens, 512, dtype=torch.bfloat16)
                cache.update(latent, torch.empty(1, 1, tokens, 64, dtype=torch.bfloat16), i)
    return cache


@pytest.mark.parametrize("tokens", [1, 300, 4096])
def test_bytes_at_the_released_shape(tokens):
    cache = filled_released_cache(tokens)
    kda = [layer for layer in cache.layers if isinstance(layer, KDACacheLayer)]
    mla = [layer for layer in cache.layers if isinstance(layer, LatentCacheLayer)]
    assert (len(kda), len(mla)) == (20, 7)
    assert {layer.nbytes for layer in mla} == {1152 * tokens}
    assert {layer.nbytes for layer in kda} == {2 * 2**20 + 72 * 2**10}  # whatever the number of tokens
    assert cache.nbytes == 7 * 1152 * tokens + 20 * (2 * 2**20 + 72 * 2**10)


def test_model_fills_the_cache_with_the_bytes_it_reports(load_tiny, random_ids):
    model = load_tiny("hybrid", dtype=torch.bfloat16)
    for tokens in (5, 40):
        _, cache = run(model, random_ids(2, tokens))
        state, window = 2 * 4 * 16 * 16 * 4, 2 * 3 * 64 * 3 * 2  # fp32 state, bf16 window
        rows = 2 * tokens * (32 + 8) * 2
        assert [layer.nbytes for layer in cache.layers] == [state + window, state + window, rows, rows]
        assert cache.nbytes == sum(tensor.nbytes for tensor in tensors_of(cache))
        assert all(layer.state.dtype == torch.float32 for layer in cache.layers[:2])


def test_latent_rows_grow_by_blocks_and_keep_their_content():
    layer, addresses, expected = LatentCacheLayer(), set(), torch.randn(2, 1, 1500, 6)
    for t in range(1500):
        latents, shared_keys = layer.update(expected[:, :, t : t + 1, :4], expected[:, :, t : t + 1, 4:])
        addresses.add(layer.storage.data_ptr())
        assert layer.allocated_nbytes % (256 * 2 * 6 * 4) == 0
        assert layer.nbytes <= layer.allocated_nbytes <= layer.nbytes + 2 * 256 * 2 * 6 * 4
        assert latents.shape == (2, 1, t + 1, 4)
    assert torch.equal(torch.cat([latents, shared_keys], -1), expected)
    assert len(addresses) <= 6  # one block of 256 tokens at a time, not one token


def test_long_contexts_grow_by_a_32nd():
    layer, chunk, capacities = LatentCacheLayer(), torch.zeros(1, 1, 64, 6), set()
    for _ in range(65_536 // 64):
        layer.update(chunk[..., :4], chunk[..., 4:])
        capacities.add(layer.allocated_nbytes)
        assert layer.allocated_nbytes <= 33 / 32 * layer.nbytes + 2 * 256 * 6 * 4
    assert len(capacities) <= 100  # 32 blocks up to 8,192 tokens, then ln 8 / ln (33 / 32) = 68; blocks alone: 256


@torch.no_grad()
def test_expected_lengths_are_allocated_at_once(model, random_ids):
    def rows(cache):
        return {layer.storage.shape[1] for layer in cache.layers if isinstance(layer, LatentCacheLayer)}

    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache, bounded = KimiLinearCache(model.config), KimiLinearCache(model.config)
    model.generate(random_ids(1, 300), past_key_values=cache, max_new_tokens=40, **options)
    assert cache.get_seq_length() == 339 and rows(cache) == {512}  # 340, in blocks of 256
    model.generate(random_ids(1, 300), past_key_values=bounded, max_length=10**9, max_time=0.0, **options)
    assert rows(bounded) == {1536}  # 300 + 1024, in blocks of 256
    cache.reset()
    cache.expect(1000)
    cache.expect(10)
    model(random_ids(1, 5), past_key_values=cache)
    assert rows(cache) == {1024}


def test_repr_names_layers_tokens_and_size(model, random_ids):
    assert "0 tokens" in repr(KimiLinearCache(model.config))
    _, cache = run(model, random_ids(1, 7))
    assert repr(cache) == "KimiLinearCache(2 KDA + 2 MLA layers, 7 tokens, 0.0 MiB)"
    assert repr(filled_released_cache(1024)).endswith("20 KDA + 7 MLA layers, 1024 tokens, 49.3 MiB)")


# The protocol


@pytest.mark.parametrize("name", CONFIGS)
def test_lengths_and_mask_sizes_of_every_layer(name, shared_tiny, random_ids):
    model = shared_tiny(name)
    cache = KimiLinearCache(model.config)
    assert cache.get_seq_length() == 0
    for length in (5, 6, 16):
        _, cache = run(model, random_ids(2, length - cache.get_seq_length()), cache)
        for i in range(len(cache)):
            assert cache.get_seq_length(i) == length
            assert cache.get_mask_sizes(3, i) == (length + 3, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_properties_that_dynamic_cache_answers_have_answers(name, shared_tiny, random_ids):
    model, cache = shared_tiny(name), KimiLinearCache(shared_tiny(name).config)
    names = [name for name, value in vars(Cache).items() if isinstance(value, property)]
    names = [name for name in names if hasattr(DynamicCache(config=model.config), name)]  # not all of them, in 5.10
    assert {"is_compileable", "is_sliding"} <= set(names)
    for filled in (False, True):
        if filled:
            run(model, random_ids(2, 5), cache)
        answers = {name: getattr(cache, name) for name in [*names, "batch_size"]}
        assert answers["is_compileable"] is False
        assert answers["batch_size"] == (2 if filled else -1)
        assert answers["is_sliding"] == [False] * len(cache)
        if name != "all_kda":  # transformers asks attention layers only
            assert answers.get("is_initialized", filled) is filled
        has_kda = "linear_attention" in model.config.layer_types
        assert answers.get("is_croppable", not (filled and has_kda)) is not (filled and has_kda)
        is_linear = [kind == "linear_attention" and name != "all_kda" for kind in model.config.layer_types]
        assert answers.get("is_linear", is_linear) == is_linear


def test_has_previous_state_is_about_kda_layers(model, shared_tiny, random_ids):
    cache = KimiLinearCache(model.config)
    assert not cache.has_previous_state()
    assert not cache.has_previous_state(0)
    run(model, random_ids(1, 3), cache)
    assert cache.has_previous_state()
    assert cache.has_previous_state(1)
    with pytest.raises(ValueError, match="layer 2 is an MLA layer"):
        cache.has_previous_state(2)
    with pytest.raises(ValueError, match="has none"):
        KimiLinearCache(shared_tiny("all_mla").config).has_previous_state()


def test_layers_are_croppable_while_empty_or_recording(model, random_ids):
    cache = KimiLinearCache(model.config)
    assert [layer.is_croppable for layer in cache.layers] == [True] * 4
    run(model, random_ids(1, 3), cache)
    assert [layer.is_croppable for layer in cache.layers] == [not layer.is_kda for layer in model.model.layers]
    cache.activate_past_recording()
    assert [layer.is_croppable for layer in cache.layers] == [True] * 4


ROW_OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    "select_by_mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("operation", list(ROW_OPERATIONS))
def test_decoding_goes_on_after_rows_were_moved(name, operation, shared_tiny, random_ids):
    model, ids, more = shared_tiny(name), random_ids(3, 12), random_ids(6, 4, seed=1)
    operate, rows = ROW_OPERATIONS[operation]
    _, cache = run(model, ids)
    operate(cache)
    assert cache.batch_size == len(rows)
    for tokens in more[: len(rows)].split([1, 3], dim=1):
        logits, cache = run(model, tokens, cache)
    expected, _ = run(model, torch.cat([ids[rows], more[: len(rows)]], dim=1))
    assert_same_logits(logits, expected[:, -3:])


@pytest.mark.parametrize("name", CONFIGS)
def test_reset_forgets_everything_even_the_batch_size(name, shared_tiny, random_ids):
    model = shared_tiny(name)
    _, cache = run(model, random_ids(3, 12))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.batch_size) == (0, 0, -1)
    for tokens in random_ids(2, 9).split([6, 3], dim=1):
        logits, _ = run(model, tokens, cache)
    assert_same_logits(logits, run(model, random_ids(2, 9))[0][:, -3:])


@pytest.mark.parametrize("name", CONFIGS)
def test_crop_that_removes_nothing_is_allowed(name, shared_tiny, random_ids):
    model = shared_tiny(name)
    KimiLinearCache(model.config).crop(-3)  # empty
    _, cache = run(model, random_ids(2, 12))
    for argument in (12, 50):
        cache.crop(argument)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("argument", [-5, 7], ids=["negative_counts_removed", "positive_is_length_to_keep"])
def test_all_mla_cache_crops_exactly(argument, shared_tiny, random_ids):
    model, ids, more = shared_tiny("all_mla"), random_ids(2, 12), random_ids(2, 4, seed=1)
    _, cache = run(model, ids)
    cache.crop(argument)
    assert cache.get_seq_length() == 7
    logits, _ = run(model, more, cache)
    assert_same_logits(logits, run(model, torch.cat([ids[:, :7], more], dim=1))[0][:, -4:])


def test_all_mla_cache_cropped_to_nothing_starts_again(shared_tiny, random_ids):
    model = shared_tiny("all_mla")
    _, cache = run(model, random_ids(2, 12))
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    assert_same_logits(run(model, random_ids(2, 5), cache)[0], run(model, random_ids(2, 5))[0])


def test_offload_and_prefetch_move_every_tensor(model, random_ids):
    ids = random_ids(2, 12)
    _, cache = run(model, ids[:, :9])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_same_logits(run(model, ids[:, 9:], cache)[0], run(model, ids)[0][:, 9:])
    for layer in cache.layers:
        layer.device = torch.device("meta")  # stands for a GPU that the tensors came from
        layer.prefetch()
    assert {tensor.device.type for tensor in tensors_of(cache)} == {"meta"}


@pytest.mark.parametrize("name", CONFIGS)
def test_deep_copies_go_separate_ways(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 12)
    _, cache = run(model, ids)
    twin = copy.deepcopy(cache)
    for t in range(3):
        run(model, random_ids(2, 1, seed=t), twin)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (12, 15)
    more = random_ids(2, 2, seed=9)
    assert_same_logits(run(model, more, cache)[0], run(model, torch.cat([ids, more], 1))[0][:, -2:])


# Autograd


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 2])  # of one row, autograd keeps views of the cached rows, not copies
def test_gradients_through_a_continued_cache_are_those_of_one_pass(name, batch, load_tiny, random_ids):
    ids, model = random_ids(batch, 15), load_tiny(name)
    target = torch.randn(batch, 15, 128, generator=torch.Generator().manual_seed(0))

    def gradients(parts):
        model.zero_grad()
        cache, logits = KimiLinearCache(model.config), []
        for part in parts:
            logits.append(model(part, past_key_values=cache).logits)
        (torch.cat(logits, 1) * target).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole = gradients([ids])
    for name, gradient in gradients(ids.split([8, 1, 6], dim=1)).items():
        # 1e-5 of the norm: sums of some 1e3 fp32 terms in another order.
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm() + 1e-6, name


# Padding


def assert_states_close(row_of: KimiLinearCache, row: int, alone: KimiLinearCache) -> None:
    for held, expected in zip(row_of.layers, alone.layers, strict=True):
        if isinstance(held, KDACacheLayer):
            torch.testing.assert_close(held.state[row], expected.state[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(held.window[row], expected.window[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 2, 5, 11], ids=lambda length: f"{length}_valid")
def test_right_padded_prompt_leaves_the_states_of_the_prompt_alone(name, length, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, length:] = 0
    padded, cache = run(model, ids, mask=mask)
    alone, cache_alone = run(model, ids[:1, :length])
    assert_same_logits(padded[:1, :length], alone)
    assert_states_close(cache, 0, cache_alone)

    for tokens in random_ids(2, 6, seed=1).split([1, 1, 4], dim=1):
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        padded, _ = run(model, tokens, cache, mask)
        alone, _ = run(model, tokens[:1], cache_alone)
        assert_same_logits(padded[:1], alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_in_the_middle_changes_nothing(name, shared_tiny, random_ids):
    model, ids, more = shared_tiny(name), random_ids(3, 80), random_ids(3, 2, seed=1)
    mask = (torch.rand(3, 80, generator=torch.Generator().manual_seed(0)) < 0.6).long()
    mask[1] = 1
    logits, cache = run(model, ids, mask=mask)
    after, _ = run(model, more, copy.deepcopy(cache), torch.cat([mask, torch.ones_like(more)], dim=1))
    for row in range(3):
        valid = mask[row].bool()
        alone, cache_alone = run(model, ids[row, valid][None])
        assert_same_logits(logits[row, valid], alone[0])
        assert_states_close(cache, row, cache_alone)
        assert_same_logits(after[row], run(model, more[row][None], cache_alone)[0][0])


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_in_a_later_chunk_changes_nothing(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 12:15] = 0  # left of the second chunk
    mask[0, 20:22] = 0  # within it
    mask[0, 30:] = 0  # and the whole of the third
    cache, logits = None, []
    for start, end in ((0, 12), (12, 30), (30, 40)):
        part, cache = run(model, ids[:, start:end], cache, mask[:, :end])
        logits.append(part)
    logits = torch.cat(logits, dim=1)
    valid = mask[0].bool()
    alone, cache_alone = run(model, ids[0, valid][None])
    assert_same_logits(logits[0, valid], alone[0])
    assert_same_logits(logits[1], run(model, ids[1:])[0][0])
    assert_states_close(cache, 0, cache_alone)


def test_single_padding_token_leaves_the_states_alone(model, random_ids):
    ids, cache = random_ids(2, 9), None
    mask = torch.ones_like(ids)
    mask[0, 5], mask[1, 6] = 0, 0
    for t in range(9):
        logits, cache = run(model, ids[:, t : t + 1], cache, mask[:, : t + 1])
    for row in range(2):
        alone, cache_alone = run(model, ids[row, mask[row].bool()][None])
        assert_same_logits(logits[row], alone[0, -1:])
        assert_states_close(cache, row, cache_alone)


# Caches that don't fit


def test_cache_of_another_batch_size_is_refused(model, random_ids):
    _, cache = run(model, random_ids(2, 5))
    with pytest.raises(ValueError, match="2 sequences and the input has 3 rows"):
        run(model, random_ids(3, 1), cache)


def other_config(**changes) -> KimiLinearConfig:
    linear = {"kda_layers": [1, 2], "full_attn_layers": [3, 4], "head_dim": 16, "num_heads": 4, **changes}
    return KimiLinearConfig(num_hidden_layers=len(linear["kda_layers"]) + 2, linear_attn_config=linear)


def test_cache_made_for_other_layers_is_refused(model, random_ids):
    config = other_config(kda_layers=[2, 3], full_attn_layers=[1, 4])
    for cache in (KimiLinearCache(config), DynamicCache(config=config)):
        with pytest.raises(ValueError, match="another config"):
            run(model, random_ids(2, 1), cache)
    short = KimiLinearCache(other_config(kda_layers=[1], full_attn_layers=[2, 3]))
    with pytest.raises(ValueError, match="3 layers and the model 4"):
        run(model, random_ids(2, 1), short)


def test_cache_filled_by_a_model_of_other_widths_is_refused(model, random_ids):
    cache = KimiLinearCache(model.config)
    write_kda_states(cache, 0, torch.zeros(2, 3 * 4 * 8, 3), torch.zeros(2, 4, 8, 8), 5)
    with pytest.raises(ValueError, match=r"state of shape \[4, 8, 8\], this model's \w+ \[4, 16, 16\]"):
        run(model, random_ids(2, 1), cache)
    cache = KimiLinearCache(model.config)
    cache.update(torch.zeros(2, 1, 5, 16), torch.zeros(2, 1, 5, 8), 2)
    with pytest.raises(ValueError, match="another config: layer 2"):
        run(model, random_ids(2, 1), cache)


def test_what_is_no_cache_is_refused(model, random_ids):
    with pytest.raises(ValueError, match="must be a Cache"):
        run(model, random_ids(2, 1), ((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(ValueError, match="0 layers"):
        run(model, random_ids(2, 1), DynamicCache())  # made without config: it doesn't know of KDA layers
