"""One layer of transformers' own class, to compare a layer of ours with: made, run on the same input, dropped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..measure.random_models import native_class, native_config
from .streaming import Tensors

_VOCABULARY = 8  # of the model around the layer, which nothing reads


def one_layer_config(config: KimiLinearConfig, index: int) -> KimiLinearConfig:
    """A config of the same widths with a single layer, of the kinds that layer `index` has."""
    is_kda = config.layer_types[index] == "linear_attention"
    is_sparse = config.mlp_layer_types[index] == "sparse"
    left_out = ("layer_types", "mlp_layer_types", "quantization_config")
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    pattern = {"kda_layers": [1] if is_kda else [], "full_attn_layers": [] if is_kda else [1]}
    return KimiLinearConfig.from_dict({
        **fields, "num_hidden_layers": 1, "first_k_dense_replace": 0 if is_sparse else 1, "moe_layer_freq": 1,
        "linear_attn_config": {**config.linear_attn_config, **pattern}, "vocab_size": _VOCABULARY, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    })  # fmt: skip


@torch.no_grad()
def native_output(config: KimiLinearConfig, index: int, tensors: Tensors, hidden_states: torch.Tensor) -> torch.Tensor:
    """What transformers' layer `index` makes of `hidden_states` [B, T, D].

    The library's own conversions read the tensors. `A_log` and `dt_bias`, which it rounds to the model's dtype in some
    versions, are put back in fp32.

    Args:
        config: of the whole model.
        index: of the layer, from zero.
        tensors: of the layer by released name, dense.
        hidden_states: the layer's input.

    Raises:
        ValueError: if a tensor of the layer was not read.
    """
    dtype, device, width = hidden_states.dtype, hidden_states.device, config.hidden_size
    state = {f"model.layers.0.{name}": tensor for name, tensor in tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.zeros(_VOCABULARY, width, dtype=dtype)
    state["model.norm.weight"] = torch.ones(width, dtype=dtype)
    with _quietly():
        model, info = native_class().from_pretrained(
            None, config=native_config(one_layer_config(config, index)), state_dict=state, dtype=dtype,
            output_loading_info=True,
        )  # fmt: skip
    if problems := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        raise ValueError(f"transformers' own class does not read {problems[0]} of layer {index + 1}")
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("A_log", "dt_bias"):
            parameter.data = tensors[f"self_attn.{leaf}"].float().view(parameter.shape).clone()
    model = model.to(device).eval()
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, arguments, output: seen.append(_first(output)))
    try:
        model.model(inputs_embeds=hidden_states, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, transformers shows no bars and no warnings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


__all__ = ["native_output", "one_layer_config"]
