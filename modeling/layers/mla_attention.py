"""Multi-head latent attention without position encoding (arXiv 2510.26692, section 4; DeepSeek-V2's MLA, no RoPE)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...kernels.gpu.availability import fused_path_serves
from ...kernels.prompt.attention_lse import attention_with_lse, merge_attention
from ...kernels.prompt.mla_keys import mla_keys_fwd
from ..plain_modules import Noticing, reads_weights, weights_are_plain
from .norms import KimiRMSNorm

# kv_a_layernorm keeps its class default in the released code, whatever rms_norm_eps says (docs/checkpoint.md).
_LATENT_NORM_EPS = 1e-6

# Up to this many new tokens over a cache, attending in latent space beats expanding every cached row: expansion costs
# 2 L r H (n + v) operations and the latent form 2 T L H (2 r + s) against 2 T L H (n + s + v) after expansion; both
# meet near T = 170 at the released shape, and the scores [B, H, T, L] in fp32 want T small at long L.
_LATENT_FORM_TOKENS = 16

# Cached rows (times batch) whose keys and values exist at a time, 20 KiB each at the released shape.
_EXPANDED_ROWS = 32768


@dataclass(frozen=True)
class CausalOverCache:
    """In place of a mask: every new token sees all cached tokens, and the new ones up to itself.

    Attention that knows this needs no mask tensor, and takes the cached latents a block at a time.

    Attributes:
        spans: for each row, the first and the end of its valid positions, cached ones included; what is outside is
            padding. None if nothing is.
    """

    spans: tuple[tuple[int, int], ...] | None = None

    @staticmethod
    def fits(config: KimiLinearConfig, new_tokens: int) -> bool:
        """Whether layers of this config honour it for an input of `new_tokens`: for inference, by PyTorch's kernels."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        causal = getattr(config, "is_causal", None) is not False
        return causal and config._attn_implementation == "sdpa" and new_tokens > _LATENT_FORM_TOKENS


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: softmax in fp32, returns the weights.

    Args:
        module: unused; part of transformers' attention interface.
        query, key: [B, H, T, D] and [B, H, L, D].
        value: [B, H, L, V].
        attention_mask: additive [B, 1, T, L], or boolean with True where a key may be seen, or None.
        scaling: factor on the scores.
        dropout: on the weights; this model trains without.
        kwargs: what other attention functions of the interface take.

    Returns:
        [B, T, H, V] and the weights [B, H, T, L].
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


@reads_weights
class KimiMLAAttention(Noticing):
    """MLA layer. The cache holds one latent row per token; prompts expand it, short continuations attend to it as is.

    Both forms are the same function up to rounding: score = (W_k^T q_nope) . c + q_shared . k_shared.
    """

    # One latent serves all heads, but once expanded every query head has a key head of its own.
    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.scaling = self.qk_head_dim**-0.5
        heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = KimiRMSNorm(self.kv_lora_rank, eps=_LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer over new tokens.

        Args:
            hidden_states: [B, T, hidden_size], normed.
            attention_mask: whatever `create_causal_mask` made for the configured attention implementation, or
                `CausalOverCache()`.
            past_key_values: cache of latents to continue from and to append to.
            kwargs: passed to the attention function (flash attention's cu_seq_lens_q, position_ids, ...).

        Returns:
            [B, T, hidden_size], and the attention weights [B, H, T, L] from the eager implementation, else None.
        """
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)  # [B, H, T, D]
        latent, shared_key = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        latent, shared_key = self.kv_a_layernorm(latent)[:, None], shared_key[:, None]  # [B, 1, T, .]
        if past_key_values is not None:
            latent, shared_key = past_key_values.update(latent, shared_key, self.layer_idx)

        if isinstance(attention_mask, CausalOverCache):
            output, weights = self._attend_without_mask(query, latent, shared_key, attention_mask.spans), None
        elif self._prefers_latent_form(query.shape[2], latent.shape[2], attention_mask, query.device):
            output, weights = self._attend_latent(query, latent, shared_key, attention_mask)
        else:
            output, weights = self._attend_expanded(query, latent, shared_key, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def _prefers_latent_form(
        self, new_tokens: int, cached_tokens: int, attention_mask: Any, device: torch.device
    ) -> bool:
        if new_tokens > _LATENT_FORM_TOKENS or cached_tokens == new_tokens:
            return False
        # With several new tokens, causality has to be in the mask. A 2D mask (flash attention) doesn't hold it, and
        # no mask may mean that the attention function was to apply it by itself.
        has_4d_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
        if not has_4d_mask and (new_tokens > 1 or not (attention_mask is None or torch.is_tensor(attention_mask))):
            return False
        # The latent form reads kv_b_proj.weight itself; what else hangs on that module must go through its forward.
        return weights_are_plain((self.kv_b_proj,), device)

    def _attend_latent(
        self, query: torch.Tensor, latent: torch.Tensor, shared_key: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries taken to latent space: every head reads the same cached rows, nothing is expanded."""
        per_head = self.kv_b_proj.weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        key_up, value_up = per_head.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)  # [H, n or v, r]
        q_nope, q_shared = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q_latent = _by_head(q_nope, key_up)  # [B, H, T, r]
        scores = _with_shared(q_latent, latent.transpose(2, 3)) + _with_shared(q_shared, shared_key.transpose(2, 3))
        scores = scores.float() * self.scaling  # [B, H, T, L]
        if attention_mask is not None:
            if attention_mask.ndim == 2:
                attention_mask = attention_mask[:, None, None, :].bool()
            if attention_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + attention_mask
        weights = F.softmax(scores, dim=-1).to(query.dtype)
        output = _by_head(_with_shared(weights, latent), value_up.transpose(1, 2))  # [B, H, T, v]
        returns_weights = self.config._attn_implementation == "eager"
        return output.transpose(1, 2), weights if returns_weights else None

    def _attend_without_mask(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        shared_key: torch.Tensor,
        spans: tuple[tuple[int, int], ...] | None,
    ) -> torch.Tensor:
        """`_attend_by_blocks`, row by row over the valid tokens if some are padding, whose output is zero."""
        if spans is None:
            return self._attend_by_blocks(query, latent, shared_key)
        length, past = query.shape[2], latent.shape[2] - query.shape[2]
        output = query.new_zeros(query.shape[0], length, query.shape[1], self.v_head_dim)
        for row, (begin, end) in enumerate(spans):
            new = slice(max(begin - past, 0), max(end - past, 0))
            if new.start < new.stop:
                valid = (slice(row, row + 1), slice(None), slice(begin, past + new.stop))
                output[row : row + 1, new] = self._attend_by_blocks(
                    query[row : row + 1, :, new], latent[valid], shared_key[valid]
                )
        return output

    def _attend_by_blocks(self, query: torch.Tensor, latent: torch.Tensor, shared_key: torch.Tensor) -> torch.Tensor:
        """Causal attention [B, T, H, v] of T new tokens over L latents, of which one block is expanded at a time.

        The new tokens' own block is causal, those of the cache are seen whole, and their normalisers join them: fp32
        between the blocks, so the result depends on the blocks by the rounding of each block's output only.
        """
        batch, length, past = latent.shape[0], query.shape[2], latent.shape[2] - query.shape[2]
        key, value = self._expand(latent[:, 0, past:], shared_key[:, 0, past:])
        attend = partial(attention_with_lse, query, scale=self.scaling)
        output, lse = attend(key, value, causal=True)
        output = output.transpose(1, 2)
        if past == 0:
            return output
        total = output.to(lse.dtype, memory_format=torch.contiguous_format)
        lse = lse.contiguous()
        rows = max(_EXPANDED_ROWS // batch, length)
        for begin in range(0, past, rows):
            end = min(begin + rows, past)
            key, value = self._expand(latent[:, 0, begin:end], shared_key[:, 0, begin:end])
            part, part_lse = attend(key, value, causal=False)
            merge_attention(total, lse, part.transpose(1, 2), part_lse)
        return total.to(query.dtype)

    def _expand(self, latent: torch.Tensor, shared_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, L, n + s] and values [B, H, L, v] of latents [B, L, r] and shared keys [B, L, s]."""
        expanded = self.kv_b_proj(latent).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))  # [B, L, H, .]
        key, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        if expanded.dtype == shared_key.dtype and fused_path_serves(expanded, shared_key):
            key = mla_keys_fwd(expanded, shared_key, self.qk_nope_head_dim)
        else:
            key = torch.cat([key, shared_key[:, :, None].expand(-1, -1, key.shape[2], -1)], dim=-1)
        return key.transpose(1, 2), value.transpose(1, 2)

    def _attend_expanded(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        shared_key: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents expanded to keys [B, H, L, n + s] and values [B, H, L, v], through transformers' interface."""
        key, value = self._expand(latent[:, 0], shared_key[:, 0])
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # Flash attention wants one head size for queries, keys and values.
        pad = self.qk_head_dim - self.v_head_dim if is_flash_attention_requested(self.config) else 0
        output, weights = attend(
            self,
            query,
            key,
            F.pad(value, (0, pad)) if pad > 0 else value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., : self.v_head_dim], weights


def _by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, H, T, n] times a matrix [H, n, m] for each head; `matmul` would copy the weight for every sequence."""
    batch, _, length, _ = x.shape
    product = torch.bmm(x.transpose(0, 1).flatten(1, 2), weight)
    return product.unflatten(1, (batch, length)).transpose(0, 1)


def _with_shared(x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """[B, H, T, n] times [B, 1, n, m], which all heads share; `matmul` would copy it for every head."""
    return torch.bmm(x.flatten(1, 2), shared[:, 0]).unflatten(1, x.shape[1:3])


__all__ = ["CausalOverCache", "KimiMLAAttention", "eager_attention_forward"]
