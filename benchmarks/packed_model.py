"""Configs of quantised checkpoints at the released shape, for models whose packed weights are drawn at random."""

from typing import Any

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig

_EXPERTS = r"re:.*\.block_sparse_moe\.experts\..*"
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
# What none of the formats quantises.
_KEPT = (
    "lm_head",
    r"re:.*\.block_sparse_moe\.gate$",
    r"re:.*\.self_attn\.(f_a_proj|f_b_proj|g_a_proj|g_b_proj|b_proj)$",
    r"re:.*\.self_attn\.(kv_a_proj_with_mqa|kv_b_proj)$",
    r"re:.*\.self_attn\.(q_conv1d|k_conv1d|v_conv1d)$",
)
# name -> groups of a compressed-tensors config: (targets, format, weights)
FORMATS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "w4": ((_EXPERTS, "pack-quantized", _INT4),),
    "w4-fp8": ((_EXPERTS, "pack-quantized", _INT4), ("Linear", "float-quantized", _FP8)),
    "fp8": (("Linear", "float-quantized", _FP8),),
}


def packed_config(config: KimiLinearConfig, name: str) -> KimiLinearConfig:
    """`config` with the `quantization_config` of one of FORMATS."""
    groups = {
        f"group_{i}": {"targets": [target], "format": kind, "weights": weights, "input_activations": None}
        for i, (target, kind, weights) in enumerate(FORMATS[name])
    }
    fields = {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "format": FORMATS[name][0][1] if len(groups) == 1 else "mixed-precision",
        "ignore": list(_KEPT),
    }
    return KimiLinearConfig.from_dict({**config.to_dict(), "quantization_config": fields})


__all__ = ["FORMATS", "packed_config"]
