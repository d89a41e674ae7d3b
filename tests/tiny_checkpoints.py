"""Tiny checkpoints in the released layout, written tensor by tensor, without any of our model code."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# config.json of Kimi-Linear-48B-A3B-Instruct, every field (reference/checkpoint.md 1.1).
RELEASED_CONFIG: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_kimi.KimiLinearConfig",
        "AutoModel": "modeling_kimi.KimiLinearModel",
        "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
    },
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def tiny_config(kda_layers: tuple[int, ...] = (1, 2), full_attn_layers: tuple[int, ...] = (3, 4), **overrides: Any):
    """A released-style config dict small enough for a CPU test: dense layer 1, MoE after it, both attention kinds."""
    config = {
        **RELEASED_CONFIG,
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_hidden_layers": len(kda_layers) + len(full_attn_layers),
        "linear_attn_config": {
            "kda_layers": list(kda_layers),
            "full_attn_layers": list(full_attn_layers),
            "head_dim": 16,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "vocab_size": 128,
        "model_max_length": 4096,
        "bos_token_id": 120,
        "eos_token_id": 122,
        "pad_token_id": 127,
        "dtype": "float32",
        "initializer_range": 0.1,
    }
    config.pop("auto_map")
    config.update(overrides)
    return config


# The smallest configs that cover every branch: both attention kinds, dense and MoE, one and several expert groups.
TINY_CONFIGS = {
    "hybrid": tiny_config(),
    "interleaved": tiny_config(kda_layers=(1, 3, 5), full_attn_layers=(2, 4), num_shared_experts=2),
    "two_groups": tiny_config(num_expert_group=2, topk_group=1),
    "four_groups": tiny_config(num_experts=16, num_expert_group=4, topk_group=2),
    "not_renormalised": tiny_config(moe_renormalize=False),
    "dense": tiny_config(first_k_dense_replace=4),
    "all_mla": tiny_config(kda_layers=(), full_attn_layers=(1, 2, 3)),
    "all_kda": tiny_config(kda_layers=(1, 2, 3), full_attn_layers=()),
}


def released_tensors(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Random tensors under the released names and shapes; `A_log` and `dt_bias` in fp32, the rest in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    linear = config["linear_attn_config"]
    hidden, experts = config["hidden_size"], config["num_experts"] or 0
    inner, head = linear["num_heads"] * linear["head_dim"], linear["head_dim"]
    heads, latent, shared = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    tensors: dict[str, torch.Tensor] = {}

    def weight(name: str, *shape: int, scale: float | None = None) -> None:
        std = scale if scale is not None else shape[-1] ** -0.5
        tensors[name] = (torch.randn(*shape, generator=generator) * std).to(dtype)

    def norm(name: str, width: int) -> None:
        tensors[name] = (1 + 0.1 * torch.randn(width, generator=generator)).to(dtype)

    def mlp(prefix: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        gate, up, down = names
        weight(f"{prefix}.{gate}.weight", width, hidden)
        weight(f"{prefix}.{up}.weight", width, hidden)
        weight(f"{prefix}.{down}.weight", hidden, width)

    weight("model.embed_tokens.weight", config["vocab_size"], hidden, scale=1.0)
    weight("lm_head.weight", config["vocab_size"], hidden)
    norm("model.norm.weight", hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attn = f"{prefix}.self_attn"
        norm(f"{prefix}.input_layernorm.weight", hidden)
        norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        if layer + 1 in linear["kda_layers"]:
            for kind in "qkv":
                weight(f"{attn}.{kind}_proj.weight", inner, hidden)
                weight(f"{attn}.{kind}_conv1d.weight", inner, 1, linear["short_conv_kernel_size"])
            tensors[f"{attn}.A_log"] = torch.rand(1, 1, linear["num_heads"], 1, generator=generator) * 3 - 1
            tensors[f"{attn}.dt_bias"] = torch.randn(inner, generator=generator) - 2
            for kind in "fg":
                weight(f"{attn}.{kind}_a_proj.weight", head, hidden)
                weight(f"{attn}.{kind}_b_proj.weight", inner, head)
            weight(f"{attn}.b_proj.weight", linear["num_heads"], hidden)
            norm(f"{attn}.o_norm.weight", head)
            weight(f"{attn}.o_proj.weight", hidden, inner)
        else:
            weight(f"{attn}.q_proj.weight", heads * (config["qk_nope_head_dim"] + shared), hidden)
            weight(f"{attn}.kv_a_proj_with_mqa.weight", latent + shared, hidden)
            norm(f"{attn}.kv_a_layernorm.weight", latent)
            weight(f"{attn}.kv_b_proj.weight", heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), latent)
            weight(f"{attn}.o_proj.weight", hidden, heads * config["v_head_dim"])
        if not experts or layer < config["first_k_dense_replace"] or layer % config["moe_layer_freq"]:
            mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        moe = f"{prefix}.block_sparse_moe"
        weight(f"{moe}.gate.weight", experts, hidden)
        weight(f"{moe}.gate.e_score_correction_bias", experts, scale=0.1)
        for expert in range(experts):
            mlp(f"{moe}.experts.{expert}", config["moe_intermediate_size"], ("w1", "w3", "w2"))
        if config["num_shared_experts"]:
            mlp(f"{moe}.shared_experts", config["moe_intermediate_size"] * config["num_shared_experts"])
    return tensors


def write_checkpoint(
    folder: Path, config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32, shards: int = 2
) -> dict[str, torch.Tensor]:
    """Write config.json and sharded safetensors in the released layout; returns the tensors.

    Tensors are dealt to the shards in turn, so that tensors of one layer sit in different shards, as in the release.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = released_tensors(config, seed, dtype)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": names[dtype]}))
    return tensors
