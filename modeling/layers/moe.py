"""Feed-forward layers: the gated MLP and the mixture of experts with shared expert (arXiv 2510.26692, section 4)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import use_experts_implementation

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...kernels.gpu.availability import fused_path_serves, gradients_wanted
from ...kernels.prompt.expert_rows import route_fwd, silu_mul_fwd
from ...kernels.prompt.grouped_experts import grouped_experts, grouped_experts_serve
from ...kernels.prompt.quantised_experts import quantised_experts, quantised_experts_serve
from ...kernels.training.expert_adapters import LowRank, adapted_experts, expert_adapters_serve
from ...kernels.training.grouped_experts import grouped_experts_with_gradients
from ...kernels.training.routing import router_logits
from ..checkpoint.expert_rows import expect_filled, read_released_experts
from ..checkpoint.packed_adapters import adapters_over_packed
from ..checkpoint.packed_modules import KimiPackedExperts
from ..plain_adapters import adapter_misfit, base_of, expert_adapters, wrappers_of
from ..plain_modules import Noticing, hanging, reads_weights, weights_are_plain
from .fp32_parameters import keeping_fp32


@reads_weights
class KimiMLP(Noticing):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        fused = gate.dtype == up.dtype and fused_path_serves(gate, up, differentiable=True)
        return self.down_proj(silu_mul_fwd(gate, up) if fused else F.silu(gate) * up)


@reads_weights
@use_experts_implementation
class KimiExperts(Noticing):
    """Routed experts, stacked: `gate_up_proj` [E, 2 I, hidden_size] and `down_proj` [E, hidden_size, I].

    The forward below is the "eager" backend of transformers' experts interface; `config._experts_implementation`
    (grouped_mm, batched_mm, ...) replaces it.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = self._unfilled(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        self.down_proj = self._unfilled(self.num_experts, self.hidden_dim, self.intermediate_dim)
        self.act_fn = nn.SiLU()
        self._may_be_unfilled = True
        self._rows_arrived: dict[str, Any] = {}  # of a load_state_dict in the released layout that is not complete
        self.register_load_state_dict_pre_hook(read_released_experts)

    @staticmethod
    def _unfilled(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, torch.nan))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KimiExperts":
        was_meta = self.gate_up_proj.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.gate_up_proj.is_meta:  # `to_empty`: what its memory held may look like weights
            with torch.no_grad():
                self.gate_up_proj.fill_(torch.nan)
                self.down_proj.fill_(torch.nan)
            self._may_be_unfilled = True
        return self

    def check_filled(self) -> None:
        """Raise ValueError at the first forward if nothing has filled the parameters."""
        if self._may_be_unfilled and not torch.compiler.is_compiling():
            expect_filled(self)
            self._may_be_unfilled = False

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs, accumulated in fp32 and rounded once, as in the released code.

        Args:
            hidden_states: [M, hidden_size].
            top_k_index: [M, k] experts of each token; `num_experts` and beyond mark experts of another rank.
            top_k_weights: [M, k] fp32.

        Returns:
            [M, hidden_size].
        """
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, expert_output.float() * top_k_weights[token, slot, None])
        return output.to(hidden_states.dtype)


@reads_weights
class KimiTopkRouter(Noticing):
    """Sigmoid router in fp32 with a correction bias that steers the choice of experts, not their weights.

    The bias (auxiliary-loss-free balancing, arXiv 2408.15664) is a buffer: no gradient reaches it. In training mode
    with gradients the router counts the tokens of each expert; `update_correction_bias` uses and clears the counts.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.num_experts = config.num_experts
        self.num_groups = config.num_expert_group
        self.topk_group = config.topk_group
        self.renormalize = config.moe_renormalize
        self.scaling_factor = config.routed_scaling_factor
        self.biased_weights = config.router_weight_uses_score_correction_bias
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        self.tokens_per_expert: torch.Tensor | None = None
        self.in_checkpoint = False  # set by the layer: its first pass may be without gradients

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KimiTopkRouter":
        return super()._apply(keeping_fp32(fn, self.e_score_correction_bias), recurse)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose experts (docs/checkpoint.md, "Experts").

        Args:
            hidden_states: [M, hidden_size].

        Returns:
            logits [M, E] fp32, weights [M, k] fp32, experts [M, k] int64.
        """
        logits = self._logits(hidden_states)
        if self._takes_fused(logits):
            weights, experts = route_fwd(
                logits,
                self.e_score_correction_bias,
                self.top_k,
                self.renormalize,
                self.scaling_factor,
                self.biased_weights,
            )
            self._count(experts)
            return logits, weights, experts
        scores = logits.sigmoid()
        biased = scores + self.e_score_correction_bias.float()
        experts = self._within_best_groups(biased).topk(self.top_k, dim=-1, sorted=False).indices
        weights = (biased if self.biased_weights else scores).gather(1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        self._count(experts)
        return logits, weights * self.scaling_factor, experts

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The product in fp32 of operands cast to fp32, [M, E].

        Products of half-precision numbers are exact in fp32, so tensor cores that accumulate and return fp32 give the
        same up to the order of summation, without the casts.
        """
        half = hidden_states.dtype in (torch.bfloat16, torch.float16) and hidden_states.dtype == self.weight.dtype
        with torch.autocast(hidden_states.device.type, enabled=False):  # which would return half precision
            if half and fused_path_serves(hidden_states, self.weight, differentiable=True):
                return router_logits(hidden_states, self.weight)
            return F.linear(hidden_states.float(), self.weight.float())

    def _takes_fused(self, logits: torch.Tensor) -> bool:
        chooses_groups = self.num_groups != self.topk_group
        ours = not chooses_groups and logits.dtype == torch.float32
        return ours and fused_path_serves(logits, self.e_score_correction_bias, differentiable=True)

    def _within_best_groups(self, biased: torch.Tensor) -> torch.Tensor:
        """Scores with -inf outside the `topk_group` groups whose two best experts score highest."""
        if self.num_groups == self.topk_group:
            return biased
        grouped = biased.unflatten(-1, (self.num_groups, -1))
        best_groups = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.topk_group, dim=-1, sorted=False).indices
        chosen = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=biased.device).scatter_(1, best_groups, True)
        return grouped.masked_fill(~chosen[..., None], float("-inf")).flatten(1)

    def _is_training_pass(self) -> bool:
        """Whether this pass is one to count: neither generation in training mode nor a checkpoint's recomputation."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return False  # inside backward()
        return torch.is_grad_enabled() or self.in_checkpoint

    def _count(self, experts: torch.Tensor) -> None:
        """Add the tokens of each expert to the counts, in a pass that counts; experts [N, k]."""
        if not (self.training and self._is_training_pass()):
            return
        ones = torch.ones_like(experts.flatten())
        counts = ones.new_zeros(self.num_experts).scatter_add(0, experts.flatten(), ones)
        self.tokens_per_expert = counts if self.tokens_per_expert is None else self.tokens_per_expert + counts

    @torch.no_grad()
    def update_correction_bias(self, rate: float = 1e-3) -> torch.Tensor | None:
        """Raise the bias of experts that got fewer tokens than the mean and lower that of the others, by `rate`.

        Call it after each optimiser step; with torch.distributed initialised the counts of all ranks are added first.

        Returns:
            The counts used, [E] int64, or None if no token was routed since the last call.
        """
        counts = self.tokens_per_expert
        if counts is None:
            return None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        load = counts.float()
        self.e_score_correction_bias = self.e_score_correction_bias.float() + rate * (load.mean() - load).sign()
        self.tokens_per_expert = None
        return counts


@reads_weights
class KimiSparseMoeBlock(Noticing):
    """Routed experts plus the shared expert, which every token visits with weight one."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.gate = KimiTopkRouter(config)
        self.experts = KimiExperts(config)
        self.shared_experts = (
            KimiMLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)
            if config.num_shared_experts
            else None
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden_size] -> the same shape."""
        stacked = base_of(self.experts)
        if type(stacked) is KimiExperts:
            stacked.check_filled()
        tokens = hidden_states.flatten(0, -2)
        _, weights, experts = self.gate(tokens)
        if self._takes_packed(tokens):
            shared = None if self.shared_experts is None else self.shared_experts(tokens)
            stacks = self.experts.stack("gate_up_proj"), self.experts.stack("down_proj")
            return quantised_experts(tokens, experts, weights, *stacks, shared).view(hidden_states.shape)
        if not self._takes_grouped(tokens):
            adapted = adapters_over_packed(self.experts, KimiPackedExperts)
            routed, packed = (self.experts, ()) if adapted is None else (adapted[0], adapted[1:])
            output = routed(tokens, experts, weights, *packed).view(hidden_states.shape)
            return output if self.shared_experts is None else output + self.shared_experts(hidden_states)
        shared = None if self.shared_experts is None else self.shared_experts(tokens)
        inputs = tokens, experts, weights, stacked.gate_up_proj, stacked.down_proj, shared
        adapters = self._adapters()
        if adapters:
            output = adapted_experts(*inputs, adapters.get("gate_up_proj"), adapters.get("down_proj"))
        elif gradients_wanted(*inputs):
            output = grouped_experts_with_gradients(*inputs)
        else:
            output = grouped_experts(*inputs)
        return output.view(hidden_states.shape)

    def _takes_grouped(self, tokens: torch.Tensor) -> bool:
        """Whether to compute the experts here, from their parameters, instead of calling the module.

        Only where "grouped_mm", transformers' default, is configured, and where nothing hangs on the module but plain
        adapters (PEFT's LoRA).
        """
        stacked = base_of(self.experts)
        if not weights_are_plain((stacked,), tokens.device) or stacked.config._experts_implementation != "grouped_mm":
            return False
        if getattr(stacked, "_is_expert_parallel", False):
            return False
        if not grouped_experts_serve(tokens, stacked.gate_up_proj, stacked.down_proj):
            return False
        if self.experts is stacked:
            return True
        plain = all(adapter_misfit(wrapper) is None for wrapper in wrappers_of(self.experts))
        return plain and expert_adapters_serve(tokens, *self._adapters().values())

    def _adapters(self) -> dict[str, LowRank]:
        """What PEFT's wrappers around the experts add, by the parameter's name."""
        return {name: LowRank(*adapter) for name, adapter in expert_adapters(self.experts).items()}

    def _takes_packed(self, tokens: torch.Tensor) -> bool:
        """The same for packed experts, on which nothing hangs."""
        if not isinstance(self.experts, KimiPackedExperts) or hanging(self.experts) is not None:
            return False
        return quantised_experts_serve(tokens, self.experts.stack("gate_up_proj"), self.experts.stack("down_proj"))


__all__ = ["KimiExperts", "KimiMLP", "KimiSparseMoeBlock", "KimiTopkRouter"]
