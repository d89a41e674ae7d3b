"""What a packed prompt launches, layer by layer, and the buffers that pass between its launches.

T tokens of N sequences lie end to end (kernels/prompt/packed_kda.py), so padding costs nothing, and rows of any lengths
go through the same launches. Lengths, positions and addresses are data in device memory: one captured plan serves every
prompt that fits. Tokens after the last sequence are padding: they touch no cache and choose no experts.

| layer | launches |
|---|---|
| KDA | norm + six projections; decay and output gate; convolutions; windows; two of the recurrence; gated norm; o_proj |
| MLA | norm + two projections; new rows; queries to latent space; attention; to values; o_proj |
| MoE | norm + router; choice; grouping; experts up, down, sum |
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.decode.configs import LatentConfig, grouped_configs, latent_config
from ...kernels.decode.grouped_experts import decode_grouped_experts
from ...kernels.decode.products import library_absorb, library_values
from ...kernels.decode.routing import decode_group, most_blocks
from ...kernels.kda.configs import inter_config, intra_config
from ...kernels.kda.index import kda_index_fwd
from ...kernels.kda.inter import kda_inter_fwd
from ...kernels.kda.intra import intra_tiles, kda_intra_fwd
from ...kernels.prompt.packed_kda import packed_conv_fwd, packed_gated_norm_fwd, packed_window_fwd
from ...kernels.prompt.packed_latent import packed_attend_fwd, packed_row_fwd
from ...kernels.prompt.packed_routing import packed_route_fwd
from ..decode.plan import StepPlan

# Pairs of token and expert that a block holds: few tokens leave an expert few.
_GROUPS = ((512, 16), (1 << 30, 32))


class PromptPlan(StepPlan):
    """The launches of a prompt of up to `tokens` tokens of up to `sequences` rows, and all that passes between them.

    Args:
        model: a `KimiLinearForCausalLM` whose parameters are plain, of one dtype, on one device.
        tokens: T, room for tokens.
        sequences: N, room for rows.

    Attributes:
        numbers: int32, all lengths: `rows` [T], `positions` [T], `cu_seqlens` [N + 1] and `starts` [N] are its parts.
        input_ids: [T] int64.
        table: [layers, 4] int64, as the step's.
        x: [T, hidden_size], the residual stream after the last layer; what padding holds has no meaning.
    """

    def __init__(self, model: Any, tokens: int, sequences: int) -> None:
        self.sequences = sequences
        super().__init__(model, 1, tokens)

    @torch.inference_mode(False)  # what is made in inference mode can't be written outside of it
    def _allocate(self) -> None:
        """Everything that passes between launches."""
        config, T, N = self.config, self.tokens, self.sequences
        self.numbers = torch.zeros(2 * T + 2 * N + 1, dtype=torch.int32, device=self.device)
        self.rows, self.positions, self.cu_seqlens, self.starts = self.numbers.split([T, T, N + 1, N])
        self.rows.fill_(-1)
        self.input_ids = torch.zeros(T, dtype=torch.int64, device=self.device)
        self.table = torch.zeros(config.num_hidden_layers, 4, dtype=torch.int64, device=self.device)
        self.x, self.normed = self._empty(T, config.hidden_size), self._empty(T, config.hidden_size)
        heads, K = config.linear_num_heads, config.linear_head_dim
        widths = [3 * heads * K + 2 * K + heads, 2 * config.intermediate_size]
        widths.append(config.num_attention_heads * config.qk_head_dim + config.kv_lora_rank + config.qk_rope_head_dim)
        self.p = self._empty(T, max(widths))
        self.o = self._empty(T, max(heads * K, config.num_attention_heads * config.v_head_dim))
        if "linear_attention" in config.layer_types:
            self._allocate_kda(heads, K)
        if "full_attention" in config.layer_types:
            self._allocate_mla()
        if "sparse" in config.mlp_layer_types:
            self._allocate_moe()

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def _allocate_kda(self, heads: int, K: int) -> None:
        T, dtype = self.tokens, str(self.dtype).removeprefix("torch.")
        self._intra, self._inter = intra_config(self._gpu, K, dtype), inter_config(self._gpu, K, K, dtype)
        self.gates, self.convolved = self._empty(T, 2 * heads * K), self._empty(T, 3 * heads * K)
        self.recurrent = self._empty(T, heads, K)
        self._chunks = T // self._intra.C + self.sequences
        self.tiles = intra_tiles(self.recurrent[None], self._chunks, self._intra.C)

    def _allocate_mla(self) -> None:
        config, T, heads = self.config, self.tokens, self.config.num_attention_heads
        R, S = config.kv_lora_rank, config.qk_rope_head_dim
        self.q_latent, self.latent = self._empty(T, heads, R + S), self._empty(T, heads, R)
        multiprocessors = 4
        if self.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        splits = max(1, min(32, multiprocessors // -(-T // self._latent_config().BT)))
        self.partial = self._empty(T, splits, heads, R if splits > 1 else 0, dtype=torch.float32)
        self.partial_lse = self._empty(T, splits, heads, dtype=torch.float32)

    def _latent_config(self) -> LatentConfig:
        config = self.config
        return latent_config(
            self.tokens, config.num_attention_heads, config.kv_lora_rank, self.dtype.itemsize, self._gpu
        )

    def _allocate_moe(self) -> None:
        config, T = self.config, self.tokens
        E, topk, I = config.num_experts, config.num_experts_per_token, config.moe_intermediate_size
        pairs = T * (topk + config.num_shared_experts)
        self.router, self.h, self.z = (
            self._empty(T, E, dtype=torch.float32),
            self._empty(pairs, I),
            self._empty(pairs, config.hidden_size),
        )
        self.chosen = self._empty(T, topk, dtype=torch.int32)
        self.expert_weights = self._empty(T, topk, dtype=torch.float32)
        self._group = next(size for most, size in _GROUPS if most >= T)
        blocks = most_blocks(T, topk, E, self._group)
        sizes = (blocks * self._group, blocks, 1)
        self.groups = tuple(self._empty(size, dtype=torch.int32) for size in sizes)

    def buffers(self) -> list[torch.Tensor]:
        """All tensors that the launches read or write, weights and cache left out."""
        return [*super().buffers(), *getattr(self, "tiles", ())]

    def kinds_of_launches(self) -> list[Callable[[], None]]:
        """As the step's, but for its head."""
        layers = self._model().model.layers
        mixers = {layer.is_kda: i for i, layer in enumerate(layers)}
        mlps = {layer.is_moe: layer for layer in layers}
        self._launch_index()
        return [
            *(partial(self._launch_mixer, layers[i], self.table[i]) for i in mixers.values()),
            *(partial(self._launch_mlp, layer) for layer in mlps.values()),
        ]

    @torch.no_grad()
    def launch(self) -> None:
        """Run the layers on what `input_ids`, `numbers` and `table` hold."""
        model = self._model().model
        torch.index_select(model.embed_tokens.weight, 0, self.input_ids, out=self.x)
        self._launch_index()
        for layer, entry in zip(model.layers, self.table):
            self._launch_mixer(layer, entry)
            self._launch_mlp(layer)

    def _launch_index(self) -> None:
        """Where the chunks of KDA are, and the blocks of attention."""
        if hasattr(self, "tiles"):
            self.chunk_index = (self.cu_seqlens, *kda_index_fwd(self.cu_seqlens, self.tokens, self._intra.C))
        if hasattr(self, "latent"):
            BT = self._latent_config().BT
            self.block_index = (self.cu_seqlens, *kda_index_fwd(self.cu_seqlens, self.tokens, BT))

    def _kda(self, kda: Any, norm: Any, entry: torch.Tensor) -> None:
        heads, K, T = kda.num_heads, kda.head_dim, self.tokens
        inner = heads * K
        p = self._part(self.p, 3 * inner + 2 * K + heads)
        projections = [kda.q_proj, kda.k_proj, kda.v_proj, kda.f_a_proj, kda.g_a_proj, kda.b_proj]
        self._linear(self.x, projections, p, norm)
        columns = (3 * inner, 3 * inner + K)
        self._linear(p, [kda.f_b_proj, kda.g_b_proj], self.gates, x_columns=columns)
        weights = tuple(conv.weight for conv in (kda.q_conv1d, kda.k_conv1d, kda.v_conv1d))
        packed_conv_fwd(p, weights, entry, self.rows, self.cu_seqlens, self.convolved)
        packed_window_fwd(p, entry, self.cu_seqlens, 3 * inner, weights[0].shape[2])
        q, k, v = self.convolved.view(1, T, 3 * heads, K).chunk(3, dim=2)
        f, gate = self.gates.split(inner, dim=1)
        segment = (0, self._chunks, 0, self.chunk_index, self.tiles)
        kda_intra_fwd(
            q, k, f.view(1, T, heads, K), p[None, :, 3 * inner + 2 * K :], kda.A_log, kda.dt_bias, K**-0.5, *segment,
            self._intra, self._upcast,
        )  # fmt: skip
        kda_inter_fwd(v, self.recurrent[None], entry, None, *segment, self._inter, self._upcast)
        o, o_norm = self._part(self.o, inner), kda.o_norm
        packed_gated_norm_fwd(
            self.recurrent, gate, o_norm.weight, o.view(T, heads, K), self.rows, o_norm.variance_epsilon
        )
        self._linear(o, [kda.o_proj], self.x, residual=self.x)

    def _mla(self, mla: Any, norm: Any, entry: torch.Tensor) -> None:
        heads, V, T = self.config.num_attention_heads, mla.v_head_dim, self.tokens
        width = mla.kv_lora_rank + mla.qk_rope_head_dim
        p = self._part(self.p, heads * mla.qk_head_dim + width)
        self._linear(self.x, [mla.q_proj, mla.kv_a_proj_with_mqa], p, norm)
        latent_norm, kv_b, o = mla.kv_a_layernorm, mla.kv_b_proj.weight, self._part(self.o, heads * V)
        packed_row_fwd(
            p[:, heads * mla.qk_head_dim :], latent_norm.weight, latent_norm.variance_epsilon, entry, self.rows,
            self.positions,
        )  # fmt: skip
        library_absorb(p, kv_b, self.q_latent, mla.qk_nope_head_dim)
        packed_attend_fwd(
            self.q_latent, self.latent, self.partial, self.partial_lse, table=entry, rows=self.rows,
            positions=self.positions, starts=self.starts, index=self.block_index, scale=mla.scaling,
            config=self._latent_config(), upcast=self._upcast,
        )  # fmt: skip
        library_values(self.latent, kv_b, o.view(T, heads, V))
        self._linear(o, [mla.o_proj], self.x, residual=self.x)

    def _moe(self, moe: Any, norm: Any) -> None:
        router, experts, shared, x = moe.gate, moe.experts, moe.shared_experts, self.x
        self._linear(x, [router], self.router, norm)
        packed_route_fwd(
            self.router, router.e_score_correction_bias, self.rows, self.chosen, self.expert_weights,
            factor=router.scaling_factor, biased=router.biased_weights, renormalize=router.renormalize,
        )  # fmt: skip
        decode_group(self.chosen, *self.groups, router.num_experts, pdl=self._pdl)
        down = experts.down_proj
        configs = grouped_configs(x.shape[1], down.shape[2], x.element_size(), self._gpu)
        decode_grouped_experts(
            self.normed, self.expert_weights, x, groups=self.groups, gate_up=experts.gate_up_proj, down=down,
            shared=shared and (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight),
            h=self.h, z=self.z, configs=tuple(config._replace(BM=self._group) for config in configs),
            upcast=self._upcast, pdl=self._pdl,
        )  # fmt: skip


__all__ = ["PromptPlan"]
