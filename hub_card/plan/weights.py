"""Bytes of weights in the formats that people use, by what a step reads of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...modeling.checkpoint.schemes import quantization_fields
from ...modeling.decode.path import reason_of_weights
from ..measure.counts import used_experts
from ..measure.random_models import empty_model
from ..released_tensors import released_shapes

_BF16, _FP32 = 16, 32
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
_EXPERTS = r"re:.*block_sparse_moe\.experts\..*"
_NEVER = ["lm_head", r"re:.*block_sparse_moe\.gate$"]


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights by layer and by use.

    Args:
        name: of the format.
        experts: of the routed experts, by layer.
        layers: of everything else in each layer.
        embedding: read one row a token.
        head: output layer and final norm; in a model with tied embeddings it is the embedding.
        reason: why a step can't be captured over them on an NVIDIA GPU, or None.
        is_packed: whether they are quantised.
    """

    name: str
    experts: tuple[int, ...]
    layers: tuple[int, ...]
    embedding: int
    head: int
    reason: str | None
    is_packed: bool

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.experts) + sum(self.layers) + self.embedding + self.head

    def read(self, config: KimiLinearConfig, tokens: int) -> float:
        """Bytes that a step of so many tokens reads, if they choose experts independently."""
        head = self.head or self.embedding
        return sum(self.experts) * used_experts(config, tokens) + sum(self.layers) + head


@dataclass(frozen=True)
class _Format:
    """Name, targets -> scheme of compressed-tensors, and bits of a number with its share of scales, by scheme."""

    name: str
    groups: tuple[tuple[str, dict[str, Any], str, float], ...]

    def config_of(self, config: KimiLinearConfig) -> KimiLinearConfig:
        """`config` with the `quantization_config` that describes the format."""
        groups = {
            f"group_{i}": {"targets": [target], "weights": weights, "format": stored}
            for i, (target, weights, stored, _) in enumerate(self.groups)
        }
        described = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": _NEVER}
        return KimiLinearConfig.from_dict({**_plain_fields(config), "quantization_config": described})


FORMATS = (
    _Format("W4 experts (int4, groups of 32)", ((_EXPERTS, _INT4, "pack-quantized", 4.5),)),
    _Format(
        "W4 experts, FP8 projections",
        ((_EXPERTS, _INT4, "pack-quantized", 4.5), ("Linear", _FP8, "float-quantized", 8.02)),
    ),
    _Format("NVFP4", (("Linear", _NVFP4, "nvfp4-pack-quantized", 4.5),)),
    _Format("FP8", (("Linear", _FP8, "float-quantized", 8.02),)),
)


def _plain_fields(config: KimiLinearConfig) -> dict[str, Any]:
    left_out = ("layer_types", "mlp_layer_types", "quantization_config")
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def bf16_weights(config: KimiLinearConfig) -> Weights:
    """The unquantised weights."""
    plain = KimiLinearConfig.from_dict(_plain_fields(config))
    sizes = ((name, math.prod(shape) * _plain_bits(name) / 8) for name, shape in released_shapes(plain).items())
    return _weights("bf16", plain, sizes, reason_of(plain), False)


def weights_in(format: _Format, config: KimiLinearConfig) -> Weights:
    """The weights in one of `FORMATS`: experts, and linear layers but for output layer and router."""
    bits = {target: size for target, _, _, size in format.groups}
    sizes = []
    for name, shape in released_shapes(config).items():
        is_expert = ".experts." in name
        linear = len(shape) == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", ".gate.weight"))
        found = bits.get(_EXPERTS) if is_expert else None
        found = found or (bits.get("Linear") if linear else None) or _plain_bits(name)
        sizes.append((name, math.prod(shape) * found / 8))
    return _weights(format.name, config, sizes, reason_of(format.config_of(config)), True)


def stored_weights(config: KimiLinearConfig, sizes: Iterable[tuple[str, int]]) -> Weights:
    """The weights of a folder's files: (name of a tensor, bytes)."""
    fields = quantization_fields(config)
    name = "this folder (bf16)" if fields is None else f"this folder ({fields['quant_method']})"
    return _weights(name, config, sizes, reason_of(config), fields is not None)


def _weights(
    name: str, config: KimiLinearConfig, sizes: Iterable[tuple[str, float]], reason: str | None, is_packed: bool
) -> Weights:
    count = config.num_hidden_layers
    experts, layers, parts = [0.0] * count, [0.0] * count, {"embedding": 0.0, "head": 0.0}
    for tensor, size in sizes:
        if tensor.startswith("model.layers."):
            (experts if ".experts." in tensor else layers)[int(tensor.split(".")[2])] += size
        else:
            parts["embedding" if "embed_tokens" in tensor else "head"] += size
    whole = [tuple(round(size) for size in sizes) for sizes in (experts, layers)]
    return Weights(name, *whole, round(parts["embedding"]), round(parts["head"]), reason, is_packed)


def _plain_bits(name: str) -> int:
    return _FP32 if name.endswith(("A_log", "dt_bias")) else _BF16


def reason_of(config: KimiLinearConfig) -> str | None:
    """Why a model of this config can't decode by captured steps on an NVIDIA GPU, or None; the model is asked."""
    from ...modeling.modeling_kimi_linear import KimiLinearForCausalLM

    return reason_of_weights(empty_model(KimiLinearForCausalLM, config))


__all__ = ["FORMATS", "Weights", "bf16_weights", "reason_of", "stored_weights", "weights_in"]
