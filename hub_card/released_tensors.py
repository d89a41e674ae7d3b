"""Names and shapes of the tensors that a checkpoint in the released layout holds, from its config alone."""

from collections.abc import Iterator

from ..configuration.configuration_kimi_linear import KimiLinearConfig

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def released_shapes(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its name on disk."""
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for index, (attention, mlp) in enumerate(zip(config.layer_types, config.mlp_layer_types)):
        prefix = f"model.layers.{index}"
        shapes[f"{prefix}.input_layernorm.weight"] = (config.hidden_size,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (config.hidden_size,)
        attention_shapes = _kda if attention == "linear_attention" else _mla
        shapes.update((f"{prefix}.self_attn.{name}", shape) for name, shape in attention_shapes(config))
        mlp_shapes = _moe if mlp == "sparse" else _dense
        shapes.update((f"{prefix}.{name}", shape) for name, shape in mlp_shapes(config))
    return shapes


def _kda(config: KimiLinearConfig) -> Shapes:
    hidden, heads, width = config.hidden_size, config.linear_num_heads, config.linear_head_dim
    inner = heads * width
    for kind in "qkv":
        yield f"{kind}_proj.weight", (inner, hidden)
        yield f"{kind}_conv1d.weight", (inner, 1, config.linear_conv_kernel_dim)
    for kind in "fg":
        yield f"{kind}_a_proj.weight", (width, hidden)
        yield f"{kind}_b_proj.weight", (inner, width)
    yield "A_log", (1, 1, heads, 1)
    yield "dt_bias", (inner,)
    yield "b_proj.weight", (heads, hidden)
    yield "o_norm.weight", (width,)
    yield "o_proj.weight", (hidden, inner)


def _mla(config: KimiLinearConfig) -> Shapes:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    yield "q_proj.weight", (heads * config.qk_head_dim, hidden)
    yield "kv_a_proj_with_mqa.weight", (rank + config.qk_rope_head_dim, hidden)
    yield "kv_a_layernorm.weight", (rank,)
    yield "kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield "o_proj.weight", (hidden, heads * config.v_head_dim)


def _swiglu(hidden: int, width: int, names: tuple[str, str, str]) -> Shapes:
    gate, up, down = names
    yield f"{gate}.weight", (width, hidden)
    yield f"{up}.weight", (width, hidden)
    yield f"{down}.weight", (hidden, width)


def _dense(config: KimiLinearConfig) -> Shapes:
    for name, shape in _swiglu(config.hidden_size, config.intermediate_size, ("gate_proj", "up_proj", "down_proj")):
        yield f"mlp.{name}", shape


def _moe(config: KimiLinearConfig) -> Shapes:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    yield "block_sparse_moe.gate.weight", (config.num_experts, hidden)
    yield "block_sparse_moe.gate.e_score_correction_bias", (config.num_experts,)
    for expert in range(config.num_experts):
        for name, shape in _swiglu(hidden, width, ("w1", "w3", "w2")):
            yield f"block_sparse_moe.experts.{expert}.{name}", shape
    if config.num_shared_experts:
        shared = _swiglu(hidden, width * config.num_shared_experts, ("gate_proj", "up_proj", "down_proj"))
        for name, shape in shared:
            yield f"block_sparse_moe.shared_experts.{name}", shape


__all__ = ["released_shapes"]
