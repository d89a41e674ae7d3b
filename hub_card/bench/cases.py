"""What is measured: which cases there are, and what each is expected to take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...modeling.prompt.segments import SEGMENT_TOKENS
from ..measure.counts import cache_moved, used_experts
from ..measure.expect import (
    bf16_bytes,
    case_bytes,
    layers_ms,
    prompt_limit_ms,
    prompt_ms,
    step_ms,
)
from ..measure.machine import Machine

MODELS = ("ours", "all_mla", "native")
PATHS = ("captured", "layers")
DEFAULTS = {"cuda": ([4096, 32768, 131072], [1, 8]), "cpu": ([256, 1024], [1, 4])}
_CAPTURE_S = {"cuda": 3.0, "cpu": 0.0}
# Tokens that the timing of a case decodes at most; see `running.decode_ms`.
MOST_TOKENS = 400
_SECONDS_A_CASE = 4.0


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        model: "ours", "all_mla" or "native".
        what: "decode" (a token of every row, over a filled cache) or "prompt".
        context: tokens a row that are cached, or of the prompt.
        batch: rows.
        path: of decoding, "captured" or "layers"; "" for prompts and the native class.
        segment: tokens of a prompt's segment; 0 for decoding and the native class.
    """

    model: str
    what: str
    context: int
    batch: int
    path: str = ""
    segment: int = 0

    def __str__(self) -> str:
        way = f" {self.path}" if self.path else ""
        way += f" segments of {self.segment}" if self.segment not in (0, SEGMENT_TOKENS) else ""
        return f"{self.model} {self.what}{way} {self.context} x {self.batch}"


def cases_of(
    models: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int],
    segments: Sequence[int],
    paths: Sequence[str],
) -> list[Case]:
    """Every case, model by model, short ones first.

    Other segments than the usual are measured with our model, and only where they cut a prompt.
    """
    found: list[Case] = []
    for model in models:
        for context in sorted(set(contexts)):
            for batch in sorted(set(batches)):
                if model == "native":
                    found += [Case(model, what, context, batch) for what in ("decode", "prompt")]
                    continue
                ways = paths if model == "ours" else paths[:1]
                found += [Case(model, "decode", context, batch, path=path) for path in ways]
                cuts = [size for size in segments if size < context * batch] if model == "ours" else []
                sizes = dict.fromkeys([SEGMENT_TOKENS, *sorted(cuts)])
                found += [Case(model, "prompt", context, batch, segment=size) for size in sizes]
    return found


@dataclass(frozen=True)
class Expected:
    """What a case is expected to take: seconds to measure, bytes to hold, and the limit of its time."""

    seconds: float
    nbytes: int
    limit_ms: float


def expect(case: Case, config: Any, weights: int, machine: Machine, repeats: int) -> Expected:
    """From counts alone.

    Args:
        case: to measure.
        config: of its model.
        weights: bytes of the model.
        machine: at hand.
        repeats: timed runs.
    """
    layers, kind = config.num_hidden_layers, machine.kind
    whole = case.context * case.batch
    if case.what == "prompt":
        limit = prompt_limit_ms(config, case.batch, case.context, machine.matmul_rate)
        limit = max(limit, weights / machine.read_rate * 1e3 * used_experts(config, whole))
        ms = prompt_ms(limit, layers, -(-whole // (case.segment or whole)), kind)
        seconds = (repeats + 1) * ms / 1e3
        return Expected(
            seconds, case_bytes(config, weights, case.batch, case.context, case.segment or whole, kind), limit
        )
    limit = decode_limit_ms(config, weights, case, machine)
    ms = step_ms(limit, layers) if case.path == "captured" else layers_ms(limit, layers, kind)
    seconds = min(_SECONDS_A_CASE, MOST_TOKENS * ms / 1e3) + 30 * ms / 1e3
    seconds += _CAPTURE_S[kind] if case.path == "captured" else 0.0
    return Expected(seconds, case_bytes(config, weights, case.batch, case.context, None, kind), limit)


def decode_limit_ms(config: Any, weights: int, case: Case, machine: Machine) -> float:
    """Bytes of one token of every row at the machine's rate of reading, with weights of `weights` bytes in all."""
    total = bf16_bytes(config)
    vocabulary = 2 * config.vocab_size * config.hidden_size
    expert = 2 * 3 * config.hidden_size * config.moe_intermediate_size * config.mlp_layer_types.count("sparse")
    experts = expert * (config.num_experts or 0)
    read = total - vocabulary - experts * (1 - used_experts(config, case.batch))
    moved = read * weights / total + cache_moved(config, case.batch, case.context)
    return moved / machine.read_rate * 1e3


__all__ = ["DEFAULTS", "MODELS", "MOST_TOKENS", "PATHS", "Case", "Expected", "cases_of", "expect"]
