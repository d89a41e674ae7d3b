"""Random models and caches of the benchmarks, at a small size on the CPU."""

import pytest
import torch

from benchmarks import full_model
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM


@pytest.fixture(params=[False, True], ids=["hybrid", "all_mla"])
def shape(request, config):
    return config(request.param)


def test_cache_holds_the_bytes_that_are_counted(shape):
    model = full_model.random_model(KimiLinearForCausalLM, shape, "cpu")
    cache = full_model.random_cache(model, 2, 300)
    assert full_model.held_bytes(cache) == cache.nbytes == full_model.cache_bytes(shape, 2, 300)


def test_cache_with_room_does_not_move(config):
    model = full_model.random_model(KimiLinearForCausalLM, config(), "cpu")
    cache = full_model.random_cache(model, 1, 300, room=100)
    storage = [layer.storage for layer in cache.layers if hasattr(layer, "storage")]
    addresses = [tensor.data_ptr() for tensor in storage]
    with torch.no_grad():
        model(torch.zeros(1, 100, dtype=torch.long), past_key_values=cache)
    assert [layer.storage.data_ptr() for layer in cache.layers if hasattr(layer, "storage")] == addresses
    assert cache.get_seq_length() == 400


def test_native_model_and_cache_are_of_the_same_shape(shape, native_class):
    ours = full_model.random_model(KimiLinearForCausalLM, shape, "cpu")
    native = full_model.native_model(shape, "cpu")
    assert type(native) is native_class
    assert native.config.layer_types == shape.layer_types
    assert sum(x.numel() for x in native.parameters()) == sum(x.numel() for x in ours.parameters())
    held = [
        full_model.held_bytes(cache)
        for cache in (full_model.native_cache(native, 2, 300), full_model.random_cache(ours, 2, 300))
    ]
    # It keeps one input of each convolution more than is needed.
    extra = 2 * 2 * 3 * shape.linear_num_heads * shape.linear_head_dim
    assert held[0] - held[1] == extra * shape.layer_types.count("linear_attention")


def test_released_shape_has_the_bytes_of_the_paper():
    """1,152 B a token and MLA layer; all-MLA must hold 27 layers' at 1M tokens beside its weights in 139 GiB."""
    hybrid, all_mla = (full_model.released_config(all_mla) for all_mla in (False, True))
    per_token = [full_model.cache_bytes(c, 1, 1001) - full_model.cache_bytes(c, 1, 1000) for c in (hybrid, all_mla)]
    assert per_token == [7 * 1152, 27 * 1152]
    with torch.device("meta"):
        weights = [KimiLinearForCausalLM(c).bfloat16() for c in (hybrid, all_mla)]
    sizes = [sum(x.nbytes for x in model.parameters()) for model in weights]
    assert sizes[1] < sizes[0]
    assert sizes[1] + full_model.cache_bytes(all_mla, 1, 2**20) < 125 * 2**30
    steps = [full_model.step_bytes(model, 1, 2**20) for model in weights]
    assert steps[1] / steps[0] == pytest.approx(2.6, abs=0.05)
