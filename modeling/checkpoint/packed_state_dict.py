"""`load_state_dict` of packed modules: released names are read, and the shapes and dtypes of scales that a file has.

Trainer's resume and accelerate's loaders without a device map end in `Module.load_state_dict`, which knows nothing of
transformers' conversions.
"""

from typing import Any

import torch
from torch import nn

from ...kernels.weights.formats import FLOATS


def adopt(module: Any, place: Any, shape: tuple[int, ...], dtype: torch.dtype, source: str) -> None:
    """Make the room of a tensor fit what a file has, if the format allows that.

    Args:
        module: a packed module.
        place: one of its `places()`.
        shape, dtype: of the file's tensor.
        source: full name of the tensor, for the message.

    Raises:
        ValueError: naming tensor and rule.
    """
    if tuple(shape) not in place.shapes or dtype not in place.dtypes:
        wanted = " or ".join(str(list(allowed)) for allowed in place.shapes)
        dtypes = " or ".join(str(allowed).removeprefix("torch.") for allowed in place.dtypes)
        format = module.formats[place.projection] if place.projection else module.format
        plain = place.name == "packed" and dtype in FLOATS
        hint = "; if the layer is stored unquantised, add it to ignore (fp8: modules_to_not_convert)" if plain else ""
        raise ValueError(
            f"{source} is {list(shape)} of {str(dtype).removeprefix('torch.')}, but a weight quantised as "
            f"{format.name} needs {wanted} of {dtypes}{hint}"
        )
    room = module.room(place)
    if tuple(room.shape) != tuple(shape) or room.dtype != dtype:
        module.make_room(place, tuple(shape), dtype, room.device)


def read_released_tensors(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Pre-hook for `register_load_state_dict_pre_hook` of a packed module; torch's arguments.

    Tensors may arrive over several calls, as shards do. What has not arrived yet is reported as missing.
    """
    places = {place.released: place for place in module.places()}
    found: dict[str, list[tuple[Any, torch.Tensor]]] = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        place = places.get(rest)
        if place is None:
            if rest.partition(".")[0].isdigit():
                error_msgs.append(f"nobody reads {key}: the module holds packed experts, {module.extra_repr()}")
                del state_dict[key]
            continue
        tensor = state_dict.pop(key)
        try:
            adopt(module, place, tuple(tensor.shape), tensor.dtype, key)
            found.setdefault(place.attribute, []).append((place, tensor))
        except ValueError as error:
            error_msgs.append(str(error))
    arrived = module.__dict__.setdefault("_places_arrived", set())
    for attribute, tensors in found.items():
        if arrived & {place.released for place, _ in tensors}:
            arrived.clear()  # another load has begun
        _fill(module, attribute, tensors)
        state_dict[prefix + attribute] = getattr(module, attribute).detach()
        arrived |= {place.released for place, _ in tensors}
        wanted = {name for name, place in places.items() if place.attribute == attribute}
        missing_keys += sorted(prefix + name for name in wanted - arrived)
        if wanted <= arrived:
            arrived -= wanted


def _fill(module: Any, attribute: str, tensors: list[tuple[Any, torch.Tensor]]) -> None:
    """Copy tensors into their attribute, which is made first if it is on meta."""
    if getattr(module, attribute).is_meta:
        place, tensor = tensors[0]
        module.make_room(place, tuple(tensor.shape), tensor.dtype, tensor.device)
    with torch.no_grad():
        for place, tensor in tensors:
            module.room(place).copy_(tensor)


__all__ = ["adopt", "read_released_tensors"]
