"""Kimi Delta Attention, the linear-attention layer (arXiv 2510.26692, section 3)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...kernels.kda.dispatch import kda, resolve_kda_backend
from ...kernels.kda.step import MAX_NEW_TOKENS
from ...kernels.prompt.short_convolution import causal_short_conv
from ..cache.kda_layer import KDACacheLayer
from ..cache.kda_states import own_kda_layer, read_kda_states, write_kda_states
from ..cache.recording import KDAStepWeights, RawInputs
from ..plain_modules import Noticing, reads_weights, weights_are_plain
from .fp32_parameters import keeping_fp32
from .norms import KimiRMSNormGated
from .sequence_layout import PaddingLayout


@reads_weights
class ShortConvolution(Noticing):
    """Depthwise causal convolution with SiLU; `weight` [D, 1, W] as on disk, its last tap meets the current token."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))

    def forward(
        self,
        x: torch.Tensor,
        window: torch.Tensor | None,
        lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, channels] and the last inputs [B, channels, W-1] -> (y as the first, the window after it)."""
        return causal_short_conv(x, self.weight, window=window, lengths=lengths, cu_seqlens=cu_seqlens)


@reads_weights
class KimiDeltaAttention(Noticing):
    """KDA layer: short convolutions, per-channel gate, delta rule, gated norm.

    Numerics are those of docs/checkpoint.md: gate, beta, l2 norms, state and the recurrence in fp32; projections and
    convolution inputs in the weights' dtype. `A_log` and `dt_bias` are fp32 parameters whatever the model's dtype.
    """

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.backend = config.kda_backend
        self.head_dim = config.linear_head_dim
        self.num_heads = config.linear_num_heads
        hidden_size, inner = config.hidden_size, self.num_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False)
        self.q_conv1d = ShortConvolution(inner, config.linear_conv_kernel_dim)
        self.k_conv1d = ShortConvolution(inner, config.linear_conv_kernel_dim)
        self.v_conv1d = ShortConvolution(inner, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(1, 1, self.num_heads, 1, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.f_a_proj = nn.Linear(hidden_size, self.head_dim, bias=False)
        self.f_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, self.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.o_norm = KimiRMSNormGated(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KimiDeltaAttention":
        return super()._apply(keeping_fp32(fn, self.A_log, self.dt_bias), recurse)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        padding: PaddingLayout | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer over new tokens.

        Args:
            hidden_states: [B, T, hidden_size], normed.
            past_key_values: cache to continue from and to leave the state in.
            padding: which tokens are padding; None if none is.
            cu_seqlens: [N + 1] boundaries of packed sequences over the B * T tokens; excludes a cache and padding.

        Returns:
            [B, T, hidden_size]; zeros at padding.
        """
        if padding is not None:
            padding = padding.to(hidden_states.device)
        layer = own_kda_layer(past_key_values, self.layer_idx)
        if layer is None or cu_seqlens is not None or torch.compiler.is_compiling():
            return self._forward_prompt(hidden_states, past_key_values, padding, cu_seqlens)
        layer.weights = self.step_weights()
        if layer.recording is not None:
            return self._forward_recorded(hidden_states, past_key_values, padding)
        if self._prefers_steps(hidden_states, layer):
            return self._forward_steps(hidden_states, past_key_values, padding)
        return self._forward_prompt(hidden_states, past_key_values, padding)

    def _prefers_steps(self, hidden_states: torch.Tensor, layer: KDACacheLayer) -> bool:
        is_short = layer.state is not None and hidden_states.shape[1] <= MAX_NEW_TOKENS
        if not is_short or not self._weights_can_be_read(hidden_states):
            return False
        return resolve_kda_backend(self.backend, hidden_states, self.head_dim) != "fla"

    def _forward_recorded(
        self, hidden_states: torch.Tensor, past_key_values: Cache, padding: PaddingLayout | None
    ) -> torch.Tensor:
        """Recorded tokens are stepped through; what a long prompt has before them goes the way of prompts."""
        if not self._weights_can_be_read(hidden_states):
            raise ValueError(
                f"layer {self.layer_idx} can't record its past: its convolutions or its norm are offloaded, sharded or "
                "hooked, so the kept tokens couldn't be stepped through again; keep these modules on the device as "
                "they are, or call deactivate_past_recording() on the cache"
            )
        length = hidden_states.shape[1]
        recorded = past_key_values.layers[self.layer_idx].recorded_of(length)
        if recorded == length:
            return self._forward_steps(hidden_states, past_key_values, padding)
        parts = [length - recorded, recorded]
        paddings = [None, None]
        if padding is not None:
            paddings = [PaddingLayout.from_mask(mask) for mask in padding.mask.split(parts, dim=1)]
        front, back = hidden_states.split(parts, dim=1)
        outputs = [
            self._forward_prompt(front, past_key_values, paddings[0]),
            self._forward_steps(back, past_key_values, paddings[1]),
        ]
        return torch.cat(outputs, dim=1)

    def _weights_can_be_read(self, hidden_states: torch.Tensor) -> bool:
        """Stepping reads these weights by itself and would miss what hangs on their modules."""
        modules = (self.q_conv1d, self.k_conv1d, self.v_conv1d, self.o_norm)
        return weights_are_plain(modules, hidden_states.device)

    def step_weights(self) -> KDAStepWeights:
        """What a `KimiLinearCache` needs to step through recorded tokens again."""
        return KDAStepWeights(
            conv_weights=(self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.o_norm.weight,
            norm_eps=self.o_norm.variance_epsilon,
            backend=self.backend,
        )

    def _forward_steps(
        self, hidden_states: torch.Tensor, past_key_values: Cache, padding: PaddingLayout | None
    ) -> torch.Tensor:
        """Token by token over a `KimiLinearCache`, recording if asked to; one call from projections to gated norm."""
        layer = past_key_values.layers[self.layer_idx]
        inputs = self._raw_inputs(hidden_states)
        gate = self.g_b_proj(self.g_a_proj(hidden_states))
        window, state = layer.begin_step(
            hidden_states.shape[1],
            hidden_states.shape[0],
            (3 * inputs[0].shape[-1], self.q_conv1d.weight.shape[-1] - 1),
            (self.num_heads, self.head_dim, self.head_dim),
            like=inputs[0],
        )
        taken, lengths = inputs, None
        if padding is not None:
            taken, gate, lengths = tuple(map(padding.compact, inputs)), padding.compact(gate), padding.lengths
        y, window, state = layer.weights.step(taken, gate, window, state, lengths)
        layer.store_step(inputs, None if padding is None else padding.mask, window, state)
        output = self.o_proj(y.flatten(2))
        return output if padding is None else padding.restore(output)

    def _raw_inputs(self, hidden_states: torch.Tensor) -> RawInputs:
        """(q, k, v, f, beta): projections, before the convolutions, gate logits, write-strength logits."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        return q, k, v, self.f_b_proj(self.f_a_proj(hidden_states)), self.b_proj(hidden_states)

    def _forward_prompt(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None,
        padding: PaddingLayout | None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Many tokens at once."""
        shape = hidden_states.shape
        if padding is not None:
            hidden_states = padding.compact(hidden_states)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(hidden_states.device)
            hidden_states = hidden_states.reshape(1, -1, shape[-1])

        window, state = (None, None) if past_key_values is None else read_kda_states(past_key_values, self.layer_idx)
        q, k, v, window = self._convolved(hidden_states, window, padding, cu_seqlens)
        g = self._heads(self.f_b_proj(self.f_a_proj(hidden_states)))  # raw gate logits
        beta = self.b_proj(hidden_states)  # raw beta logits, [B, T, H]
        if padding is not None:
            # At -inf the decay is exactly one and beta exactly zero: padding leaves the state alone.
            g = g.masked_fill(~padding.valid[..., None, None], float("-inf"))
            beta = beta.masked_fill(~padding.valid[..., None], float("-inf"))
        o, state = kda(
            q,
            k,
            v,
            g,
            beta,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            output_final_state=past_key_values is not None,
            backend=self.backend,
        )
        if past_key_values is not None:
            write_kda_states(past_key_values, self.layer_idx, window, state, new_tokens=shape[1])

        o = self.o_norm(o, self._heads(self.g_b_proj(self.g_a_proj(hidden_states))))
        output = self.o_proj(o.flatten(2))
        return padding.restore(output) if padding is not None else output.view(shape)

    def _convolved(
        self,
        hidden_states: torch.Tensor,
        window: torch.Tensor | None,
        padding: PaddingLayout | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q, k, v) [B, T, H, K] after their convolutions, and the three windows in one [B, 3 H K, W-1]."""
        lengths = None if padding is None else padding.lengths
        windows = (None, None, None) if window is None else window.chunk(3, dim=1)
        q, q_window = self.q_conv1d(self.q_proj(hidden_states), windows[0], lengths, cu_seqlens)
        k, k_window = self.k_conv1d(self.k_proj(hidden_states), windows[1], lengths, cu_seqlens)
        v, v_window = self.v_conv1d(self.v_proj(hidden_states), windows[2], lengths, cu_seqlens)
        window = torch.cat([q_window, k_window, v_window], dim=1)
        return self._heads(q), self._heads(k), self._heads(v), window

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H * K] -> [B, T, H, K]."""
        return x.unflatten(-1, (-1, self.head_dim))


__all__ = ["KimiDeltaAttention", "ShortConvolution"]
