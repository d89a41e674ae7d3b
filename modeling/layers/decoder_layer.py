"""One layer of the decoder: pre-norm, KDA or MLA, then an MLP or the mixture of experts (arXiv 2510.26692, fig. 3)."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..plain_modules import Noticing, reads_weights
from ..transformers_versions import one_cache
from .kda_attention import KimiDeltaAttention
from .mla_attention import KimiMLAAttention
from .moe import KimiMLP, KimiSparseMoeBlock
from .norms import KimiRMSNorm
from .sequence_layout import PaddingLayout


@reads_weights
class KimiDecoderLayer(Noticing, GradientCheckpointingLayer):
    """Pre-norm block: KDA or MLA, then the dense MLP (`mlp`) or the mixture of experts (`block_sparse_moe`)."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self._recomputes = False
        self.is_kda = config.layer_types[layer_idx] == "linear_attention"
        self.is_moe = config.mlp_layer_types[layer_idx] == "sparse"
        self.self_attn = (KimiDeltaAttention if self.is_kda else KimiMLAAttention)(config, layer_idx)
        if self.is_moe:
            self.block_sparse_moe = KimiSparseMoeBlock(config)
        else:
            self.mlp = KimiMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = KimiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = KimiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether to recompute this layer in backward: as set, but never where there is none.

        Before 5.24 transformers asks this in training mode without gradients too, and takes the cache away for it.
        """
        return self._recomputes and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._recomputes = value

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`forward` with hooks and checkpointing; the first pass of a reentrant checkpoint runs without gradients."""
        if not (self.is_moe and self.training and self.gradient_checkpointing):
            return super().__call__(*args, **kwargs)
        router = self.block_sparse_moe.gate
        router.in_checkpoint = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            router.in_checkpoint = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        padding: PaddingLayout | None = None,
        cu_seqlens: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, T, hidden_size] -> the same shape.

        Args:
            hidden_states: the residual stream.
            attention_mask: for MLA layers, as `create_causal_mask` made it.
            padding: for KDA layers, which tokens are padding.
            cu_seqlens: for KDA layers, boundaries of packed sequences.
            past_key_values: the cache, updated in place.
            cache: another name of `past_key_values`.
            kwargs: passed to the attention function of MLA layers.
        """
        past_key_values = one_cache(past_key_values, cache, kwargs)
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.is_kda:
            hidden_states = self.self_attn(
                hidden_states, past_key_values=past_key_values, padding=padding, cu_seqlens=cu_seqlens
            )
        else:
            hidden_states, _ = self.self_attn(
                hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.block_sparse_moe(hidden_states) if self.is_moe else self.mlp(hidden_states)
        return residual + hidden_states


__all__ = ["KimiDecoderLayer"]
