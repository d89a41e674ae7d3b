"""Models with random weights that are drawn where they stay, and caches filled with random contents."""

import gc
from typing import Any

import torch
from transformers import DynamicCache

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...modeling.cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache

_STD = 0.02


def empty_model(model_class: Any, config: Any) -> torch.nn.Module:
    """A bf16 model of `config` without storage."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(dtype)


def random_model(model_class: Any, config: Any, device: Any = "cuda", seed: int = 0) -> torch.nn.Module:
    """A bf16 model of `config` with random weights, drawn where they stay; gates as KDA's initialisation has them.

    Args:
        model_class: ours or transformers' own.
        config: of that class.
        device: one for all, or a device map as accelerate writes it, for a model that is spread over GPUs.
        seed: of the weights.
    """
    model = empty_model(model_class, config)
    if isinstance(device, dict):
        for name, place in device.items():
            model.get_submodule(name).to_empty(device=place)
    else:
        model.to_empty(device=device)
    model = model.eval().requires_grad_(False)
    draw_weights(model, seed)
    if not isinstance(device, dict):
        return model
    from accelerate import dispatch_model

    return dispatch_model(model, device)


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of `model` in place."""
    torch.manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log"):
            tensor.uniform_(1, 16).log_()
        elif name.endswith("dt_bias"):
            tensor.uniform_(-7, -2)
        elif name.endswith("e_score_correction_bias"):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1)
        else:
            tensor.normal_(0, _STD)


def native_class() -> Any:
    """transformers' own KimiLinearForCausalLM.

    Raises:
        ValueError: before transformers 5.17, which has none.
    """
    import transformers

    if not hasattr(transformers, "KimiLinearForCausalLM"):
        raise ValueError(f"transformers {transformers.__version__} has no Kimi Linear of its own; 5.17 and later do")
    return transformers.KimiLinearForCausalLM


def native_config(config: KimiLinearConfig) -> Any:
    """The same shape as a config of transformers' own class."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config.model_type].from_dict(config.to_dict())


def native_model(config: KimiLinearConfig, device: Any = "cuda") -> torch.nn.Module:
    """transformers' own class of the shape of `config`, as `random_model` draws it; it uses fla where that is found."""
    return random_model(native_class(), native_config(config), device)


def free_memory() -> int:
    """Bytes that can be allocated on the GPU, after what nothing refers to any more has been given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@torch.no_grad()
def random_cache(model: Any, batch: int, length: int, room: int = 0) -> KimiLinearCache:
    """A cache that has seen `length` positions, filled with normal values; what is in it costs no time to make.

    It has room for `room` positions more before it must grow. Latents are drawn in place, so that a cache may take
    nearly all of the memory. Each layer's part is where the layer is.
    """
    config, cache = model.config, KimiLinearCache(model.config)
    for i, layer in enumerate(cache.layers):
        like = _weight_of(model, i)
        if isinstance(layer, KDACacheLayer):
            layer.store(*_random_state(config, like, batch, config.linear_conv_kernel_dim - 1), new_tokens=length)
        else:
            latents, keys = (_normal(like, batch, 1, 0, n) for n in (config.kv_lora_rank, config.qk_rope_head_dim))
            layer.lazy_initialization(latents, keys)
            layer.reserve(length + room)
            layer.storage.normal_()
            layer.advance(length)
    return cache


@torch.no_grad()
def native_cache(model: Any, batch: int, length: int) -> DynamicCache:
    """The same for transformers' own class, which holds the same latents, in the cache that it makes by default."""
    config, cache = model.config, DynamicCache(config=model.config)
    window, latent, key = config.linear_conv_kernel_dim, config.kv_lora_rank, config.qk_rope_head_dim
    for i, kind in enumerate(config.layer_types):
        like = _weight_of(model, i)
        if kind == "linear_attention":
            inputs, state = _random_state(config, like, batch, window)
            cache.update_conv_state(inputs, i, conv_kernel_size=window)
            cache.update_recurrent_state(state, i)
        else:
            cache.update(_normal(like, batch, 1, length, latent), _normal(like, batch, 1, length, key), i)
    return cache


def _weight_of(model: Any, layer: int) -> torch.Tensor:
    """A weight that lies where the layer computes, in the dtype of what it caches."""
    return model.model.layers[layer].input_layernorm.weight


def _random_state(config: Any, like: torch.Tensor, batch: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the last `window` inputs of the convolutions [B, 3 H K, window], state [B, H, K, K] in fp32) of a KDA layer."""
    heads, K = config.linear_num_heads, config.linear_head_dim
    return _normal(like, batch, 3 * heads * K, window), _normal(like, batch, heads, K, K, dtype=torch.float32) * 0.1


def _normal(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype or like.dtype, device=like.device)


__all__ = [
    "draw_weights",
    "empty_model",
    "free_memory",
    "native_cache",
    "native_class",
    "native_config",
    "native_model",
    "random_cache",
    "random_model",
]
