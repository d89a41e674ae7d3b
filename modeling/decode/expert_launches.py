"""The launches of a mixture of experts in a decode step: dense or packed weights, with adapters or without.

| | one token | several |
|---|---|---|
| dense | all experts up; all experts down + residual | choice; grouping; up; down; sum + residual |
| packed | the same by launches that dequantise | the same |
| adapters of stacked projections | one launch before up, one before down | the same |

A shared expert whose projections have adapters runs apart from the others, as a dense MLP does; so does a packed one
beside routed experts that have adapters, for launches read packed weights or adapters of experts, not both.
"""

from typing import Any

import torch

from ...kernels.decode.configs import (
    down_config,
    experts_config,
    grouped_configs,
    packed_down_config,
    packed_experts_configs,
)
from ...kernels.decode.expert_adapters import ExpertFactors, decode_expert_adapter
from ...kernels.decode.experts import decode_expert_down, decode_expert_up
from ...kernels.decode.grouped_experts import decode_grouped_experts
from ...kernels.decode.packed_experts import decode_packed_expert_down, decode_packed_expert_up
from ...kernels.decode.packed_grouped import decode_packed_grouped_experts
from ...kernels.decode.routing import decode_group, decode_route
from ..plain_adapters import adapter_of, expert_adapters
from .packed import expert_weight, is_packed, linear_weight


class ExpertLaunches:
    """Part of `StepPlan`, whose buffers and linears it uses."""

    def _moe(self, moe: Any, norm: Any) -> None:
        shared = moe.shared_experts
        projections = () if shared is None else (shared.gate_proj, shared.up_proj, shared.down_proj)
        adapted = bool(expert_adapters(moe.experts))
        apart = any(
            adapter_of(module) is not None or (adapted and is_packed(linear_weight(module))) for module in projections
        )
        if apart:
            p = self._mlp_up(shared, norm)  # before the experts add to what it reads
        self._linear(self.x, [moe.gate], self.router, norm)
        weights = None if shared is None or apart else tuple(map(linear_weight, projections))
        stacks = tuple(expert_weight(moe.experts, name) for name in ("gate_up_proj", "down_proj"))
        packed = any(map(is_packed, (*stacks, *(weights or ()))))
        if self.x.shape[0] == 1:
            (self._packed_experts_of_one if packed else self._experts_of_one)(moe, norm, *stacks, weights)
        else:
            (self._packed_experts_of_several if packed else self._experts_of_several)(moe, *stacks, weights)
        if apart:
            self._mlp_down(shared, p)

    def _choice_of_one(self, moe: Any, norm: Any) -> dict[str, Any]:
        """What the launch of one token's up projections chooses experts by."""
        bias = moe.gate.e_score_correction_bias
        return {"norm_weight": norm.weight, "eps": norm.variance_epsilon, "bias": bias, **self._rule(moe.gate)}

    def _rule(self, router: Any) -> dict[str, Any]:
        return {
            "factor": router.scaling_factor,
            "biased": router.biased_weights,
            "renormalize": router.renormalize,
            "pdl": self._pdl,
        }

    def _h_of_one(self, shared: Any) -> torch.Tensor:
        return self.h if shared else self.h[: self.chosen.numel()]

    def _experts_of_one(self, moe: Any, norm: Any, gate_up: Any, down: Any, shared: Any) -> None:
        x, chosen, weights, h = self.x, self.chosen, self.expert_weights, self._h_of_one(shared)
        up_adapter, down_adapter = self._expert_factors(moe)
        if up_adapter is not None:
            t, bias = self._low_rank_of_experts(up_adapter), moe.gate.e_score_correction_bias
            decode_expert_adapter(
                x, up_adapter, t, chosen, logits=self.router, bias=bias, norm_weight=norm.weight,
                eps=norm.variance_epsilon, pdl=self._pdl,
            )  # fmt: skip
        decode_expert_up(
            x, self.router, h, chosen, weights, gate_up=gate_up, shared=shared and shared[:2],
            config=experts_config(x.shape[1]), adapter=up_adapter and (t, up_adapter.up),
            **self._choice_of_one(moe, norm),
        )  # fmt: skip
        if down_adapter is not None:
            t = self._low_rank_of_experts(down_adapter)
            decode_expert_adapter(h, down_adapter, t, chosen, pdl=self._pdl)
        decode_expert_down(
            h, chosen, weights, down, shared and shared[2], x, down_config(down.shape[2]),
            adapter=down_adapter and (t, down_adapter.up), pdl=self._pdl,
        )  # fmt: skip

    def _packed_experts_of_one(self, moe: Any, norm: Any, gate_up: Any, down: Any, shared: Any) -> None:
        x, chosen, weights, h = self.x, self.chosen, self.expert_weights, self._h_of_one(shared)
        decode_packed_expert_up(
            x, self.router, h, chosen, weights, gate_up=gate_up, shared=shared and shared[:2],
            configs=packed_experts_configs(x.shape[1]), gpu=self._gpu, **self._choice_of_one(moe, norm),
        )  # fmt: skip
        config = packed_down_config(h.shape[1], chosen.numel())
        decode_packed_expert_down(
            h, chosen, weights, down, shared and shared[2], x, config, gpu=self._gpu, pdl=self._pdl
        )

    def _group_tokens(self, router: Any) -> None:
        bias = router.e_score_correction_bias
        decode_route(self.router, bias, self.chosen, self.expert_weights, **self._rule(router))
        decode_group(self.chosen, *self.groups, router.num_experts, pdl=self._pdl)

    def _experts_of_several(self, moe: Any, gate_up: Any, down: Any, shared: Any) -> None:
        self._group_tokens(moe.gate)
        x = self.x
        decode_grouped_experts(
            self.normed, self.expert_weights, x, groups=self.groups, gate_up=gate_up, down=down, shared=shared,
            h=self.h, z=self.z, configs=grouped_configs(x.shape[1], down.shape[2], x.element_size(), self._gpu),
            adapters=self._expert_factors(moe), t=self.low_rank, upcast=self._upcast, pdl=self._pdl,
        )  # fmt: skip

    def _packed_experts_of_several(self, moe: Any, gate_up: Any, down: Any, shared: Any) -> None:
        self._group_tokens(moe.gate)
        x = self.x
        decode_packed_grouped_experts(
            self.normed, self.expert_weights, x, groups=self.groups, gate_up=gate_up, down=down, shared=shared,
            h=self.h, z=self.z, configs=grouped_configs(x.shape[1], self.h.shape[1], x.element_size(), self._gpu),
            upcast=self._upcast, gpu=self._gpu, pdl=self._pdl,
        )  # fmt: skip

    def _expert_factors(self, moe: Any) -> tuple[ExpertFactors | None, ExpertFactors | None]:
        """Of the gate and up, and of the down projections."""
        found = {name: ExpertFactors(*adapter) for name, adapter in expert_adapters(moe.experts).items()}
        return found.get("gate_up_proj"), found.get("down_proj")

    def _low_rank_of_experts(self, factors: ExpertFactors) -> torch.Tensor:
        """[pairs, rank] for what the down-going factors give."""
        shape = self.chosen.numel(), factors.down.shape[1]
        return self.low_rank[: shape[0] * shape[1]].view(shape)


__all__ = ["ExpertLaunches"]
