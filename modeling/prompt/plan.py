"""What a packed prompt launches, layer by layer.

T tokens of N rows lie end to end (kernels/prompt/packed_kda.py), so padding costs nothing, and rows of any lengths go
through the same launches. Lengths, positions and addresses are data in device memory: one captured plan serves every
prompt that fits. Tokens after the last row are padding: they touch no cache and choose no experts.

| layer | launches |
|---|---|
| KDA | norm, six projections; decay and output gate; convolutions; windows; two of the recurrence; gated norm; o_proj |
| MLA, in latent space | norm + two projections; new rows; queries to latent space; attention; to values; o_proj |
| MLA, expanded | norm + two projections; new rows; rows gathered and expanded; attention; o_proj |
| MoE, few tokens | norm + router; choice; grouping; experts up, down, sum |
| MoE, many tokens | norm + router; choice; ends; scatter; two grouped products, gate between them; sum; shared MLP |
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.decode.configs import LatentConfig, grouped_configs, latent_config
from ...kernels.decode.grouped_experts import decode_grouped_experts
from ...kernels.decode.linear import decode_gate
from ...kernels.decode.products import library_absorb, library_values
from ...kernels.decode.routing import decode_group, most_blocks
from ...kernels.kda.configs import inter_config, intra_config
from ...kernels.kda.index import Segment, kda_index_fwd
from ...kernels.kda.inter import kda_inter_fwd
from ...kernels.kda.intra import intra_tiles, kda_intra_fwd
from ...kernels.prompt.packed_attention import packed_attention_config, packed_attention_fwd, packed_gather_fwd
from ...kernels.prompt.packed_experts import (
    packed_combine_fwd,
    packed_ends_fwd,
    packed_route_rank_fwd,
    packed_scatter_fwd,
)
from ...kernels.prompt.packed_kda import packed_conv_fwd, packed_gated_norm_fwd, packed_window_fwd
from ...kernels.prompt.packed_latent import packed_attend_fwd, packed_row_fwd
from ...kernels.prompt.packed_routing import packed_route_fwd
from ..decode.plan import StepPlan
from ..placement import LayerSpan

# Most tokens whose experts go through blocks of pairs (decode/grouped_experts.py); more take the library's products.
BLOCK_TOKENS = 1024
# Pairs of token and expert that a block holds, up to so many tokens: few tokens leave an expert few.
_GROUPS = ((512, 16), (BLOCK_TOKENS, 32))


class PromptPlan(StepPlan):
    """The launches of a prompt of up to `tokens` tokens of up to `sequences` rows, and what they read.

    What passes between launches is allocated as they are launched, and free again after each layer.

    Args:
        model: a `KimiLinearForCausalLM` whose parameters are plain, of one dtype, those of `span` on its device.
        span: the layers that the plan runs; with the embedding before them if it is there.
        tokens: T, room for tokens.
        sequences: N, room for rows.
        keys: L, room for the positions that the tokens see; None for attention in latent space, which reads them in
            the cache.
        masked: whether these have padding between a row's first and last valid one (expanded attention only).

    Attributes:
        numbers: int32, all lengths: `rows` [T], `positions` [T], `cu_seqlens` [N + 1], `starts` [N], `key_offsets`
            [N + 1], `key_rows` [L] and `key_positions` [L] are its parts.
        input_ids: [T] int64.
        table: [layers, 4] int64, as the step's.
        x: [T, hidden_size], the residual stream before the span's layers, if it doesn't embed, and after them; what
            padding holds has no meaning.
    """

    def __init__(
        self,
        model: Any,
        span: LayerSpan,
        tokens: int,
        sequences: int,
        keys: int | None = None,
        masked: bool = False,
    ) -> None:
        self.sequences, self.keys, self.masked = sequences, keys, masked
        self.p = None  # the step's buffer, see `_part`
        super().__init__(model, 1, tokens, span)

    @torch.inference_mode(False)  # what is made in inference mode can't be written outside of it
    def _allocate(self) -> None:
        """What outlives the launches."""
        T, N, L = self.tokens, self.sequences, self.keys or 0
        dtype = str(self.dtype).removeprefix("torch.")
        K = self.config.linear_head_dim
        self._intra, self._inter = intra_config(self._gpu, K, dtype), inter_config(self._gpu, K, K, dtype)
        sizes = [T, T, N + 1, N, N + 1, L, L]
        self.numbers = torch.zeros(sum(sizes), dtype=torch.int32, device=self.device)
        parts = self.numbers.split(sizes)
        self.rows, self.positions, self.cu_seqlens, self.starts, self.key_offsets, self.key_rows = parts[:6]
        self.key_positions = parts[6]
        self.rows.fill_(-1)
        self.key_rows.fill_(-1)
        self.input_ids = torch.zeros(T, dtype=torch.int64, device=self.device)
        self.table = torch.zeros(self.span.end - self.span.first, 4, dtype=torch.int64, device=self.device)
        self.x = self._empty(T, self.config.hidden_size)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def _part(self, buffer: None, width: int) -> torch.Tensor:
        return self._empty(self.tokens, width)

    def _latent_config(self) -> LatentConfig:
        config = self.config
        return latent_config(
            self.tokens, config.num_attention_heads, config.kv_lora_rank, self.dtype.itemsize, self._gpu
        )

    def kinds_of_launches(self) -> list[Callable[[], None]]:
        """As the step's, but for its head. The caller has put no row into the plan."""
        layers = self._layers()
        mixers = {layer.is_kda: i for i, layer in enumerate(layers)}
        mlps = {layer.is_moe: layer for layer in layers}
        self._begin()
        return [
            *(partial(self._launch_mixer, layers[i], self.table[i]) for i in mixers.values()),
            *(partial(self._launch_mlp, layer) for layer in mlps.values()),
        ]

    @torch.no_grad()
    def launch(self) -> None:
        """Run the layers on what `input_ids` or `x`, `numbers` and `table` hold."""
        if self.span.embeds:
            torch.index_select(self._model().model.embed_tokens.weight, 0, self.input_ids, out=self.x)
        self._begin()
        for layer, entry in zip(self._layers(), self.table):
            self._launch_mixer(layer, entry)
            self._launch_mlp(layer)

    def _begin(self) -> None:
        """What all layers share: where the chunks of KDA are, and the blocks of attention."""
        T, kinds = self.tokens, self.config.layer_types
        self.normed = self._empty(T, self.config.hidden_size)
        self.counts = torch.zeros(self.config.num_experts, dtype=torch.int32, device=self.device)
        if "linear_attention" in kinds:
            self.chunk_index = (self.cu_seqlens, *kda_index_fwd(self.cu_seqlens, T, self._intra.C))
        if "full_attention" in kinds:
            self._attention = packed_attention_config(self.dtype.itemsize, self._gpu)
            BT = self._latent_config().BT if self.keys is None else self._attention.BT
            self.block_index = (self.cu_seqlens, *kda_index_fwd(self.cu_seqlens, T, BT))

    def _kda(self, kda: Any, norm: Any, entry: torch.Tensor) -> None:
        heads, K, T = kda.num_heads, kda.head_dim, self.tokens
        inner = heads * K
        p, gates = self._empty(T, 3 * inner + 2 * K + heads), self._empty(T, 2 * inner)
        projections = [kda.q_proj, kda.k_proj, kda.v_proj, kda.f_a_proj, kda.g_a_proj, kda.b_proj]
        self._linear(self.x, projections, p, norm)
        self._linear(p, [kda.f_b_proj, kda.g_b_proj], gates, x_columns=(3 * inner, 3 * inner + K))
        weights = tuple(conv.weight for conv in (kda.q_conv1d, kda.k_conv1d, kda.v_conv1d))
        convolved, o = self._empty(T, 3 * inner), self._empty(1, T, heads, K)
        packed_conv_fwd(p, weights, entry, self.rows, self.cu_seqlens, convolved)
        packed_window_fwd(p, entry, self.cu_seqlens, 3 * inner, weights[0].shape[2])
        q, k, v = convolved.view(1, T, 3 * heads, K).chunk(3, dim=2)
        f, gate = gates.split(inner, dim=1)
        chunks = T // self._intra.C + self.sequences
        where = {
            "segment": Segment(0, chunks, index=self.chunk_index),
            "tiles": intra_tiles(q, chunks, self._intra.C),
            "upcast": self._upcast,
        }
        kda_intra_fwd(
            q, k, f.view(1, T, heads, K), p[None, :, 3 * inner + 2 * K :], kda.A_log, kda.dt_bias, scale=K**-0.5,
            config=self._intra, **where,
        )  # fmt: skip
        kda_inter_fwd(v, o, state_in=entry, state_out=None, config=self._inter, **where)
        o_norm, normed = kda.o_norm, convolved.view(-1)[: T * inner].view(T, heads, K)
        packed_gated_norm_fwd(o[0], gate, o_norm.weight, normed, self.rows, o_norm.variance_epsilon)
        self._linear(normed.flatten(1), [kda.o_proj], self.x, residual=self.x)

    def _mla(self, mla: Any, norm: Any, entry: torch.Tensor) -> None:
        heads, V, T = self.config.num_attention_heads, mla.v_head_dim, self.tokens
        queries = heads * mla.qk_head_dim
        p, o = self._empty(T, queries + mla.kv_lora_rank + mla.qk_rope_head_dim), self._empty(T, heads, V)
        self._linear(self.x, [mla.q_proj, mla.kv_a_proj_with_mqa], p, norm)
        latent_norm = mla.kv_a_layernorm
        packed_row_fwd(
            p[:, queries:], latent_norm.weight, latent_norm.variance_epsilon, entry, self.rows, self.positions
        )
        (self._attend_latent if self.keys is None else self._attend_expanded)(mla, p, entry, o)
        self._linear(o.flatten(1), [mla.o_proj], self.x, residual=self.x)

    def _attend_latent(self, mla: Any, p: torch.Tensor, entry: torch.Tensor, o: torch.Tensor) -> None:
        """Every head reads the cache's rows as they are."""
        (T, heads, _), config, kv_b = o.shape, self._latent_config(), mla.kv_b_proj.weight
        R, multiprocessors = mla.kv_lora_rank, 4
        if self.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        splits = max(1, min(32, multiprocessors // -(-T // config.BT)))
        q, latent = self._empty(T, heads, R + mla.qk_rope_head_dim), self._empty(T, heads, R)
        partial = self._empty(T, splits, heads, R if splits > 1 else 0, dtype=torch.float32)
        library_absorb(p, kv_b, q, mla.qk_nope_head_dim)
        packed_attend_fwd(
            q, latent, partial, self._empty(T, splits, heads, dtype=torch.float32), table=entry, rows=self.rows,
            positions=self.positions, starts=self.starts, index=self.block_index, scale=mla.scaling, config=config,
            upcast=self._upcast,
        )  # fmt: skip
        library_values(latent, kv_b, o)

    def _attend_expanded(self, mla: Any, p: torch.Tensor, entry: torch.Tensor, o: torch.Tensor) -> None:
        """Keys and values of all heads, made from the cache's rows."""
        R = mla.kv_lora_rank
        keys = self._empty(self.keys, R + mla.qk_rope_head_dim)
        expanded = self._empty(self.keys, mla.kv_b_proj.weight.shape[0])
        packed_gather_fwd(entry, self.key_rows, self.key_positions, keys)
        self._linear(keys, [mla.kv_b_proj], expanded)
        packed_attention_fwd(
            p, expanded, keys, o, table=entry, positions=self.positions, key_offsets=self.key_offsets,
            starts=self.starts, index=self.block_index, latent=R, masked=self.masked, scale=mla.scaling,
            config=self._attention, upcast=self._upcast,
        )  # fmt: skip

    def _moe(self, moe: Any, norm: Any) -> None:
        router, T, topk = moe.gate, self.tokens, moe.gate.top_k
        logits = self._router_logits(router, norm)
        chosen, weights = self._empty(T, topk, dtype=torch.int32), self._empty(T, topk, dtype=torch.float32)
        rule = {
            "factor": router.scaling_factor,
            "biased": router.biased_weights,
            "renormalize": router.renormalize,
        }
        inputs = (logits, router.e_score_correction_bias, self.rows, chosen, weights)
        if T <= BLOCK_TOKENS:
            packed_route_fwd(*inputs, **rule)
            self._experts_in_blocks(moe, chosen, weights)
            return
        ranks = torch.empty_like(chosen)
        packed_route_rank_fwd(*inputs, ranks, self.counts, **rule)
        self._experts_by_library(moe, chosen, weights, ranks)

    @torch.no_grad()
    def _router_logits(self, router: Any, norm: Any) -> torch.Tensor:
        T, E = self.tokens, router.num_experts
        if T > BLOCK_TOKENS and self.device.type == "cuda" and self.dtype != torch.float32:
            return torch.mm(self._normed(self.x, norm), router.weight.t(), out_dtype=torch.float32)
        logits = self._empty(T, E, dtype=torch.float32)
        self._linear(self.x, [router], logits, norm)
        return logits

    def _experts_in_blocks(self, moe: Any, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        experts, shared, x = moe.experts, moe.shared_experts, self.x
        (T, topk), (E, D, I) = chosen.shape, experts.down_proj.shape
        group = next(size for most, size in _GROUPS if most >= T)
        blocks = most_blocks(T, topk, E, group)
        groups = tuple(self._empty(size, dtype=torch.int32) for size in (blocks * group, blocks, 1))
        decode_group(chosen, *groups, E, pdl=self._pdl)
        pairs = T * (topk + (0 if shared is None else shared.down_proj.weight.shape[1] // I))
        configs = grouped_configs(D, I, x.element_size(), self._gpu)
        decode_grouped_experts(
            self.normed, weights, x, groups=groups, gate_up=experts.gate_up_proj, down=experts.down_proj,
            shared=shared and (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight),
            h=self._empty(pairs, I), z=self._empty(pairs, D),
            configs=tuple(config._replace(BM=group) for config in configs), upcast=self._upcast, pdl=self._pdl,
        )  # fmt: skip

    @torch.no_grad()
    def _experts_by_library(self, moe: Any, chosen: torch.Tensor, weights: torch.Tensor, ranks: torch.Tensor) -> None:
        experts, shared = moe.experts, moe.shared_experts
        (T, topk), (E, D, I) = chosen.shape, experts.down_proj.shape
        ends, rows, positions = self._empty(E, dtype=torch.int32), self._empty(T * topk, D), torch.empty_like(chosen)
        packed_ends_fwd(self.counts, ends)
        packed_scatter_fwd(self.normed, self.rows, chosen, ranks, ends, rows, positions)
        hidden = F.grouped_mm(rows, experts.gate_up_proj.transpose(1, 2), offs=ends)
        del rows
        decode_gate(hidden, self._pdl)
        outputs = F.grouped_mm(hidden[:, :I], experts.down_proj.transpose(1, 2), offs=ends)
        del hidden
        packed_combine_fwd(outputs, self.rows, positions, weights, self.x)
        if shared is not None:
            gate_up = self._empty(T, 2 * shared.gate_proj.weight.shape[0])
            self._linear(self.normed, [shared.gate_proj, shared.up_proj], gate_up)
            decode_gate(gate_up, self._pdl)
            self._linear(gate_up, [shared.down_proj], self.x, residual=self.x)


__all__ = ["BLOCK_TOKENS", "PromptPlan"]
