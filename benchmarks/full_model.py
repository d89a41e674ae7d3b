"""The released shape and the GPUs of our records; models, caches and counts are those of `hub_card.measure`."""

import torch

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.measure.counts import cache_bytes, held_bytes, step_bytes
from kimi_linear.hub_card.measure.random_models import (
    free_memory,
    native_cache,
    native_model,
    random_cache,
    random_model,
)
from kimi_linear.hub_card.measure.shapes import first_layers, with_mla_everywhere

# Bytes a second that reads alone reach, by a part of the GPU's name (benchmarks/decode_notes.md; H100: its copy rate).
READ_BANDWIDTH = {"H200": 4.6e12, "H100": 3.0e12}


def released_config(all_mla: bool = False, layers: int | None = None) -> KimiLinearConfig:
    """The released shape, whose values are the config's defaults.

    Args:
        all_mla: MLA in every layer instead of KDA.
        layers: only the first so many, for GPUs that do not hold all 27 (16 take 57 GB in bf16).
    """
    config = KimiLinearConfig()
    try:
        config = first_layers(config, config.num_hidden_layers if layers is None else layers)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return with_mla_everywhere(config) if all_mla else config


def read_bandwidth() -> float:
    """Bytes a second of the current GPU, for limits; one that was never measured counts as an H200."""
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in READ_BANDWIDTH.items() if part in name), READ_BANDWIDTH["H200"])


__all__ = [
    "READ_BANDWIDTH",
    "cache_bytes",
    "free_memory",
    "held_bytes",
    "native_cache",
    "native_model",
    "random_cache",
    "random_model",
    "read_bandwidth",
    "released_config",
    "step_bytes",
]
