"""Random weights in the released layout, for exports that exercise a config without a trained checkpoint."""

import os
import shutil
from pathlib import Path

import torch

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from ..modeling.checkpoint.saving import to_released
from ..modeling.modeling_kimi_linear import KimiLinearForCausalLM

# Saving takes the stacked experts apart, into copies. Peak measured at 1.66 times the weights (1.2 GB, 128 experts).
_SAVING_OVERHEAD = 1.7


def random_weight_bytes(config: KimiLinearConfig) -> int:
    """Size of the bf16 checkpoint of `config`, from a model without storage."""
    with torch.device("meta"):
        model = _bf16_model(config)
    state = model.state_dict()
    to_released(state, torch.bfloat16)
    return sum(parameter.nbytes for parameter in state.values())


def write_random_weights(config: KimiLinearConfig, folder: Path, *, seed: int, max_shard_size: str = "5GB") -> int:
    """Initialise a bf16 model (`A_log` and `dt_bias` stay fp32) and save it sharded into `folder`.

    Args:
        config: the model's config; its dtype becomes bf16.
        folder: existing folder.
        seed: of the weights. The caller's random state is left alone.
        max_shard_size: as in `save_pretrained`.

    Returns:
        Bytes of the weights.

    Raises:
        ValueError: the model does not fit into memory or onto the disk.
    """
    size = random_weight_bytes(config)
    memory = available_memory()
    if memory is not None and size * _SAVING_OVERHEAD > memory:
        raise ValueError(
            f"random weights of this config need {size * _SAVING_OVERHEAD / 1e9:.1f} GB of memory and "
            f"{memory / 1e9:.1f} GB are available; use a smaller config, or leave out --random"
        )
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(f"random weights of this config need {size} bytes of disk and {free} are free in {folder}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _bf16_model(config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return size


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _bf16_model(config: KimiLinearConfig) -> KimiLinearForCausalLM:
    return KimiLinearForCausalLM._from_config(config, dtype=torch.bfloat16)


__all__ = ["available_memory", "random_weight_bytes", "write_random_weights"]
