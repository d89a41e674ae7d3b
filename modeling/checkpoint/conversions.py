"""From the released tensor layout to modules in memory and back.

The released layout is the only one on disk. Names in memory are the released ones too, except that the experts' w1
(gate) and w3 (up) are stacked to `gate_up_proj` [E, 2 I, H] and w2 to `down_proj` [E, H, I]. transformers runs the
conversion shard by shard while loading and undoes it in `save_pretrained`.
"""

import inspect
import re
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

_LAYER_OF_EXPERTS = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.")


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


def renamings_for_loading() -> list[WeightRenaming]:
    """From the names that llm-compressor gives to experts it has taken apart, to the released ones."""
    experts = r"block_sparse_moe\.experts\.(\d+)\."
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return [
        WeightRenaming(rf"{experts}{name}\.", rf"block_sparse_moe.experts.\1.{released}.")
        for name, released in names.items()
    ]


def with_released_layout(conversions: list[Any] | None) -> list[Any]:
    """`conversions` of a model in memory, such that undoing them while saving gives the released layout.

    Renamings that only reading needs are dropped; ours are added where none of `conversions` makes their parameter.
    """
    reading = {_patterns(entry) for entry in renamings_for_loading()}
    kept = [entry for entry in conversions or [] if _patterns(entry) not in reading]
    made = {target for entry in kept for target in entry.target_patterns}
    return [entry for entry in released_layout_conversions() if not made & set(entry.target_patterns)] + kept


def check_experts_were_read(info: Any, num_hidden_layers: int) -> None:
    """Raise ValueError if experts found no tensor, or tensors of experts found no place.

    The loader initialises what is missing and reports the rest, which for experts means random weights.

    Args:
        info: the loader's `LoadStateDictInfo`.
        num_hidden_layers: of the model; tensors of later layers are left out on purpose.
    """
    if info.conversion_errors or info.error_msgs:
        return  # transformers raises for these, with details
    missing = sorted(name for name in info.missing_keys if _LAYER_OF_EXPERTS.search(name))
    unread = []
    for name in sorted(info.unexpected_keys):
        found = _LAYER_OF_EXPERTS.search(name)
        if found and int(found[1]) < num_hidden_layers:
            unread.append(name)
    problems = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("experts that no tensor fills", missing), ("tensors that nobody reads", unread))
        if names
    ]
    if problems:
        raise ValueError(
            f"the experts of this checkpoint cannot be read. {'; '.join(problems)}. They must have the released names "
            "(block_sparse_moe.experts.N.w1.weight, w2, w3), unquantised or in a format that this package reads"
        )


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
    return [*renamings_for_loading(), *ours, *kept]


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


__all__ = [
    "check_experts_were_read",
    "conversions_for_loading",
    "damaged_file_error",
    "released_layout_conversions",
    "renamings_for_loading",
    "with_released_layout",
]
