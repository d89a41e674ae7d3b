"""The released shape with random weights, drawn on the GPU in seconds, and caches filled with random contents."""

from typing import Any

import torch

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.cache_kimi_linear import KDACacheLayer, KimiLinearCache

# Copy bandwidth of an H200, bytes read and written, measured there on 2026-11-23.
COPY_BANDWIDTH = 4.30e12


def released_config(all_mla: bool = False) -> KimiLinearConfig:
    """The released shape, whose values are the config's defaults; `all_mla` puts MLA in every layer instead of KDA."""
    config = KimiLinearConfig()
    if not all_mla:
        return config
    layers = list(range(1, config.num_hidden_layers + 1))
    pattern = {**config.linear_attn_config, "kda_layers": [], "full_attn_layers": layers}
    return KimiLinearConfig(linear_attn_config=pattern, layer_types=None)


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


@torch.no_grad()
def random_cache(model: Any, batch: int, length: int) -> KimiLinearCache:
    """A cache that has seen `length` positions, filled with normal values; what is in it costs no time to make."""
    config, weight = model.config, model.lm_head.weight
    cache = KimiLinearCache(config)
    heads, K = config.linear_num_heads, config.linear_head_dim

    def normal(*shape: int, **options: Any) -> torch.Tensor:
        return torch.randn(*shape, device=weight.device, **options)

    for layer in cache.layers:
        if isinstance(layer, KDACacheLayer):
            window = normal(batch, 3 * heads * K, config.linear_conv_kernel_dim - 1, dtype=weight.dtype)
            layer.store(window, normal(batch, heads, K, K) * 0.1, new_tokens=length)
        else:
            latent = normal(batch, 1, length, config.kv_lora_rank, dtype=weight.dtype)
            layer.update(latent, normal(batch, 1, length, config.qk_rope_head_dim, dtype=weight.dtype))
    return cache


def step_bytes(model: Any, batch: int, length: int) -> float:
    """Fewest bytes of one decode step: the weights it uses once, states read and written, latent rows once.

    Experts: each of the E is used by some of `batch` tokens with probability 1 - (1 - k / E)^batch.
    """
    config, size = model.config, model.lm_head.weight.element_size()
    used = 1 - (1 - config.num_experts_per_token / config.num_experts) ** batch
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
