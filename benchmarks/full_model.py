"""The released shape with random weights, built on the GPU in seconds, and caches filled with random contents."""

import json
from pathlib import Path
from typing import Any

import torch

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.cache_kimi_linear import KDACacheLayer, KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

RELEASED_CONFIG = Path(__file__).parent / "released_config.json"


def released_config(layers: int | None = None) -> KimiLinearConfig:
    """The released config, cut to its first `layers` layers if given."""
    values = json.loads(RELEASED_CONFIG.read_text())
    if layers:
        values["num_hidden_layers"] = layers
        for key in ("kda_layers", "full_attn_layers"):
            values["linear_attn_config"][key] = [i for i in values["linear_attn_config"][key] if i <= layers]
    return KimiLinearConfig.from_dict(values)


@torch.no_grad()
def random_model(config: KimiLinearConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> KimiLinearForCausalLM:
    """A model of normal weights (std `initializer_range`), gates as fla initialises them, in eval mode."""
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config).to(dtype)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                kept = torch.float32 if name in ("A_log", "dt_bias") else dtype
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=kept, device=device), False)
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = torch.zeros(buffer.shape, dtype=dtype, device=device)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.fill_(1.0)
        elif name.endswith("A_log"):
            p.uniform_(1, 16).log_()
        elif name.endswith("dt_bias"):
            p.uniform_(-7, -2)
        else:
            p.normal_(std=config.initializer_range)
    return model.eval()


@torch.no_grad()
def random_cache(model: KimiLinearForCausalLM, batch: int, length: int) -> KimiLinearCache:
    """A cache that has seen `length` positions, filled with normal values of the sizes that layers leave behind."""
    config, weight = model.config, model.lm_head.weight
    cache = KimiLinearCache(config)
    heads, K = config.linear_num_heads, config.linear_head_dim

    def normal(*shape: int, **options: Any) -> torch.Tensor:
        return torch.randn(*shape, device=weight.device, **options)

    for layer in cache.layers:
        if isinstance(layer, KDACacheLayer):
            window = normal(batch, 3 * heads * K, config.linear_conv_kernel_dim - 1, dtype=weight.dtype)
            layer.lazy_initialization(conv_states=window, recurrent_states=normal(batch, heads, K, K) * 0.1)
            layer.advance(length)
        else:
            latent = normal(batch, 1, length, config.kv_lora_rank, dtype=weight.dtype)
            layer.update(latent, normal(batch, 1, length, config.qk_rope_head_dim, dtype=weight.dtype))
    return cache
