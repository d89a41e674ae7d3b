"""What `quantize` makes of each layer: a recipe is a `quantization_config`, and the config says which layers it means.

The same fields go into config.json and decide here (`Schemes`), so that the file never holds what its config doesn't
say. Targets and ignore are patterns that compressed-tensors, vLLM and SGLang read as we do. Experts are matched by all
that is below `experts.N.`: vLLM asks for `experts.0.gate_proj`, which no checkpoint holds, and not for `experts.0.w1`.
"""

from dataclasses import dataclass
from typing import Any

try:
    from compressed_tensors import __version__ as library_version
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationConfig
except ImportError:
    library_version, pack_to_int32, QuantizationConfig = None, None, None

EXPERTS = r"re:.*\.block_sparse_moe\.experts\.\d+\..*"
# Small, and read by every token (gates), or folded into what the cache keeps for ever (the latent's projections): all
# of them are 0.2% of the released weights.
KEPT = (
    "lm_head",
    r"re:.*\.block_sparse_moe\.gate$",
    r"re:.*\.self_attn\.(f_a_proj|f_b_proj|g_a_proj|g_b_proj|b_proj)$",
    r"re:.*\.self_attn\.(kv_a_proj_with_mqa|kv_b_proj)$",
    r"re:.*\.self_attn\.(q_conv1d|k_conv1d|v_conv1d)$",
)
_W4: dict[str, Any] = {
    "format": "pack-quantized",
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    "input_activations": None,
}
_FP8: dict[str, Any] = {
    "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
}


@dataclass(frozen=True)
class Recipe:
    """One way to quantise a checkpoint.

    Args:
        name: on the command line.
        summary: for the card and the help: which layers become what.
        groups: `config_groups` of compressed-tensors: (targets, fields).
    """

    name: str
    summary: str
    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("w4a16", "int4 in groups of 32: experts and large projections", ((("Linear",), _W4),)),
        Recipe(
            "w4a16-fp8",
            "int4 in groups of 32: routed experts; FP8 by row: large projections and shared experts",
            (((EXPERTS,), _W4), (("Linear",), _FP8)),
        ),
        Recipe("fp8", "FP8 by row: experts and large projections", ((("Linear",), _FP8),)),
    )
}


def require_library() -> None:
    """Raise ValueError unless compressed-tensors, which packs and describes the weights, is there."""
    if QuantizationConfig is None:
        raise ValueError(
            "quantize needs compressed-tensors 0.15 or later, which packs the weights and writes their description: "
            "pip install 'compressed-tensors>=0.15'"
        )


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """The fields of config.json for a recipe, as compressed-tensors writes them.

    Raises:
        ValueError: without compressed-tensors.
    """
    require_library()
    formats = [fields["format"] for _, fields in recipe.groups]
    config = QuantizationConfig(
        config_groups={
            f"group_{index}": {"targets": list(targets), **fields}
            for index, (targets, fields) in enumerate(recipe.groups)
        },
        format=formats[0] if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=list(KEPT),
    )
    fields = config.model_dump(mode="json")
    return {name: value for name, value in fields.items() if value is not None} | {"version": library_version}


__all__ = ["RECIPES", "Recipe", "pack_to_int32", "quantization_config", "require_library"]
