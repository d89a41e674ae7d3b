"""The whole model in float64, written from the formulas (reference: arXiv 2510.26692) over a dict of released tensors.

It shares no code with modeling/: no modules, no cache, no masks but the causal one. KDA is the float64 recurrence of
kernels/kda/reference.py. Only unpadded [B, T] batches.
"""

from typing import Any

import torch
import torch.nn.functional as F

from kimi_linear.kernels.kda.reference import recurrent_kda_reference


class Float64Model:
    """Logits, hidden states and expert choices of a released-layout checkpoint, differentiable in every tensor."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
        self.hidden_states: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> logits [B, T, vocab_size]; `hidden_states` is what `output_hidden_states` gives."""
        config, eps = self.config, self.config["rms_norm_eps"]
        x = self.tensors["model.embed_tokens.weight"][input_ids]
        self.hidden_states = [x]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            attend = self.kda if layer + 1 in config["linear_attn_config"]["kda_layers"] else self.mla
            is_moe = f"{name}.block_sparse_moe.gate.weight" in self.tensors
            x = x + attend(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x, eps))
            normed = self.norm(f"{name}.post_attention_layernorm", x, eps)
            x = x + (self.moe(f"{name}.block_sparse_moe", normed) if is_moe else self.mlp(f"{name}.mlp", normed))
            self.hidden_states.append(x)
        self.hidden_states[-1] = x = self.norm("model.norm", x, eps)
        return x @ self.tensors["lm_head.weight"].T

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.tensors[f"{name}.weight"]

    def kda(self, name: str, x: torch.Tensor) -> torch.Tensor:
        width = self.config["linear_attn_config"]["head_dim"]

        def convolved(kind: str) -> torch.Tensor:
            taps = self.tensors[f"{name}.{kind}_conv1d.weight"][:, 0]  # [D, W]
            padded = F.pad(self.linear(f"{name}.{kind}_proj", x), (0, 0, taps.shape[1] - 1, 0))
            y = sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(taps.shape[1]))
            return F.silu(y).unflatten(-1, (-1, width))

        gate = self.linear(f"{name}.f_b_proj", self.linear(f"{name}.f_a_proj", x)).unflatten(-1, (-1, width))
        o, _ = recurrent_kda_reference(
            convolved("q"),
            convolved("k"),
            convolved("v"),
            gate,
            self.linear(f"{name}.b_proj", x),
            A_log=self.tensors[f"{name}.A_log"],
            dt_bias=self.tensors[f"{name}.dt_bias"],
        )
        gate = self.linear(f"{name}.g_b_proj", self.linear(f"{name}.g_a_proj", x)).unflatten(-1, (-1, width))
        o = self.norm(f"{name}.o_norm", o, self.config["rms_norm_eps"]) * gate.sigmoid()
        return self.linear(f"{name}.o_proj", o.flatten(2))

    def mla(self, name: str, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        heads, nope, shared = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        query = self.linear(f"{name}.q_proj", x).unflatten(-1, (heads, nope + shared))
        latent, shared_key = self.linear(f"{name}.kv_a_proj_with_mqa", x).split([config["kv_lora_rank"], shared], -1)
        latent = self.norm(f"{name}.kv_a_layernorm", latent, 1e-6)
        key, value = self.linear(f"{name}.kv_b_proj", latent).unflatten(-1, (heads, -1)).tensor_split([nope], dim=-1)
        key = torch.cat([key, shared_key[:, :, None].expand(-1, -1, heads, -1)], dim=-1)
        scores = torch.einsum("bthd,blhd->bhtl", query, key) * (nope + shared) ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.linear(f"{name}.o_proj", torch.einsum("bhtl,blhv->bthv", weights, value).flatten(2))

    def mlp(self, name: str, x: torch.Tensor, gate="gate_proj", up="up_proj", down="down_proj") -> torch.Tensor:
        gated = F.silu(self.linear(f"{name}.{gate}", x)) * self.linear(f"{name}.{up}", x)
        return self.linear(f"{name}.{down}", gated)

    def route(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Weight of every expert for every token, [B, T, E]; zero where it is not chosen."""
        config, groups = self.config, self.config["num_expert_group"]
        scores = self.linear(f"{name}.gate", x).sigmoid()
        biased = scores + self.tensors[f"{name}.gate.e_score_correction_bias"]
        by_group = biased.unflatten(-1, (groups, -1))
        group_scores = by_group.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        last_kept = group_scores.sort(dim=-1, descending=True).values[..., config["topk_group"] - 1, None]
        allowed = (group_scores >= last_kept)[..., None].expand_as(by_group).flatten(-2)
        biased = biased.masked_fill(~allowed, float("-inf"))
        last_chosen = biased.sort(dim=-1, descending=True).values[..., config["num_experts_per_token"] - 1, None]
        weights = scores * (biased >= last_chosen)
        if config["moe_renormalize"]:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * config["routed_scaling_factor"]

    def moe(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weights = self.route(name, x)
        experts = [self.mlp(f"{name}.experts.{e}", x, "w1", "w3", "w2") for e in range(self.config["num_experts"])]
        routed = sum(weights[..., e, None] * output for e, output in enumerate(experts))
        return routed + self.mlp(f"{name}.shared_experts", x)
