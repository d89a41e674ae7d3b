"""From the released tensor layout to modules in memory and back.

The released layout is the only one on disk. Names in memory are the released ones too, except that the experts' w1
(gate) and w3 (up) are stacked to `gate_up_proj` [E, 2 I, D] and w2 to `down_proj` [E, D, I]. transformers runs the
conversion shard by shard while loading and undoes it in `save_pretrained`.
"""

import inspect
import re
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from .packed_names import PlainNames, experts_conversions, packed_modules, plain_names

_LAYER_OF_EXPERTS = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.")


def released_layout_conversions(experts: str = "block_sparse_moe.experts") -> list[WeightConverter]:
    """The conversions between the released layout and ours, for transformers' loader.

    Args:
        experts: pattern of the experts' name.
    """
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


def conversions_for_loading(
    found: list[Any] | None, hf_quantizer: Any, model: Any, files: list[str] | None = None
) -> list[Any]:
    """What the loader is to apply, given what transformers found for our model_type.

    transformers registers conversions by model_type or class name, both of which its native Kimi Linear shares with
    us; a registration of ours would break the native class in the same process. So nothing is registered: the native
    entries (versions 5.17 to 5.22 hand them to us) are dropped from `found` and ours put in their place. Renamings
    that the user passed as `key_mapping` stay.
    """
    native = {_patterns(entry) for entry in get_checkpoint_conversion_mapping("kimi_linear") or []}
    kept = [entry for entry in found or [] if _patterns(entry) not in native]
    reading = renamings_for_loading()
    ours: list[Any] = experts_conversions(model, released_layout_conversions, files)
    if model.config.packed_experts:
        known = {_patterns(entry) for entry in kept}
        library = [] if hf_quantizer is None else _updated([], hf_quantizer, model)
        return [*reading, *ours, *(entry for entry in library if _patterns(entry) not in known), *kept]
    if packed_modules(model):
        # The library's converters of packed weights would unpack them, or stack them another way.
        library = {_patterns(entry) for entry in _updated([], hf_quantizer, model)}
        kept = [entry for entry in kept if _patterns(entry) not in library]
        return [*reading, *ours, *kept, *plain_names(model)]
    if hf_quantizer is not None:
        known = {_patterns(entry) for entry in kept}
        ours = [entry for entry in _updated(ours, hf_quantizer, model) if _patterns(entry) not in known]
    # A pre-quantised checkpoint brings a converter for any `weight`; the first that matches wins, so ours go in front.
    return [*reading, *ours, *kept]


def conversions_for_saving(model: Any, loaded: list[Any] | None) -> list[Any]:
    """What save_pretrained is to undo: by what the experts are now, whatever they were loaded from.

    Args:
        model: about to be saved.
        loaded: what the loader used, or None. Its renamings (the user's `key_mapping`, the library's) are kept, but
            for those that only reading needs.
    """
    reading = {_patterns(entry) for entry in renamings_for_loading()}
    kept = [entry for entry in loaded or [] if type(entry) is not PlainNames and not _is_of_experts(entry)]
    kept = [entry for entry in kept if _patterns(entry) not in reading]
    return experts_conversions(model, released_layout_conversions) + kept + plain_names(model)


def _is_of_experts(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and any("block_sparse_moe.experts" in x for x in entry.target_patterns)


def _updated(conversions: list[Any], hf_quantizer: Any, model: Any) -> list[Any]:
    update = hf_quantizer.update_weight_conversions
    return update(conversions, model) if "model" in inspect.signature(update).parameters else update(conversions)


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
    "conversions_for_saving",
    "damaged_file_error",
    "released_layout_conversions",
    "renamings_for_loading",
]
