"""What a machine is expected to take and to need, from counted bytes and operations.

The limit is bytes divided by the rate of reading, or operations by that of matrix products. What our code takes beside
its limit was fitted to one H200 (docs/benchmarks.md): steps of limits 1.37 / 1.6 / 3.2 / 5.5 / 19.8 ms took 2.05 /
2.39 / 4.45 / 7.35 / 23 ms, which `step_ms` gives within 8%; layer by layer the host takes 3 ms a layer (27 layers, 81
ms natively; a prompt of 1k tokens, 88 ms); prompts of 8k to 128k tokens take 1.3 to 1.5 of the limit.
"""

import math
from typing import Any

from ..released_tensors import released_shapes
from .counts import cache_bytes, parameters_used, prompt_flops

_OVER_LIMIT, _LAUNCHES_MS = 1.15, 0.018
_HOST_MS_A_LAYER = {"cuda": 3.0, "cpu": 0.5}
_LAYERS_OVER_LIMIT = {"cuda": 1.15, "cpu": 2.0}
_PROMPT_OVER_LIMIT = {"cuda": 1.4, "cpu": 2.0}
# The PyTorch path of KDA: 184 MiB at 2,048 tokens of 8 heads of 128.
_TORCH_KDA_BYTES = 96
_STEP_BUFFERS = 64 * 2**20


def step_ms(limit_ms: float, layers: int) -> float:
    """Of a captured step."""
    return _OVER_LIMIT * limit_ms + _LAUNCHES_MS * layers


def layers_ms(limit_ms: float, layers: int, kind: str) -> float:
    """Of a token that goes layer by layer, on "cuda" or "cpu"."""
    host = _HOST_MS_A_LAYER[kind] * layers
    if kind == "cpu":
        return _LAYERS_OVER_LIMIT[kind] * limit_ms + host
    return max(_LAYERS_OVER_LIMIT[kind] * limit_ms, host)  # the host launches while the GPU works


def prompt_limit_ms(config: Any, batch: int, length: int, matmul_rate: float) -> float:
    """Operations of a prompt at the rate of matrix products."""
    used = parameters_used(config, released_shapes(config))
    return prompt_flops(config, used, batch, length) / matmul_rate * 1e3


def prompt_ms(limit_ms: float, layers: int, segments: int, kind: str) -> float:
    """Of a prompt."""
    return max(_PROMPT_OVER_LIMIT[kind] * limit_ms, _HOST_MS_A_LAYER[kind] * layers * segments)


def prompt_scratch(config: Any, tokens: int, kind: str = "cuda") -> int:
    """Bytes that `tokens` tokens need while they go through a layer: rows gathered for the experts, above all.

    About 4 GiB for a segment of 32,768 tokens at the released shape, as measured there.
    """
    hidden, inner = config.hidden_size, config.linear_num_heads * config.linear_head_dim
    rows = (config.num_experts_per_token or 0) * (2 * hidden + 3 * config.moe_intermediate_size)
    dense = max(rows, 3 * config.intermediate_size) + 4 * hidden
    return tokens * (2 * dense + (_TORCH_KDA_BYTES * inner if kind == "cpu" else 0))


def step_scratch(config: Any, batch: int) -> int:
    """Bytes of buffers and logits of a step."""
    return _STEP_BUFFERS + 8 * batch * config.vocab_size


def case_bytes(config: Any, weights: int, batch: int, length: int, segment: int | None, kind: str = "cuda") -> int:
    """Bytes that a prompt of `length` tokens a row, or decoding after it (`segment` None), needs in all."""
    if segment is None:
        scratch = step_scratch(config, batch)
    else:
        scratch = prompt_scratch(config, min(batch * length, segment), kind)
    return weights + cache_bytes(config, batch, length) + scratch


def bf16_bytes(config: Any) -> int:
    """Bytes of the released tensors; A_log and dt_bias are fp32."""
    total = 0
    for name, shape in released_shapes(config).items():
        total += math.prod(shape) * (4 if name.endswith(("A_log", "dt_bias")) else 2)
    return total


__all__ = [
    "bf16_bytes",
    "case_bytes",
    "layers_ms",
    "prompt_limit_ms",
    "prompt_ms",
    "prompt_scratch",
    "step_ms",
    "step_scratch",
]
