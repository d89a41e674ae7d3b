"""What vLLM and SGLang require of a folder, read from their sources (serving_engines.md), and a check of it."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from .hub_files import has_chat_template, read_config, saved_by_transformers_5
from .quantised_tensors import ExpectedTensors, expected_tensors
from .released_tensors import released_shapes
from .weight_files import find_weights

ENGINES = "vLLM (0.11.1 or later) and SGLang (0.5.5 or later)"

# What the engines' own config classes take for a field that config.json leaves out.
_DEFAULTS = {
    "vocab_size": 163840,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "model_max_length": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "kv_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "mla_use_nope": False,
    "num_experts": None,
    "num_experts_per_token": None,
    "num_shared_experts": 0,
    "moe_intermediate_size": None,
    "moe_renormalize": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "linear_attn_config": None,
}
_LINEAR_ATTN = ("kda_layers", "full_attn_layers", "head_dim", "num_heads", "short_conv_kernel_size")
# (field, the only value that works, what happens otherwise). The config class refuses other things by itself.
_FIXED = (
    ("rms_norm_eps", 1e-5, "the gated norm of KDA layers has 1e-5 built in"),
    ("tie_word_embeddings", False, "lm_head is a weight of its own"),
    ("router_weight_uses_score_correction_bias", False, "experts are mixed by their unbiased scores"),
)

# What llama.cpp's converter and exllamav3 don't look at: a folder with it converts, and answers otherwise.
_IGNORED_ELSEWHERE = {
    "several expert groups": lambda config: config.num_expert_group > 1,
    "weights of experts without renormalisation": lambda config: (
        bool(config.num_experts) and not config.moe_renormalize
    ),
    "tied embeddings": lambda config: config.tie_word_embeddings,
    "other numbers of heads in KDA than in MLA": lambda config: config.num_attention_heads != config.linear_num_heads,
}


@dataclass(frozen=True)
class ServingReport:
    """What a folder lacks for serving.

    Args:
        problems: what both engines would stumble over; empty if they can serve it.
        notes: what is worth knowing and no obstacle.
    """

    problems: list[str]
    notes: list[str]


def check_serving(folder: Path) -> ServingReport:
    """Compare `folder` with what vLLM and SGLang read from it: fields of config.json, tensor names and shapes.

    Reads config.json and the headers of the weight files, so it takes a moment at any size.

    Raises:
        ValueError: if the folder is none of this model's, or its files are damaged; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    config, fields = read_config(folder / "config.json")
    present = {name: shape for file in find_weights(folder) for name, shape in _shapes_in(file.source).items()}
    expected = expected_tensors(config, released_shapes(config), present)
    problems = _field_problems(config, fields) + _tensor_problems(expected, present)
    return ServingReport(problems, _notes(config, fields, folder) + expected.notes)


def _field_problems(config: KimiLinearConfig, fields: dict[str, Any]) -> list[str]:
    problems = []
    architectures = fields.get("architectures")
    if architectures != ["KimiLinearForCausalLM"]:
        problems.append(f"config.json: architectures is {architectures!r}, they look for ['KimiLinearForCausalLM']")
    linear = fields.get("linear_attn_config") or {}
    absent = [name for name, default in _DEFAULTS.items() if name not in fields and getattr(config, name) != default]
    absent += [f"linear_attn_config[{name!r}]" for name in _LINEAR_ATTN if linear and name not in linear]
    if absent:
        problems.append(f"config.json leaves out {', '.join(absent)}: their defaults are not this model's")
    for name, value, reason in _FIXED:
        if getattr(config, name) != value:
            problems.append(f"config.json: {name} must be {value!r}: {reason}")
    if config.num_experts and not config.num_shared_experts:
        problems.append("config.json: num_shared_experts must be 1 or more: they add one to every MoE layer")
    return problems


def _tensor_problems(expected: ExpectedTensors, present: dict[str, tuple[int, ...]]) -> list[str]:
    shapes = expected.shapes
    groups = {
        "lacks": sorted(set(shapes) - set(present)),
        "holds, and they would not know,": sorted(set(present) - set(shapes) - expected.accepted),
        "holds in another shape": sorted(n for n in set(shapes) & set(present) if present[n] not in shapes[n]),
    }
    return [
        f"the checkpoint {what} {len(names)} tensors, the first is {names[0]}"
        for what, names in groups.items()
        if names
    ]


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape by tensor name, from the header of a safetensors file that `find_weights` has checked."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _notes(config: KimiLinearConfig, fields: dict[str, Any], folder: Path) -> list[str]:
    heads = math.gcd(config.num_attention_heads, config.linear_num_heads)
    sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
    notes = [f"tensor parallel sizes that divide all heads: {sizes}"]
    if "auto_map" in fields:
        notes.append(
            "leave --trust-remote-code out: the folder's code is for transformers, the engines bring their own"
        )
    if (config.linear_head_dim, config.kv_lora_rank, config.qk_rope_head_dim) != (128, 512, 64):
        notes.append("head sizes are not those of the released model, for which the engines' kernels are written")
    if not (folder / "tokenizer.json").is_file():
        notes.append("there is no tokenizer: requests must hold token ids")
    elif not has_chat_template(folder):
        notes.append("there is no chat template: only completions, no chat")
    if (limit := _tokenizer_limit(folder)) < config.model_max_length:
        text = f"vLLM serves no more than {limit} tokens, model_max_length of tokenizer_config.json; the config says "
        notes.append(text + str(config.model_max_length))
    if ignored := [what for what, has in _IGNORED_ELSEWHERE.items() if has(config)]:
        notes.append(
            f"llama.cpp and exllamav3 ignore {', '.join(ignored)}: they convert the folder and answer otherwise"
        )
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and saved_by_transformers_5(json.loads(settings.read_text(encoding="utf-8"))):
        notes.append(
            "tokenizer_config.json was saved by transformers 5 (TokenizersBackend, a list of tokens): engines on 4.57 "
            "cannot read it; `export --checkpoint` writes it as both read it"
        )
    return notes


def _tokenizer_limit(folder: Path) -> float:
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return math.inf
    return json.loads(settings.read_text(encoding="utf-8")).get("model_max_length", math.inf)


__all__ = ["ENGINES", "ServingReport", "check_serving"]
