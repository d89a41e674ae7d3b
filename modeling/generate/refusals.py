"""Caches that `generate()` can be asked for and a hybrid model cannot use: refused before any work, with the reason."""

import torch


def check_cache_implementation(name: str | None, layer_types: list[str]) -> None:
    """Raise ValueError if `cache_implementation=name` cannot work for these layers on this machine.

    Args:
        name: what `generate()` was asked for, or None.
        layer_types: of the config.
    """
    if name == "quantized" and "linear_attention" in layer_types:
        raise ValueError(
            "cache_implementation='quantized' has no place for the recurrent state of KDA layers, which must stay in "
            "fp32; leave it out: KimiLinearCache is small already, for it holds latents, not keys and values"
        )
    if name is not None and "offloaded" in name and not torch.accelerator.is_available():
        raise ValueError(
            f"cache_implementation={name!r} moves layers between an accelerator and the CPU, and there is no "
            "accelerator here; leave it out"
        )


def continuous_batching_error() -> ValueError:
    """What `generate_batch` and its relatives raise."""
    return ValueError(
        "continuous batching (generate_batch, init_continuous_batching, cache_implementation='paged') keeps keys and "
        "values in pages, which can hold neither the recurrent state of KDA layers nor MLA latents; call generate() "
        "with a left-padded batch and its attention_mask instead"
    )


__all__ = ["check_cache_implementation", "continuous_batching_error"]
