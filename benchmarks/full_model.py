"""The released shape with random weights, drawn on the GPU in seconds, and caches filled with random contents."""

import gc
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache

# Bytes a second that reads alone reach, by a part of the GPU's name (benchmarks/decode_notes.md; H100: its copy rate).
READ_BANDWIDTH = {"H200": 4.6e12, "H100": 3.0e12}


def released_config(all_mla: bool = False, layers: int | None = None) -> KimiLinearConfig:
    """The released shape, whose values are the config's defaults.

    Args:
        all_mla: MLA in every layer instead of KDA.
        layers: only the first so many, for GPUs that do not hold all 27 (16 take 57 GB in bf16).
    """
    config = KimiLinearConfig()
    count = config.num_hidden_layers if layers is None else layers
    if not 1 <= count <= config.num_hidden_layers:
        raise SystemExit(f"--layers must be from 1 to {config.num_hidden_layers}, got {count}")
    numbers = list(range(1, count + 1))
    pattern = dict(config.linear_attn_config)
    for name in ("kda_layers", "full_attn_layers"):
        pattern[name] = [number for number in pattern[name] if number in numbers]
    if all_mla:
        pattern |= {"kda_layers": [], "full_attn_layers": numbers}
    return KimiLinearConfig(num_hidden_layers=count, linear_attn_config=pattern, layer_types=None)


def random_model(model_class: Any, config: Any, device: str = "cuda", seed: int = 0) -> torch.nn.Module:
    """A bf16 model of `config` with random weights, drawn where they stay; gates as KDA's initialisation has them."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = model_class(config)
    finally:
        torch.set_default_dtype(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
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
            tensor.normal_(0, 0.02)
    return model


def native_model(config: KimiLinearConfig, device: str = "cuda") -> torch.nn.Module:
    """transformers' own class of the shape of `config`, as `random_model` draws it; it uses fla where that is found."""
    native = transformers.CONFIG_MAPPING[config.model_type].from_dict(config.to_dict())
    return random_model(transformers.KimiLinearForCausalLM, native, device)


def read_bandwidth() -> float:
    """Bytes a second of the current GPU, for limits; one that was never measured counts as an H200."""
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in READ_BANDWIDTH.items() if part in name), READ_BANDWIDTH["H200"])


def free_memory() -> int:
    """Bytes that can be allocated on the GPU, after what nothing refers to any more has been given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@torch.no_grad()
def random_cache(model: Any, batch: int, length: int, room: int = 0) -> KimiLinearCache:
    """A cache that has seen `length` positions, filled with normal values; what is in it costs no time to make.

    It has room for `room` positions more before it must grow. Latents are drawn in place, so that a cache may take
    nearly all of the memory.
    """
    config, cache = model.config, KimiLinearCache(model.config)
    for layer in cache.layers:
        if isinstance(layer, KDACacheLayer):
            layer.store(*_random_state(model, batch, config.linear_conv_kernel_dim - 1), new_tokens=length)
        else:
            latents, keys = (_normal(model, batch, 1, 0, n) for n in (config.kv_lora_rank, config.qk_rope_head_dim))
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
        if kind == "linear_attention":
            inputs, state = _random_state(model, batch, window)
            cache.update_conv_state(inputs, i, conv_kernel_size=window)
            cache.update_recurrent_state(state, i)
        else:
            cache.update(_normal(model, batch, 1, length, latent), _normal(model, batch, 1, length, key), i)
    return cache


def _random_state(model: Any, batch: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the last `window` inputs of the convolutions [B, 3 H K, window], state [B, H, K, K] in fp32) of a KDA layer."""
    heads, K = model.config.linear_num_heads, model.config.linear_head_dim
    return _normal(model, batch, 3 * heads * K, window), _normal(model, batch, heads, K, K, dtype=torch.float32) * 0.1


def _normal(model: Any, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    weight = model.lm_head.weight
    return torch.randn(*shape, dtype=dtype or weight.dtype, device=weight.device)


def cache_bytes(config: Any, batch: int, length: int) -> int:
    """Bytes of a bf16 cache that has seen `length` positions of `batch` sequences, in our layout."""
    heads, K = config.linear_num_heads, config.linear_head_dim
    kda = 4 * heads * K**2 + 2 * 3 * heads * K * (config.linear_conv_kernel_dim - 1)
    mla = 2 * length * (config.kv_lora_rank + config.qk_rope_head_dim)
    return batch * sum(kda if kind == "linear_attention" else mla for kind in config.layer_types)


def held_bytes(cache: Any) -> int:
    """Bytes that a cache, ours or transformers' own, holds for the positions it has seen."""
    total = 0
    for layer in cache.layers:
        kda = hasattr(layer, "recurrent_states")
        held = (layer.conv_states[0], layer.recurrent_states[0]) if kda else (layer.keys, layer.values)
        total += sum(tensor.nbytes for tensor in held)
    return total


def step_bytes(model: Any, batch: int, length: int, tokens: int = 1) -> float:
    """Fewest bytes of a step of `tokens` for each of `batch` sequences: the weights it uses once, states read and
    written, latent rows once.

    Experts: each of the E is used by some of n tokens with probability 1 - (1 - k / E)^n if they choose independently.
    """
    config, size = model.config, model.lm_head.weight.element_size()
    used = 1 - (1 - config.num_experts_per_token / config.num_experts) ** (batch * tokens)
    total = 0.0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            total += parameter.nbytes * (used if ".experts." in name else 1.0)
    for kind in config.layer_types:
        if kind == "linear_attention":
            total += 2 * 4 * batch * config.linear_num_heads * config.linear_head_dim**2
        else:
            total += batch * length * (config.kv_lora_rank + config.qk_rope_head_dim) * size
    return total
