"""What a decode step launches, layer by layer, and the buffers that pass between its launches.

| layer | launches (one token) |
|---|---|
| KDA | norm + six projections; decay and output gate; convolutions to gated norm; o_proj + residual |
| MLA | norm + two projections; to latent space + new row; attention; splits joined; to values; o_proj + residual |
| MoE | norm + router; all experts up; all experts down + residual |
| dense MLP | norm + gate and up; down + residual |

Up to `SKINNY_TOKENS` tokens, products read every weight once by kernels of ours. More tokens take the library's matrix
products, which tile over both sides, and MLA goes to and from latent space by them too.

Adapters (LoRA, unmerged) are two launches more for linears that share an input, and one more for each of the two
stacked projections of the experts; those on kv_b_proj and the embedding are library operators.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...kernels.decode.adapters import decode_adapters
from ...kernels.decode.configs import (
    GROUP,
    SKINNY_TOKENS,
    LatentConfig,
    down_config,
    experts_config,
    gemv_config,
    grouped_configs,
    latent_config,
    skinny_config,
)
from ...kernels.decode.expert_adapters import ExpertFactors, decode_expert_adapter
from ...kernels.decode.experts import decode_expert_down, decode_expert_up
from ...kernels.decode.grouped_experts import decode_grouped_experts
from ...kernels.decode.latent import decode_latent_attention
from ...kernels.decode.linear import decode_gate, decode_linear, decode_norm
from ...kernels.decode.products import library_linear
from ...kernels.decode.routing import decode_group, decode_route, most_blocks
from ...kernels.gpu.classes import gpu_class
from ...kernels.kda.configs import step_config
from ...kernels.kda.step import kda_step_fwd
from ..placement import LayerSpan
from ..plain_adapters import adapter_of, base_of, expert_adapters
from .adapter_tables import AdapterTable, adapter_table, workspace_elements


class StepPlan:
    """The launches of a step on one device, and everything that passes between them.

    Args:
        model: a `KimiLinearForCausalLM` whose parameters are plain, of one dtype, those of `span` on its device.
        batch: sequences.
        tokens: new tokens of each.
        span: the layers that the plan runs; with the embedding before them or the head after them, if they are there.

    Attributes:
        input_ids: [N] int64, N = batch * tokens: what the step runs, if the span embeds.
        x: [N, hidden_size], the hidden state that enters the span's layers, if it doesn't embed, and leaves them.
        table: [layers, 4] int64, for each layer addresses in the cache and distances between its sequences.
        past: [1] int64, positions that the cache holds; `launch` adds `tokens` at its end.
        lengths: [batch] int32, new tokens of each sequence that KDA layers take: `tokens`, or 0 to leave them alone.
        logits: [N, vocab_size], if the span has the head.
    """

    def __init__(self, model: Any, batch: int, tokens: int, span: LayerSpan) -> None:
        self._model = weakref.ref(model)  # the model holds its steps; a cycle would keep its memory
        self.batch, self.tokens, self.span = batch, tokens, span
        self.config: KimiLinearConfig = model.config
        self.device, self.dtype = span.device, model.lm_head.weight.dtype
        self._upcast = self.device.type == "cpu" and self.dtype == torch.bfloat16
        self._gpu = "sm_90"
        if self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            self._gpu = gpu_class(capability, torch.version.hip is not None)
        self._pdl = self.device.type == "cuda" and self._gpu in ("sm_90", "sm_100")
        self._adapter_tables: dict[tuple[int, ...], AdapterTable | None] = {}
        self._allocate()

    def buffers(self) -> list[torch.Tensor]:
        """All tensors that the launches read or write, weights and cache left out."""
        tables = [
            x for table in self._adapter_tables.values() if table is not None for x in (table.table, table.scales)
        ]
        held = [*self.__dict__.values(), *getattr(self, "groups", ()), *tables]
        return [x for x in held if isinstance(x, torch.Tensor)]

    @torch.inference_mode(False)  # what is made in inference mode can't be written outside of it
    def _allocate(self) -> None:
        """Everything that passes between launches."""
        config, N = self.config, self.batch * self.tokens
        H, heads = config.hidden_size, config.num_attention_heads
        kda = config.linear_num_heads * config.linear_head_dim
        R, S = config.kv_lora_rank, config.qk_rope_head_dim

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=self.device)

        widths = [3 * kda + 2 * config.linear_head_dim + config.linear_num_heads, 2 * config.intermediate_size]
        widths += [heads * config.qk_head_dim + R + S, 2 * config.num_shared_experts * config.moe_intermediate_size]
        self.input_ids = torch.zeros(N, dtype=torch.int64, device=self.device)
        self.table = torch.zeros(self.span.end - self.span.first, 4, dtype=torch.int64, device=self.device)
        self.past = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.x, self.normed = empty(N, H), empty(N, H)
        self.p, self.gates = empty(N, max(widths)), empty(N, 2 * kda)
        self.lengths = torch.full((self.batch,), self.tokens, dtype=torch.int32, device=self.device)
        self.o = empty(N, max(kda, heads * config.v_head_dim))
        multiprocessors = 4
        if self.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        splits = max(1, multiprocessors // (self.batch * -(-self.tokens // self._latent_config().BT)))
        self.q_latent = empty(N, heads, R + S)
        self.partial = empty(N, splits, heads, R, dtype=torch.float32)
        self.partial_lse = empty(N, splits, heads, dtype=torch.float32)
        if self.span.has_head:
            self.logits = empty(N, self._model().lm_head.weight.shape[0])
        parts = [*self._layers(), *([self._model().lm_head] if self.span.has_head else [])]
        sizes = [workspace_elements(part.modules(), N, config.num_experts_per_token) for part in parts]
        self.low_rank = empty(max(sizes, default=0), dtype=torch.float32)
        if "sparse" in config.mlp_layer_types[self.span.first : self.span.end]:
            E, topk, I = config.num_experts, config.num_experts_per_token, config.moe_intermediate_size
            shared = config.num_shared_experts
            self.router = empty(N, E, dtype=torch.float32)
            self.h, self.z = empty(N * (topk + shared), I), empty(N * (topk + shared), H)
            self.chosen = empty(N, topk, dtype=torch.int32)
            self.expert_weights = empty(N, topk, dtype=torch.float32)
            blocks = most_blocks(N, topk, E, GROUP)
            self.groups = (
                empty(blocks * GROUP, dtype=torch.int32),
                empty(blocks, dtype=torch.int32),
                empty(1, dtype=torch.int32),
            )

    def _latent_config(self) -> LatentConfig:
        config = self.config
        return latent_config(
            self.tokens, config.num_attention_heads, config.kv_lora_rank, self.dtype.itemsize, self._gpu
        )

    def kinds_of_launches(self) -> list[Callable[[], None]]:
        """Calls that between them launch every kernel of the step, in parts that share as little as they can.

        Each is compiled at its first launch.
        """
        layers = self._layers()
        mixers = {layer.is_kda: i for i, layer in enumerate(layers)}
        mlps = {layer.is_moe: layer for layer in layers}
        return [
            *([self._launch_head] if self.span.has_head else []),
            *(partial(self._launch_mixer, layers[i], self.table[i]) for i in mixers.values()),
            *(partial(self._launch_mlp, layer) for layer in mlps.values()),
        ]

    def _layers(self) -> list[Any]:
        """The decoder layers of the span."""
        return list(self._model().model.layers)[
            self.span.first : self.span.end
        ]  # a slice of theirs registers them anew

    @torch.no_grad()
    def launch(self) -> None:
        """Run the span on what `input_ids` or `x`, `table`, `past` and `lengths` hold."""
        if self.span.embeds:
            self._embed(self._model().model.embed_tokens)
        for layer, entry in zip(self._layers(), self.table):
            self._launch_mixer(layer, entry)
            self._launch_mlp(layer)
        if self.span.has_head:
            self._launch_head()
        self.past.add_(self.tokens)

    def _embed(self, embedding: Any) -> None:
        torch.index_select(embedding.weight, 0, self.input_ids, out=self.x)
        adapter = adapter_of(embedding)
        if adapter is not None:
            low_rank = adapter.down.index_select(1, self.input_ids).t()
            self.x.add_(low_rank @ adapter.up.t(), alpha=adapter.scale)

    def _launch_mixer(self, layer: Any, entry: torch.Tensor) -> None:
        (self._kda if layer.is_kda else self._mla)(layer.self_attn, layer.input_layernorm, entry)

    def _launch_mlp(self, layer: Any) -> None:
        if layer.is_moe:
            self._moe(layer.block_sparse_moe, layer.post_attention_layernorm)
        else:
            self._dense(layer.mlp, layer.post_attention_layernorm)

    def _launch_head(self) -> None:
        model = self._model()
        self._linear(self.x, [model.lm_head], self.logits, norm=model.model.norm)

    def _linear(
        self,
        x: torch.Tensor,
        modules: list[Any],
        y: torch.Tensor,
        norm: Any = None,
        residual: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        """y = the modules' products of `norm` of x side by side, plus `residual`, which is y or None.

        `modules` are linears without bias (or a router, whose `weight` is one); `options` are `decode_linear`'s. What
        adapters around them add takes two more launches.
        """
        weights = [module.weight for module in modules]
        columns, rows = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        fused = {}
        if x.shape[0] == 1:
            config = gemv_config(columns, rows)
            if norm is not None:
                fused = {"norm_weight": norm.weight, "eps": norm.variance_epsilon}
        else:
            config = skinny_config(x.shape[0], columns, rows, x.element_size(), self._gpu)
            x = x if norm is None else self._normed(x, norm)
        # The library has no product of bf16 into fp32 that writes where it is told; the router is small.
        if x.shape[0] > SKINNY_TOKENS and x.dtype == y.dtype:
            library_linear(x, weights, y, add=residual is not None, **options)
        else:
            common = {**fused, **options, "upcast": self._upcast, "pdl": self._pdl}
            decode_linear(x, weights, y, config, residual=residual, **common)
        adapters = self._adapters(modules, options.pop("x_columns", None))
        if adapters is not None:
            common = {**fused, **options, "upcast": self._upcast, "pdl": self._pdl}
            decode_adapters(x, y, t=self.low_rank, **common, **adapters._asdict())

    def _adapters(self, modules: list[Any], x_columns: tuple[int, ...] | None) -> AdapterTable | None:
        """The table of `modules`, made at the first launch: a graph reads it by its address."""
        key = tuple(map(id, modules))
        if key not in self._adapter_tables:
            self._adapter_tables[key] = adapter_table(modules, x_columns, self.device)
        return self._adapter_tables[key]

    def _normed(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        decode_norm(x, norm.weight, norm.variance_epsilon, self.normed, self._pdl)
        return self.normed

    def _part(self, buffer: torch.Tensor, width: int) -> torch.Tensor:
        """[N, width] at the front of a buffer that layers of several widths share."""
        N = self.batch * self.tokens
        return buffer.view(-1)[: N * width].view(N, width)

    def _kda(self, kda: Any, norm: Any, entry: torch.Tensor) -> None:
        heads, K, B, T = kda.num_heads, kda.head_dim, self.batch, self.tokens
        inner = heads * K
        projections = [kda.q_proj, kda.k_proj, kda.v_proj, kda.f_a_proj, kda.g_a_proj, kda.b_proj]
        p = self._part(self.p, 3 * inner + 2 * K + heads)
        self._linear(self.x, projections, p, norm)
        columns = (3 * inner, 3 * inner + K)
        self._linear(p, [kda.f_b_proj, kda.g_b_proj], self.gates, x_columns=columns)
        q, k, v, _, beta = p.view(B, T, -1).split([inner, inner, inner, 2 * K, heads], dim=2)
        f, gate = self.gates.view(B, T, -1).chunk(2, dim=2)
        o = self._part(self.o, inner)
        weights = tuple(conv.weight[:, 0] for conv in (kda.q_conv1d, kda.k_conv1d, kda.v_conv1d))
        kda_step_fwd(
            q, k, v, f, beta, gate, o.view(B, T, heads, K), weights=weights, windows=None,
            A_log=kda.A_log, dt_bias=kda.dt_bias, norm_weight=kda.o_norm.weight, state=entry, lengths=self.lengths,
            scale=K**-0.5, eps=kda.o_norm.variance_epsilon, config=step_config(K, K), pdl=self._pdl,
        )  # fmt: skip
        self._linear(o, [kda.o_proj], self.x, residual=self.x)

    def _mla(self, mla: Any, norm: Any, entry: torch.Tensor) -> None:
        heads, V = self.config.num_attention_heads, mla.v_head_dim
        R, S = mla.kv_lora_rank, mla.qk_rope_head_dim
        p = self._part(self.p, heads * mla.qk_head_dim + R + S)
        self._linear(self.x, [mla.q_proj, mla.kv_a_proj_with_mqa], p, norm)
        latent_norm, o = mla.kv_a_layernorm, self._part(self.o, heads * V)
        decode_latent_attention(
            p, mla.kv_b_proj.weight, o.view(-1, heads, V), adapter=adapter_of(mla.kv_b_proj),
            norm_weight=latent_norm.weight, norm_eps=latent_norm.variance_epsilon, table=entry, past=self.past,
            q=self.q_latent, partial=self.partial, partial_lse=self.partial_lse, tokens=self.tokens, shared=S,
            scale=mla.scaling, config=self._latent_config(), upcast=self._upcast, pdl=self._pdl,
        )  # fmt: skip
        self._linear(o, [mla.o_proj], self.x, residual=self.x)

    def _dense(self, mlp: Any, norm: Any) -> None:
        self._mlp_down(mlp, self._mlp_up(mlp, norm))

    def _mlp_up(self, mlp: Any, norm: Any) -> torch.Tensor:
        """Gate and up activations, of several tokens multiplied already."""
        p = self._part(self.p, 2 * mlp.gate_proj.weight.shape[0])
        self._linear(self.x, [mlp.gate_proj, mlp.up_proj], p, norm)
        if p.shape[0] > 1:
            decode_gate(p, self._pdl)
        return p

    def _mlp_down(self, mlp: Any, p: torch.Tensor) -> None:
        gated = {"gated": True} if p.shape[0] == 1 else {}
        self._linear(p, [mlp.down_proj], self.x, residual=self.x, **gated)

    def _moe(self, moe: Any, norm: Any) -> None:
        shared = moe.shared_experts
        projections = () if shared is None else (shared.gate_proj, shared.up_proj, shared.down_proj)
        apart = any(adapter_of(module) is not None for module in projections)  # those are linears' adapters
        if apart:
            p = self._mlp_up(shared, norm)  # before the experts add to what it reads
        self._linear(self.x, [moe.gate], self.router, norm)
        weights = None if shared is None or apart else tuple(module.weight for module in projections)
        (self._experts_of_one if self.x.shape[0] == 1 else self._experts_of_several)(moe, norm, weights)
        if apart:
            self._mlp_down(shared, p)

    def _routing_rule(self, router: Any) -> dict[str, Any]:
        return {
            "factor": router.scaling_factor,
            "biased": router.biased_weights,
            "renormalize": router.renormalize,
            "pdl": self._pdl,
        }

    def _experts_of_one(self, moe: Any, norm: Any, shared: tuple[torch.Tensor, ...] | None) -> None:
        x, chosen, weights, experts = self.x, self.chosen, self.expert_weights, base_of(moe.experts)
        h = self.h if shared else self.h[: chosen.numel()]
        up, down = self._expert_factors(moe)
        common = {"norm_weight": norm.weight, "eps": norm.variance_epsilon, "bias": moe.gate.e_score_correction_bias}
        if up is not None:
            t = self._low_rank_of_experts(up)
            decode_expert_adapter(x, up, t, chosen, logits=self.router, pdl=self._pdl, **common)
        decode_expert_up(
            x, self.router, h, chosen, weights, gate_up=experts.gate_up_proj, shared=shared and shared[:2],
            config=experts_config(x.shape[1]), adapter=up and (t, up.up), **common, **self._routing_rule(moe.gate),
        )  # fmt: skip
        if down is not None:
            t = self._low_rank_of_experts(down)
            decode_expert_adapter(h, down, t, chosen, pdl=self._pdl)
        decode_expert_down(
            h, chosen, weights, experts.down_proj, shared and shared[2], x, down_config(experts.down_proj.shape[2]),
            adapter=down and (t, down.up), pdl=self._pdl,
        )  # fmt: skip

    def _experts_of_several(self, moe: Any, norm: Any, shared: tuple[torch.Tensor, ...] | None) -> None:
        x, router, experts = self.x, moe.gate, base_of(moe.experts)
        gate_up, down = experts.gate_up_proj, experts.down_proj
        decode_route(
            self.router, router.e_score_correction_bias, self.chosen, self.expert_weights, **self._routing_rule(router)
        )
        decode_group(self.chosen, *self.groups, router.num_experts, pdl=self._pdl)
        decode_grouped_experts(
            self.normed, self.expert_weights, x, groups=self.groups, gate_up=gate_up, down=down, shared=shared,
            h=self.h, z=self.z, configs=grouped_configs(x.shape[1], down.shape[2], x.element_size(), self._gpu),
            adapters=self._expert_factors(moe), t=self.low_rank, upcast=self._upcast, pdl=self._pdl,
        )  # fmt: skip

    def _expert_factors(self, moe: Any) -> tuple[ExpertFactors | None, ExpertFactors | None]:
        """Of the gate and up, and of the down projections."""
        found = {name: ExpertFactors(*adapter) for name, adapter in expert_adapters(moe.experts).items()}
        return found.get("gate_up_proj"), found.get("down_proj")

    def _low_rank_of_experts(self, factors: ExpertFactors) -> torch.Tensor:
        """[pairs, rank] for what the down-going factors give."""
        shape = self.chosen.numel(), factors.down.shape[1]
        return self.low_rank[: shape[0] * shape[1]].view(shape)


__all__ = ["StepPlan"]
