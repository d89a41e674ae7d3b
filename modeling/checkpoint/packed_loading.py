"""Quantised checkpoints: packed modules in place of dense ones, and a look at what they read.

A model is packed when it is built, so that `device_map="auto"` counts packed bytes. Before the weights are read their
headers are compared with what the config says; after it the values are looked at.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ...kernels.weights.formats import WeightFormat
from ..layers.moe import KimiExperts, KimiSparseMoeBlock
from .packed_dequantise import settle_dequantisation
from .packed_modules import KimiPackedExperts, KimiPackedLinear
from .packed_names import experts_are_dense, packed_modules, released_name
from .packed_state_dict import adopt
from .packing_on_load import experts_format
from .refusals import read_headers, refuse_unannounced
from .schemes import PACKED_METHODS, Schemes, quantization_fields

logger = logging.get_logger(__name__)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


# Building


def pack_modules(model: Any) -> None:
    """Replace the layers that `config.quantization_config` calls quantised by packed ones; others stay.

    Runs at the end of every `__init__`, and again once transformers' quantizer has replaced modules of its own.

    Raises:
        ValueError: for a config that cannot be read; the message names the field.
    """
    fields = quantization_fields(model.config)
    if fields is None or fields["quant_method"] not in PACKED_METHODS:
        _pack_experts_alone(model, experts_format(model.config, fields))
        return
    schemes = Schemes(fields)
    for name, module in list(model.named_modules()):
        if isinstance(module, KimiSparseMoeBlock):
            _pack_experts(module, _released(model, f"{name}.experts"), schemes, model)
        elif isinstance(module, nn.Linear) and not isinstance(module, KimiPackedLinear):
            released = _released(model, name)
            # Heads of other tasks (`score`) are not in the checkpoint.
            format = schemes.format_of(released) if released.startswith(("model.", "lm_head")) else None
            sizes = module.in_features, module.out_features
            if format is not None:
                model.set_submodule(name, KimiPackedLinear(*sizes, format, model.dtype, model.device))
            elif type(module) is not nn.Linear or hasattr(module, "quantization_scheme"):
                # The quantizer goes by names in the model, where the decoder on its own lacks the prefix.
                plain = nn.Linear(*sizes, bias=False, dtype=model.dtype, device=model.device)
                model.set_submodule(name, plain)
    # The exact path reads which experts were chosen back from the device.
    model._can_compile_fullgraph = not any(isinstance(module, KimiPackedExperts) for module in model.modules())


def _pack_experts_alone(model: Any, format: WeightFormat | None) -> None:
    """Give all experts one format, for checkpoints whose linear layers are dense or the library's."""
    if format is None:
        return
    formats = {"gate_up_proj": format, "down_proj": format}
    for module in model.modules():
        if isinstance(module, KimiSparseMoeBlock) and isinstance(module.experts, KimiExperts):
            module.experts = _packed_like(model, formats)
            model._can_compile_fullgraph = False


def _packed_like(model: Any, formats: dict[str, WeightFormat]) -> KimiPackedExperts:
    config = model.config
    sizes = config.num_experts, config.hidden_size, config.moe_intermediate_size
    return KimiPackedExperts(*sizes, formats, model.dtype, model.device)


def _pack_experts(block: KimiSparseMoeBlock, name: str, schemes: Schemes, model: Any) -> None:
    experts, config = block.experts, model.config
    if isinstance(experts, KimiPackedExperts):
        return
    formats = {}
    for projection in ("gate_up_proj", "down_proj"):
        leaves = KimiPackedExperts.leaves(projection)
        names = [f"{name}.{expert}.{leaf}" for expert in range(config.num_experts) for leaf in leaves]
        formats[projection] = schemes.format_of_all(names)
    if not any(formats.values()):
        if not isinstance(experts, KimiExperts):  # transformers' FP8 quantizer has replaced them
            with model.device:
                block.experts = KimiExperts(config).to(model.dtype)
        return
    if not all(formats.values()):
        raise ValueError(
            f"quantization_config quantises only some of w1, w3 and w2 in {name}: this package holds all or none packed"
        )
    block.experts = _packed_like(model, formats)


def _released(model: Any, name: str) -> str:
    """Released name of a module: the decoder on its own lacks the prefix."""
    return name if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}.{name}"


# Loading


def prepare_packed(model: Any, files: list[str] | None, load_config: Any) -> None:
    """Compare the checkpoint's headers with what the model is going to read, and make room for its dtypes.

    Raises:
        ValueError: for a tensor of a wrong shape or dtype, and for quantised tensors that nobody would read; the
            message names tensor and rule.
        NotImplementedError: for tensor parallelism.
    """
    modules = packed_modules(model)
    if modules and load_config.device_mesh is not None:
        raise NotImplementedError(
            "quantised checkpoints cannot be loaded with tensor parallelism: packed weights have no plan for cutting "
            "groups. Leave tp_plan and distributed_config out, and use device_map"
        )
    header = read_headers(files)
    names = {released_name(name): name for name in header}
    understood, dense_experts = set(), bool(model.config.packed_experts) and experts_are_dense(header)
    for name, module in modules.items():
        released = _released(model, name)
        adopted = set()
        for place in module.places():
            full = f"{released}.{place.released}"
            key = names.get(full) or names.get(full.removeprefix(f"{model.base_model_prefix}."))
            if key is None or (dense_experts and isinstance(module, KimiPackedExperts)):
                continue
            understood.add(key)
            shape, dtype = header[key]
            if (place.attribute, shape, dtype) not in adopted:
                adopt(module, place, shape, _DTYPES.get(dtype, torch.bool), key)
                adopted.add((place.attribute, shape, dtype))
    if not _is_library_s(model):  # bitsandbytes and torchao have tensors of their own
        refuse_unannounced({name: held for name, held in header.items() if _is_of(model, name)}, understood)


def _is_of(model: Any, name: str) -> bool:
    """Whether a tensor belongs to a layer that the model has: `num_hidden_layers` may leave out the last ones."""
    layer = _LAYER.search(name)
    return layer is None or int(layer[1]) < model.config.num_hidden_layers


def _is_library_s(model: Any) -> bool:
    fields = quantization_fields(model.config)
    return fields is not None and fields["quant_method"] not in PACKED_METHODS


def finish_packed(
    model: Any, load_config: Any, missing: set[str], disk_index: dict[str, dict[str, Any]] | None = None
) -> None:
    """Freeze packed weights, look at their values, and take compressed-tensors' hook off the model.

    Args:
        model: as loaded.
        load_config: transformers' own.
        missing: names that found no tensor.
        disk_index: where weights that are offloaded to disk are; corrected.

    Raises:
        ValueError: for missing tensors, and for scales or shapes that cannot be right; the message names the tensor.
    """
    modules = packed_modules(model)
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        _check_complete(model, name, module, missing)
        _check_values(_released(model, name), module)
    quantizer = load_config.hf_quantizer
    _keep_dtypes_on_disk(model, disk_index or {})
    if hasattr(model, "ct_decompress_hook"):
        # compressed-tensors would unpack what it had packed at the first forward. It has packed nothing here.
        quantizer.compressor.remove_decompression_hook(model)
    if modules and quantizer is not None and not _is_library_s(model):
        settle_dequantisation(model, quantizer)


def _keep_dtypes_on_disk(model: Any, disk_index: dict[str, dict[str, Any]]) -> None:
    """Have packed weights and decays read back in their own dtypes: transformers 5.10 casts all to the model's."""
    own = {
        f"{name}.{attribute}": getattr(module, attribute).dtype
        for name, module in packed_modules(model).items()
        for attribute in {place.attribute for place in module.places()}
    }
    for name, entry in disk_index.items():
        dtype = torch.float32 if name.endswith(("A_log", "dt_bias")) else own.get(name)
        if dtype is not None and "dtype" in entry:
            entry["dtype"] = str(dtype).removeprefix("torch.")


def _check_complete(model: Any, name: str, module: Any, missing: set[str]) -> None:
    for place in module.places():
        if f"{name}.{place.attribute}" in missing:
            raise ValueError(
                f"the checkpoint lacks {_released(model, name)}.{place.released}, though its quantization_config says "
                f"that the layer is quantised ({module.extra_repr()}); add the layer to the config's ignore list "
                "(modules_to_not_convert for fp8) if its weight is stored unquantised"
            )


def _check_values(released: str, module: Any) -> None:
    """Scales are finite, and shapes are those of the layer. Tensors that are offloaded have been left on disk."""
    wrong = {}
    for place in module.places():
        if place.attribute in wrong:
            continue
        held = getattr(module, place.attribute)
        if held.is_meta or place.name in ("packed", "zero_point"):
            wrong[place.attribute] = False
        elif place.name == "shape":
            format = module.formats[place.projection] if place.projection else module.format
            wrong[place.attribute] = _first_wrong_shape(released, module, place.attribute, format)
        else:
            wrong[place.attribute] = not bool(_finite(held))
    for place in module.places():
        if wrong[place.attribute] and not bool(_finite(module.room(place))):
            raise ValueError(
                f"{released}.{place.released} is damaged: a scale of a quantised weight is NaN or infinite. Download "
                "the file again, or quantise the layer again"
            )


def _finite(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.uint8:
        return (values != 255).all()
    return values.float().isfinite().all()


def _first_wrong_shape(released: str, module: Any, attribute: str, format: Any) -> bool:
    held = getattr(module, attribute)
    places = [place for place in module.places() if place.attribute == attribute]
    sizes = module.shape_of(places[0].projection) if places[0].projection else (module.out_features, module.in_features)
    if bool((held == torch.tensor(sizes, device=held.device)).all()):
        return False
    for place in places:
        said = module.room(place).tolist()
        if said != list(sizes):
            raise ValueError(
                f"{released}.{place.released} says {said}, but the layer, quantised as {format.name}, is {list(sizes)}"
            )
    return False


__all__ = ["finish_packed", "pack_modules", "prepare_packed"]
