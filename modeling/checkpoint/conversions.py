"""From the released tensor layout to modules in memory and back.

The released layout is the only one on disk. Names in memory are the released ones too, except that the experts' w1
(gate) and w3 (up) are stacked to `gate_up_proj` [E, 2 I, H] and w2 to `down_proj` [E, H, I]. transformers runs the
conversion shard by shard while loading and undoes it in `save_pretrained`.
"""

import inspect
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


def released_layout_conversions() -> list[WeightConverter]:
    """The conversions between the released layout and ours, for transformers' loader."""
    experts = "block_sparse_moe.experts"
    return [
        WeightConverter(
            source_patterns=[f"{experts}.*.w1.weight", f"{experts}.*.w3.weight"],
            target_patterns=f"{experts}.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=f"{experts}.*.w2.weight",
            target_patterns=f"{experts}.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def conversions_for_loading(found: list[Any] | None, hf_quantizer: Any, model: Any) -> list[Any]:
    """What the loader is to apply, given what transformers found for our model_type.

    transformers registers conversions by model_type or class name, both of which its native Kimi Linear shares with
    us; a registration of ours would break the native class in the same process. So nothing is registered: the native
    entries (versions 5.17 to 5.22 hand them to us) are dropped from `found` and ours put in their place. Renamings
    that the user passed as `key_mapping` stay.
    """
    native = {_patterns(entry) for entry in get_checkpoint_conversion_mapping("kimi_linear") or []}
    kept = [entry for entry in found or [] if _patterns(entry) not in native]
    ours: list[Any] = released_layout_conversions()
    if hf_quantizer is not None:
        update = hf_quantizer.update_weight_conversions
        takes_model = "model" in inspect.signature(update).parameters
        known = {_patterns(entry) for entry in kept}
        updated = update(ours, model) if takes_model else update(ours)
        ours = [entry for entry in updated if _patterns(entry) not in known]
    # A pre-quantised checkpoint brings a converter for any `weight`; the first that matches wins, so ours go in front.
    return ours + kept


def _patterns(entry: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(entry.source_patterns), tuple(entry.target_patterns)


def damaged_file_error(files: list[str] | None, error: SafetensorError) -> SafetensorError:
    """`error` with the names of the damaged `files`: safetensors tells what is wrong, but not in which of 20 shards."""
    damaged = []
    for file in files or []:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as reason:
            damaged.append(f"{file} ({reason})")
    return SafetensorError(f"damaged weight files, download them again: {', '.join(damaged)}") if damaged else error


__all__ = ["conversions_for_loading", "damaged_file_error", "released_layout_conversions"]
