"""The shape of every tensor of a model in memory, as its config gives it."""

from ...configuration.configuration_kimi_linear import KimiLinearConfig

Shapes = dict[str, tuple[int, ...]]


def released_shapes(config: KimiLinearConfig) -> Shapes:
    """Names of `KimiLinearForCausalLM`'s parameters and buffers, with their shapes; linear layers have no biases."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for i, (mixer, mlp) in enumerate(zip(config.layer_types, config.mlp_layer_types)):
        held = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        parts = _kda(config) if mixer == "linear_attention" else _mla(config)
        held |= {f"self_attn.{name}": shape for name, shape in parts.items()}
        held |= _moe(config) if mlp == "sparse" else _mlp("mlp", hidden, config.intermediate_size)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in held.items()}
    return shapes


def _kda(config: KimiLinearConfig) -> Shapes:
    hidden, heads, width = config.hidden_size, config.linear_num_heads, config.linear_head_dim
    inner = heads * width
    shapes: Shapes = {"A_log": (1, 1, heads, 1), "dt_bias": (inner,), "b_proj.weight": (heads, hidden)}
    for kind in "qkv":
        shapes[f"{kind}_proj.weight"] = (inner, hidden)
        shapes[f"{kind}_conv1d.weight"] = (inner, 1, config.linear_conv_kernel_dim)
    for kind in "fg":
        shapes[f"{kind}_a_proj.weight"], shapes[f"{kind}_b_proj.weight"] = (width, hidden), (inner, width)
    return shapes | {"o_norm.weight": (width,), "o_proj.weight": (hidden, inner)}


def _mla(config: KimiLinearConfig) -> Shapes:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    return {
        "q_proj.weight": (heads * config.qk_head_dim, hidden),
        "kv_a_proj_with_mqa.weight": (latent + config.qk_rope_head_dim, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj.weight": (hidden, heads * config.v_head_dim),
    }


def _mlp(name: str, hidden: int, width: int) -> Shapes:
    up, down = (width, hidden), (hidden, width)
    return {f"{name}.gate_proj.weight": up, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}


def _moe(config: KimiLinearConfig) -> Shapes:
    hidden, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
    shapes = {
        "gate.weight": (experts, hidden),
        "gate.e_score_correction_bias": (experts,),
        "experts.gate_up_proj": (experts, 2 * width, hidden),
        "experts.down_proj": (experts, hidden, width),
    }
    if config.num_shared_experts:
        shapes |= _mlp("shared_experts", hidden, width * config.num_shared_experts)
    return {f"block_sparse_moe.{name}": shape for name, shape in shapes.items()}


__all__ = ["released_shapes"]
