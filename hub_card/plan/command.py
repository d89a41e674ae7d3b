"""`python -m kimi_linear.hub_card plan`: arguments are those of `cli`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...modeling.checkpoint.schemes import quantization_fields
from ...modeling.prompt.segments import segment_bounds
from ..hub_files import read_config
from ..measure.counts import cache_bytes, cache_moved
from ..measure.expect import layers_ms, prompt_limit_ms, prompt_ms, step_ms
from ..measure.machine import device_kind, look_at_machine
from ..verify.layout import read_headers
from ..weight_files import find_weights
from .cards import Card, card_of_size, cpu_of_size, find_card
from .placing import cache_room, largest_batch, longest_context, needed_devices, place, scratch
from .report import show
from .weights import FORMATS, Weights, bf16_weights, stored_weights, weights_in

CONTEXTS, BATCHES = (4096, 32768, 131072, 1048576), (1, 8, 64)


@dataclass(frozen=True)
class PlanRequest:
    """What to plan; without `gpu`, `gpu_memory` and `cpu_memory` the machine at hand is measured.

    Args:
        folder: whose weights' bytes are counted too, or None.
        config: a config.json; with neither, the released shape.
        gpu: names of cards.
        gpu_memory: GiB of each card.
        read_rate: GB (10^9 bytes) a second that each card, or the processor, reads.
        cpu_memory: GiB of main memory, to plan for a processor.
        contexts, batches: sizes.
        as_json: whether to print JSON.
    """

    folder: Path | None = None
    config: Path | None = None
    gpu: tuple[str, ...] = ()
    gpu_memory: tuple[float, ...] = ()
    read_rate: float | None = None
    cpu_memory: float | None = None
    contexts: tuple[int, ...] = CONTEXTS
    batches: tuple[int, ...] = BATCHES
    as_json: bool = False


def plan(request: PlanRequest) -> int:
    """Count, print; returns the exit code.

    Raises:
        ValueError: for what the user can mend.
    """
    config, own = _source(request)
    cards = _cards(request)
    weights = [*own, bf16_weights(config), *(weights_in(format, config) for format in FORMATS)]
    if own and quantization_fields(config) is None:
        del weights[1]
    found = {
        "model": {
            "layers": config.num_hidden_layers,
            "kda": config.layer_types.count("linear_attention"),
            "mla": config.layer_types.count("full_attention"),
            "cache_bytes_a_row": cache_bytes(config, 1, 0),
            "cache_bytes_a_token": cache_bytes(config, 1, 1) - cache_bytes(config, 1, 0),
            "state_bytes_moved_a_row": cache_moved(config, 1, 0),
        },
        "devices": [{**asdict(card), "usable_bytes": card.usable} for card in cards],
        "weights": [_weights_row(config, one, cards, request) for one in weights],
    }
    print(json.dumps(found, indent=1) if request.as_json else show(found))
    return 0


def _source(request: PlanRequest) -> tuple[KimiLinearConfig, list[Weights]]:
    """The config, and the folder's own weights if there is a folder."""
    for name in ("contexts", "batches"):
        if wrong := [value for value in getattr(request, name) if value < 1]:
            raise ValueError(f"--{name} must be positive, got {wrong[0]}")
    if request.folder is None:
        return (KimiLinearConfig() if request.config is None else read_config(request.config)[0]), []
    if not request.folder.is_dir():
        raise ValueError(f"{request.folder} is not a folder: give one with config.json, or --config FILE")
    config, _ = read_config(request.folder / "config.json")
    stored, _ = read_headers(find_weights(request.folder))
    return config, [stored_weights(config, ((name, tensor.nbytes) for name, tensor in stored.items()))]


def _cards(request: PlanRequest) -> list[Card]:
    given = (bool(request.gpu), bool(request.gpu_memory), request.cpu_memory is not None)
    if sum(given) > 1:
        raise ValueError("--gpu, --gpu-memory and --cpu-memory exclude one another: plan for one machine at a time")
    if any(size <= 0 for size in (*request.gpu_memory, request.cpu_memory or 1, request.read_rate or 1)):
        raise ValueError("--gpu-memory, --cpu-memory and --read-rate must be positive")
    if request.gpu:
        return [find_card(name) for name in request.gpu]
    if request.gpu_memory:
        return [card_of_size(size, request.read_rate) for size in request.gpu_memory]
    if request.cpu_memory is not None:
        return [cpu_of_size(request.cpu_memory, request.read_rate)]
    kind = device_kind("auto")
    machine = look_at_machine(kind)
    rates = (machine.read_rate / 1e9, machine.matmul_rate / 1e12)
    return [
        Card(name, memory / 2**30, *rates, measured=True, is_cpu=kind == "cpu")
        for name, memory in zip(machine.names, machine.memory)
    ]


def _weights_row(
    config: KimiLinearConfig, weights: Weights, cards: Sequence[Card], request: PlanRequest
) -> dict[str, Any]:
    kind = "cpu" if cards[0].is_cpu else "cuda"
    reason = "on a CPU" if kind == "cpu" else weights.reason
    fitting = place(config, weights, cards, 1, 1024)
    row: dict[str, Any] = {
        "format": weights.name,
        "bytes": weights.total,
        "read_a_token_bytes": round(weights.read(config, 1)),
        "fits": fitting.fits,
        "layers_by_device": list(fitting.layers) if fitting.fits else None,
        "decode_path": "captured steps" if reason is None else f"layer by layer: {reason}",
    }
    if not fitting.fits:
        return row | {"needs_devices": needed_devices(config, weights, cards[-1]), "cases": []}
    row["longest_context"] = longest_context(config, weights, cards)
    row["largest_batch"] = {context: largest_batch(config, weights, cards, context) for context in request.contexts}
    slowest = min(card.read_gb_s for card in cards) * 1e9
    matmul = min(card.bf16_tflops for card in cards) * 1e12
    row["cases"] = [
        _case(config, weights, cards, context, batch, reason is None, slowest, matmul)
        for context in request.contexts
        for batch in request.batches
    ]
    return row


def _case(
    config: KimiLinearConfig,
    weights: Weights,
    cards: Sequence[Card],
    context: int,
    batch: int,
    captured: bool,
    read_rate: float,
    matmul_rate: float,
) -> dict[str, Any]:
    """One context and batch: bytes, and milliseconds at the rate of the slowest device."""
    kind, layers = "cpu" if cards[0].is_cpu else "cuda", config.num_hidden_layers
    case: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "cache_bytes": cache_bytes(config, batch, context),
        "needed_bytes": weights.total + sum(cache_room(config, batch, context))
        + scratch(config, batch, context, kind) * len(cards),
        "fits": place(config, weights, cards, batch, context).fits,
    }  # fmt: skip
    if not case["fits"]:
        return case
    limit = (weights.read(config, batch) + cache_moved(config, batch, context)) / read_rate * 1e3
    expected = step_ms(limit, layers) if captured else layers_ms(limit, layers, kind)
    prompt = prompt_limit_ms(config, batch, context, matmul_rate)
    prompt = prompt_ms(prompt, layers, len(segment_bounds(batch, context)), kind) / 1e3
    if not captured and weights.is_packed:
        expected = prompt = None  # weights are unpacked as they are used, which nobody has measured
    return case | {
        "limit_ms_a_token": limit,
        "expected_ms_a_token": expected,
        "expected_tokens_a_second": None if expected is None else batch / expected * 1e3,
        "expected_prompt_s": prompt,
    }


__all__ = ["BATCHES", "CONTEXTS", "PlanRequest", "plan"]
