"""Bytes that are held and bytes that a step must move, counted from shapes."""

from collections.abc import Iterator
from typing import Any

from ...configuration.configuration_kimi_linear import KimiLinearConfig

_FP32, _BF16 = 4, 2


def cache_bytes(config: Any, batch: int, length: int) -> int:
    """Bytes of a bf16 cache that has seen `length` positions of `batch` sequences, in our layout."""
    return batch * sum(layer_cache_bytes(config, kind, length) for kind in config.layer_types)


def layer_cache_bytes(config: Any, kind: str, length: int) -> int:
    """Bytes of one sequence in one layer of this kind (`layer_types`)."""
    if kind != "linear_attention":
        return _BF16 * length * (config.kv_lora_rank + config.qk_rope_head_dim)
    heads, K = config.linear_num_heads, config.linear_head_dim
    return _FP32 * heads * K**2 + _BF16 * 3 * heads * K * (config.linear_conv_kernel_dim - 1)


def held_bytes(cache: Any) -> int:
    """Bytes that a cache, ours or transformers' own, holds for the positions it has seen."""
    total = 0
    for layer in cache.layers:
        kda = hasattr(layer, "recurrent_states")
        held = (layer.conv_states[0], layer.recurrent_states[0]) if kda else (layer.keys, layer.values)
        total += sum(tensor.nbytes for tensor in held)
    return total


def used_experts(config: Any, tokens: int) -> float:
    """Share of a layer's experts that a step of so many tokens reads, if they choose independently."""
    if not config.num_experts:
        return 0.0
    return 1 - (1 - config.num_experts_per_token / config.num_experts) ** tokens


def step_bytes(model: Any, batch: int, length: int, tokens: int = 1) -> float:
    """Fewest bytes of a step of `tokens` for each of `batch` sequences: the weights it uses once, states read and
    written, latent rows once.

    Experts: each of the E is used by some of n tokens with probability 1 - (1 - k / E)^n if they choose independently.
    """
    return weights_read(model, batch * tokens) + cache_moved(model.config, batch, length)


def weights_read(model: Any, tokens: int) -> float:
    """Bytes of the weights, and of the scales of packed ones, that a step of so many tokens reads."""
    used, total = used_experts(model.config, tokens), 0.0
    for name, tensor in _tensors(model):
        if "embed_tokens" not in name:
            total += tensor.nbytes * (used if ".experts." in name else 1.0)
    return total


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def cache_moved(config: Any, batch: int, length: int) -> int:
    """Bytes of the cache that a step moves: states read and written, latent rows read."""
    state = 2 * _FP32 * config.linear_num_heads * config.linear_head_dim**2
    latents = _BF16 * length * (config.kv_lora_rank + config.qk_rope_head_dim)
    return batch * sum(state if kind == "linear_attention" else latents for kind in config.layer_types)


def prompt_flops(config: KimiLinearConfig, weights_used: int, batch: int, length: int) -> float:
    """Operations of a prompt: two a weight and token, and attention over the tokens before in MLA layers.

    Args:
        config: of the model.
        weights_used: parameters that a token is multiplied by (see `parameters_used`).
        batch, length: of the prompt.
    """
    width = config.qk_head_dim + config.v_head_dim
    attention = config.layer_types.count("full_attention") * config.num_attention_heads * width * length**2
    chunk = 64  # of the recurrence: inside a chunk as attention, between chunks over states
    K = config.linear_head_dim
    recurrence = config.layer_types.count("linear_attention") * config.linear_num_heads * length * K * (
        6 * K + 4 * chunk
    )  # fmt: skip
    return batch * (2.0 * weights_used * length + attention + recurrence)


def parameters_used(config: KimiLinearConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    """Parameters that multiply a token: of the experts those that it chooses; neither embedding nor output layer.

    Args:
        config: of the model.
        shapes: of the released tensors (`released_tensors.released_shapes`).
    """
    total = 0.0
    for name, shape in shapes.items():
        if "embed_tokens" in name or "lm_head" in name:
            continue
        share = config.num_experts_per_token / config.num_experts if ".experts." in name else 1.0
        count = 1
        for size in shape:
            count *= size
        total += count * share
    return round(total)


__all__ = [
    "cache_bytes",
    "cache_moved",
    "held_bytes",
    "layer_cache_bytes",
    "parameters_used",
    "prompt_flops",
    "step_bytes",
    "used_experts",
    "weights_read",
]
