"""What a Kimi Linear checkpoint says of itself (config.json of moonshotai/Kimi-Linear-48B-A3B-Base and -Instruct).

Field names on disk are the released ones; the standard transformers names (`num_experts_per_tok`, `layer_types`,
`max_position_embeddings`, ...) are answered through `attribute_map` and properties and are never written.
Layer numbers are 1-based on disk; `layer_types` and `mlp_layer_types` are where they turn 0-based, once.
"""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

# Fields of the Kimi K3 text model, which declares the same model_type. Any value but None or False means another model.
_KIMI_K3_FIELDS = ("gate_lower_bound", "use_full_rank_gate", "mla_use_output_gate", "attn_res_block_size")

# Our own switches: written to config.json only when they differ from the default, so that a folder we save stays
# byte-compatible with what vLLM and the makers' code read.
_OWN_FIELDS = ("router_weight_uses_score_correction_bias", "kda_backend", "output_router_logits", "packed_experts")

# What transformers' native class writes beside the released fields, and where the released file has it.
_NATIVE_LINEAR_FIELDS = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
# Options of the native class that this model doesn't have. None, False and 0 leave them off.
_NATIVE_OPTIONS = ("attention_bias", "attention_dropout")

_ROUTER_ACTIVATIONS = ("sigmoid",)
_KDA_BACKENDS = ("auto", "triton", "fla", "torch")


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be " + ("a positive integer" if least else "an integer, zero or more"))


class KimiLinearConfig(PreTrainedConfig):
    r"""Configuration of Kimi Linear (arXiv 2510.26692). The defaults are the released 48B-A3B values.

    Args:
        vocab_size: rows of the embedding and of the untied lm_head.
        hidden_size: width of the residual stream.
        num_hidden_layers: decoder layers.
        num_attention_heads: MLA heads.
        num_key_value_heads: equals `num_attention_heads` (the latent serves all heads; there are no KV groups).
        head_dim: `hidden_size // num_attention_heads`; kept because the released file has it, used by nothing.
        intermediate_size: width of the dense MLP.
        hidden_act: `"silu"`, the only activation the released model family uses.
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: epsilon of all norms but `kv_a_layernorm`, whose epsilon is 1e-6 in the released code.
        use_cache: whether `forward` returns a cache.
        model_max_length: longest context in tokens (`max_position_embeddings`).
        kv_lora_rank: width of the MLA latent.
        q_lora_rank: `None`; queries are not compressed in this model.
        qk_nope_head_dim: per-head key channels expanded from the latent.
        qk_rope_head_dim: key channels shared by all heads. Named for their origin; nothing is rotated.
        v_head_dim: per-head value channels.
        mla_use_nope: `True`; MLA has no position encoding.
        rope_theta: unused, kept because the released file has it.
        num_experts: routed experts per MoE layer; `None` or 0 makes every layer dense.
        num_experts_per_token: routed experts a token visits.
        num_shared_experts: shared experts, as multiples of `moe_intermediate_size`.
        moe_intermediate_size: width of one expert.
        first_k_dense_replace: the first layers that keep a dense MLP.
        moe_layer_freq: of the others, every how many-th (by 0-based index) is MoE.
        moe_renormalize: whether the chosen experts' weights are normalised to sum to one.
        moe_router_activation_func: `"sigmoid"`.
        routed_scaling_factor: factor on the routed output, after normalisation.
        use_grouped_topk: as in the released file; with one group it changes nothing.
        num_expert_group: groups the experts are divided into.
        topk_group: groups a token may choose from.
        num_nextn_predict_layers: 0; the released checkpoints have no multi-token-prediction weights.
        linear_attn_config: `{"kda_layers", "full_attn_layers"}` (1-based layer numbers), `"head_dim"`, `"num_heads"`,
            `"short_conv_kernel_size"`. Left out, lists default to the released pattern: every fourth layer and the
            last one are MLA.
        router_weight_uses_score_correction_bias: mix experts by the *biased* scores, as the makers' remote code does
            (through an in-place addition). `False` follows DeepSeek-V3, vLLM, SGLang and transformers.
        kda_backend: `"auto"`, `"triton"`, `"fla"` or `"torch"`.
        output_router_logits: return router logits from `forward`.
        packed_experts: what becomes of the routed experts where bitsandbytes or torchao quantise the linear layers and
            leave experts alone. `None` packs them in the same width, `False` leaves them; a group of compressed-tensors
            (`format`, `weights`) says in which form, and is what a checkpoint that was saved so has here.

    Raises:
        ValueError: on contradictory values; the message names field, value and rule.
    """

    model_type = "kimi_linear"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "model_max_length",
        "num_experts_per_tok": "num_experts_per_token",
        "num_local_experts": "num_experts",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "n_group": "num_expert_group",
        "norm_topk_prob": "moe_renormalize",
    }
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        "layers.*.block_sparse_moe.experts.gate_up_proj": "packed_colwise",
        "layers.*.block_sparse_moe.experts.down_proj": "rowwise",
        "layers.*.block_sparse_moe.experts": "moe_tp_experts",
        "layers.*.block_sparse_moe.shared_experts.gate_proj": "colwise",
        "layers.*.block_sparse_moe.shared_experts.up_proj": "colwise",
        "layers.*.block_sparse_moe.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.block_sparse_moe.experts.gate_up_proj": "grouped_gemm",
        "layers.*.block_sparse_moe.experts.down_proj": "grouped_gemm",
        "layers.*.block_sparse_moe.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 163840
    hidden_size: int = 2304
    num_hidden_layers: int = 27
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 9216
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    model_max_length: int = 1048576
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 163584
    eos_token_id: int | list[int] | None = 163586
    pad_token_id: int | None = 163839

    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    mla_use_nope: bool = True
    rope_theta: float = 10000.0

    num_experts: int | None = 256
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 1024
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    moe_renormalize: bool = True
    moe_router_activation_func: str = "sigmoid"
    routed_scaling_factor: float = 2.446
    use_grouped_topk: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    num_nextn_predict_layers: int = 0

    linear_attn_config: dict[str, Any] | None = None

    router_weight_uses_score_correction_bias: bool = False
    kda_backend: str = "auto"
    output_router_logits: bool = False
    packed_experts: dict[str, Any] | bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        layer_types = kwargs.pop("layer_types", None)
        mlp_layer_types = kwargs.pop("mlp_layer_types", None)
        # The released file spells out `"rope_scaling": null`; the base class would turn a set value into rotary fields.
        if kwargs.pop("rope_scaling", None) is not None:
            raise ValueError("rope_scaling must be null: Kimi Linear's MLA has no position encoding to scale")
        native = {key: kwargs.pop(name) for name, key in _NATIVE_LINEAR_FIELDS.items() if name in kwargs}
        qk_head_dim = kwargs.pop("qk_head_dim", self.qk_head_dim)
        self.linear_attn_config = self._complete_linear_attn_config(self.linear_attn_config, layer_types, native)
        if native and mlp_layer_types is not None and list(mlp_layer_types) != self.mlp_layer_types:
            self._take_dense_layers(list(mlp_layer_types))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check_fields()
        # The released padding lies outside a smaller vocabulary; who left the field out may still set it.
        if self.pad_token_id != type(self).pad_token_id:
            self._check_pad_token()
        if qk_head_dim != self.qk_head_dim:
            raise ValueError(
                f"qk_head_dim={qk_head_dim} contradicts qk_nope_head_dim + qk_rope_head_dim = {self.qk_head_dim}; "
                "leave it out"
            )
        for name, given in (("layer_types", layer_types), ("mlp_layer_types", mlp_layer_types)):
            if given is not None and list(given) != getattr(self, name):
                raise ValueError(
                    f"{name}={list(given)} contradicts linear_attn_config, first_k_dense_replace and moe_layer_freq, "
                    f"which say {getattr(self, name)}; give only one of them"
                )

    def _take_dense_layers(self, mlp_layer_types: list[str]) -> None:
        """Set `first_k_dense_replace` from the native class's list, which replaces it there; other values stay."""
        dense = mlp_layer_types.count("dense")
        dense_first = mlp_layer_types == ["dense"] * dense + ["sparse"] * (len(mlp_layer_types) - dense)
        if dense_first and self.first_k_dense_replace == type(self).first_k_dense_replace and self.moe_layer_freq == 1:
            self.first_k_dense_replace = dense

    def _complete_linear_attn_config(
        self, given: dict[str, Any] | None, layer_types: list[str] | None, native: dict[str, Any]
    ) -> dict[str, Any]:
        """Fill what the caller left out: from `layer_types` and the `native` sizes where given, else as released."""
        if not isinstance(given, dict | None):
            raise ValueError(f"linear_attn_config={given!r} must be a dictionary")
        config = dict(given or {})
        for name in ("kda_layers", "full_attn_layers"):
            if not isinstance(config.get(name, []), list | tuple):
                raise ValueError(f"linear_attn_config[{name!r}]={config[name]!r} must be a list of layer numbers")
        if layer_types is not None and not ("kda_layers" in config or "full_attn_layers" in config):
            config["full_attn_layers"] = [i + 1 for i, kind in enumerate(layer_types) if kind == "full_attention"]
            config["kda_layers"] = [i + 1 for i, kind in enumerate(layer_types) if kind == "linear_attention"]
        numbers = range(1, self.num_hidden_layers + 1)
        if "full_attn_layers" not in config and "kda_layers" not in config:
            config["full_attn_layers"] = [i for i in numbers if i % 4 == 0 or i == self.num_hidden_layers]
        if "kda_layers" not in config:
            config["kda_layers"] = [i for i in numbers if i not in config["full_attn_layers"]]
        if "full_attn_layers" not in config:
            config["full_attn_layers"] = [i for i in numbers if i not in config["kda_layers"]]
        for name, key in _NATIVE_LINEAR_FIELDS.items():
            if key in native and config.setdefault(key, native[key]) != native[key]:
                raise ValueError(
                    f"{name}={native[key]} contradicts linear_attn_config[{key!r}]={config[key]}; give only one of them"
                )
        config.setdefault("head_dim", 128)
        config.setdefault("num_heads", 32)
        config.setdefault("short_conv_kernel_size", 4)
        return config

    @property
    def layer_types(self) -> list[str]:
        """`"linear_attention"` (KDA) or `"full_attention"` (MLA) of each layer, 0-based."""
        kda_layers = set(self.linear_attn_config["kda_layers"])
        return ["linear_attention" if i + 1 in kda_layers else "full_attention" for i in range(self.num_hidden_layers)]

    @property
    def mlp_layer_types(self) -> list[str]:
        """`"dense"` or `"sparse"` (mixture of experts) of each layer, 0-based."""

        def is_sparse(i: int) -> bool:
            return bool(self.num_experts) and i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0

        return ["sparse" if is_sparse(i) else "dense" for i in range(self.num_hidden_layers)]

    @property
    def linear_head_dim(self) -> int:
        """Key and value channels of one KDA head."""
        return self.linear_attn_config["head_dim"]

    @property
    def linear_num_heads(self) -> int:
        """KDA heads."""
        return self.linear_attn_config["num_heads"]

    @property
    def linear_conv_kernel_dim(self) -> int:
        """Taps of the short convolutions."""
        return self.linear_attn_config["short_conv_kernel_size"]

    @property
    def qk_head_dim(self) -> int:
        """Query and key channels of one MLA head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def check_consistency(self) -> None:
        """Raise ValueError if fields contradict one another; run when a model is built."""
        self._check_fields()
        self._check_pad_token()

    def _check_fields(self) -> None:
        self._check_other_models()
        self._check_sizes()
        self._check_layer_lists()
        self._check_experts()

    def _check_other_models(self) -> None:
        for name in _KIMI_K3_FIELDS:
            value = getattr(self, name, None)
            if value is not None and value is not False:
                raise ValueError(f"{name}={value!r} is a field of Kimi K3's text model, which this package cannot run")
        for name in _NATIVE_OPTIONS:
            if getattr(self, name, None):
                raise ValueError(f"{name}={getattr(self, name)!r} must be left out: Kimi Linear's attention has none")
        if self.q_lora_rank is not None:
            raise ValueError(
                f"q_lora_rank={self.q_lora_rank} must be null: Kimi Linear does not compress queries (Kimi K3 does)"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} must be 'silu', the activation of Kimi Linear")
        if self.mla_use_nope is not True:
            raise ValueError(f"mla_use_nope={self.mla_use_nope} must be true: rotary MLA is not part of Kimi Linear")
        if self.num_nextn_predict_layers:
            raise ValueError(
                f"num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0: "
                "multi-token prediction is not part of Kimi Linear"
            )

    def _check_sizes(self) -> None:
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        positive += ["model_max_length", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        values = {name: getattr(self, name) for name in positive}
        for key in ("head_dim", "num_heads", "short_conv_kernel_size"):
            values[f"linear_attn_config[{key!r}]"] = self.linear_attn_config[key]
        for name, value in values.items():
            _check_integer(name, value, least=1)
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be positive")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must equal num_attention_heads="
                f"{self.num_attention_heads}: the MLA latent serves every head and there are no groups"
            )
        # transformers' native class writes its shared-key width here, the released file the quotient.
        fitting = (self.hidden_size // self.num_attention_heads, self.qk_rope_head_dim)
        if self.head_dim not in fitting:
            raise ValueError(
                f"head_dim={self.head_dim} does not fit: it must be hidden_size // num_attention_heads = {fitting[0]} "
                "(nothing reads it; leave it out to have it filled in)"
            )
        if self.kda_backend not in _KDA_BACKENDS:
            raise ValueError(f"kda_backend={self.kda_backend!r} must be one of {', '.join(_KDA_BACKENDS)}")

    def _check_pad_token(self) -> None:
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} must be null or in [0, vocab_size={self.vocab_size})")

    def _check_layer_lists(self) -> None:
        kda, full = self.linear_attn_config["kda_layers"], self.linear_attn_config["full_attn_layers"]
        last = self.num_hidden_layers
        for name, numbers in (("kda_layers", kda), ("full_attn_layers", full)):
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= last:
                    raise ValueError(
                        f"linear_attn_config[{name!r}] holds {number!r}: layer numbers are 1-based and at most "
                        f"num_hidden_layers={last}"
                    )
            repeated = sorted({n for n in numbers if numbers.count(n) > 1})
            if repeated:
                raise ValueError(f"linear_attn_config[{name!r}] names layers {repeated} more than once")
        if both := sorted(set(kda) & set(full)):
            raise ValueError(
                f"layers {both} stand in both kda_layers and full_attn_layers of linear_attn_config; "
                "each layer must stand in exactly one"
            )
        if neither := sorted(set(range(1, last + 1)) - set(kda) - set(full)):
            raise ValueError(
                f"layers {neither} stand in neither kda_layers nor full_attn_layers of linear_attn_config; "
                f"each of the {last} layers (1-based) must stand in exactly one"
            )

    def _check_experts(self) -> None:
        if self.moe_router_activation_func not in _ROUTER_ACTIVATIONS:
            raise ValueError(
                f"moe_router_activation_func={self.moe_router_activation_func!r} must be one of "
                f"{', '.join(_ROUTER_ACTIVATIONS)}"
            )
        _check_integer("first_k_dense_replace", self.first_k_dense_replace, least=0)
        _check_integer("moe_layer_freq", self.moe_layer_freq, least=1)
        if not self.num_experts:
            return
        _check_integer("num_experts", self.num_experts, least=1)
        _check_integer("num_shared_experts", self.num_shared_experts, least=0)
        for name in ("num_experts_per_token", "moe_intermediate_size", "num_expert_group", "topk_group"):
            _check_integer(name, getattr(self, name), least=1)
        experts, groups = self.num_experts, self.num_expert_group
        if self.num_experts_per_token > experts:
            raise ValueError(f"num_experts_per_token={self.num_experts_per_token} must be in 1..num_experts={experts}")
        if experts % groups:
            raise ValueError(f"num_expert_group={groups} must divide num_experts={experts}")
        if groups > 1 and experts // groups < 2:
            raise ValueError(
                f"num_expert_group={groups} leaves {experts // groups} expert per group; a group is scored by its two "
                "best experts and needs at least 2"
            )
        if self.topk_group > groups:
            raise ValueError(f"topk_group={self.topk_group} must be in 1..num_expert_group={groups}")
        reachable = self.topk_group * (experts // groups)
        if self.num_experts_per_token > reachable:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} exceeds the {reachable} experts in "
                f"topk_group={self.topk_group} of num_expert_group={groups} groups"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of the released fields; our own switches only where they differ from their default."""
        output = super().to_dict()
        for name in _OWN_FIELDS:
            if output.get(name) == getattr(type(self), name):
                output.pop(name, None)
        return output


__all__ = ["KimiLinearConfig"]
