"""Quantised checkpoints that cannot be loaded right are refused before any weight is read, with what to do instead.

transformers would load most of them: it replaces the linear layers, and the experts, 96% of the released weights, stay
at random values. Others (ModelOpt) it takes for unquantised ones, whose scales nobody reads.
"""

from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .schemes import PACKED_METHODS, method_of

_LIBRARY_METHODS = ("bitsandbytes", "torchao")
_SERVED = "serve the file with vLLM, or load the bf16 checkpoint, if need be with a bitsandbytes or torchao config"
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "modelopt": "ModelOpt", "mlx": "MLX", "gguf": "GGUF", "mxfp4": "MXFP4"}
_ADVICE = {
    "gptq": f"{_SERVED}; llm-compressor's GPTQModifier writes compressed-tensors `pack-quantized`, which is read",
    "awq": f"{_SERVED}; llm-compressor's AWQModifier writes compressed-tensors `pack-quantized`, which is read",
    "modelopt": f"{_SERVED}; llm-compressor's FP8_DYNAMIC and NVFP4 write compressed-tensors, which is read",
    "mlx": "run the file with mlx-lm, or load the bf16 checkpoint",
    "gguf": "run the file with llama.cpp, or load the bf16 checkpoint",
}
# Endings of tensor names that only quantised files have, and the dtypes of their numbers.
_ENDINGS = (
    ".qweight", ".qzeros", ".scales", ".biases", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_scale_2", ".weight_global_scale", ".weight_zero_point", ".input_scale", ".weight_blocks", ".weight_scales",
)  # fmt: skip
_DTYPES = ("F8_E4M3", "F8_E5M2", "F4", "U8", "I8")

Header = dict[str, tuple[tuple[int, ...], str]]


def refuse_method(fields: dict[str, Any], source: str) -> None:
    """Raise ValueError unless the method of a `quantization_config` is one that loads right.

    Args:
        fields: of the quantization config.
        source: where it stands, for the message.
    """
    method = method_of(fields)
    if method in PACKED_METHODS or method in _LIBRARY_METHODS:
        return
    if not method and "bits" in fields and "group_size" in fields:
        method = "mlx"
    name = _NAMES.get(method, repr(method) if method else "none that is named")
    raise ValueError(
        f"{source}: the quantisation method is {name}, which Kimi Linear's experts cannot be loaded from (quant_method="
        f"{fields.get('quant_method')!r}): {_ADVICE.get(method, _SERVED)}. What loads: compressed-tensors "
        "(pack-quantized, float-quantized, int-quantized, nvfp4, mxfp4), fp8 (FineGrainedFP8Config), and bf16 files "
        "with a bitsandbytes or torchao config"
    )


def refuse_unreadable(name_or_path: Any, config: Any, options: dict[str, Any]) -> None:
    """Refuse what `from_pretrained` is about to load, going by its config and the names of its files.

    Args:
        name_or_path: first argument of `from_pretrained`.
        config: its `config`, if it was given as an object.
        options: its keyword arguments.

    Raises:
        ValueError: naming the format and what to do.
    """
    if options.get("gguf_file") is not None:
        raise ValueError(f"gguf_file={options['gguf_file']!r}: the quantisation is GGUF's: {_ADVICE['gguf']}")
    given = options.get("quantization_config")
    if given is not None:
        refuse_method(given if isinstance(given, dict) else given.to_dict(), "quantization_config")
    if hasattr(config, "to_dict"):
        fields = {name: getattr(config, name, None) for name in ("quantization_config", "quantization")}
    else:
        fields = _read_json(name_or_path if config is None else config, "config.json", options)
    for name in ("quantization_config", "quantization"):
        found = fields.get(name)
        if found is not None:
            found = found if isinstance(found, dict) else found.to_dict()
            refuse_method(found, f"{name} of {name_or_path}")
            if method_of(found) == "fp8" and transformers.__version__.startswith("5.16."):
                raise ValueError(
                    f"transformers {transformers.__version__} fails on fp8 quantisation (FineGrainedFP8Config) of "
                    "models that it doesn't know itself; use an older one or 5.20 and later"
                )
    if fields.get("quantization_config") is None:
        if given is not None and method_of(given if isinstance(given, dict) else given.to_dict()) in PACKED_METHODS:
            raise ValueError(
                f"quantization_config={type(given).__name__}: this package reads files quantised so, and "
                f"{name_or_path} is not one; to quantise while loading give a bitsandbytes or torchao config"
            )
        _refuse_side_files(name_or_path, options)


def _refuse_side_files(name_or_path: Any, options: dict[str, Any]) -> None:
    """ModelOpt may say what it did in a file of its own."""
    if name_or_path is None:
        return
    aside = _read_json(name_or_path, "hf_quant_config.json", options).get("quantization")
    if isinstance(aside, dict) and (aside.get("quant_algo") or aside.get("kv_cache_quant_algo")):
        refuse_method({"quant_method": "modelopt", **aside}, f"hf_quant_config.json of {name_or_path}")


def _read_json(name_or_path: Any, file: str, options: dict[str, Any]) -> dict[str, Any]:
    """A JSON file of a model folder or Hub repository; {} if there is none, which the library then says better."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    passed = {name: options[name] for name in names if options.get(name) is not None}
    try:
        return PreTrainedConfig.get_config_dict(name_or_path, _configuration_file=file, **passed)[0]
    except (OSError, ValueError):
        return {}


def read_headers(files: list[str] | None) -> Header:
    """Shape and dtype (as safetensors names it) of every tensor in safetensors files; files of other kinds say nothing.

    Damaged files are left to the loader, which names them.
    """
    found: Header = {}
    for file in files or []:
        if not str(file).endswith(".safetensors"):
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    held = tensors.get_slice(name)
                    found[name] = tuple(held.get_shape()), held.get_dtype()
        except (SafetensorError, OSError):
            continue
    return found


def refuse_unannounced(header: Header, understood: set[str]) -> None:
    """Raise ValueError for quantised tensors that the config doesn't tell of.

    Args:
        header: of the checkpoint.
        understood: names that quantised layers of the model read.
    """
    for name, (shape, dtype) in header.items():
        if name not in understood and (name.endswith(_ENDINGS) or (dtype in _DTYPES and len(shape) == 2)):
            raise ValueError(
                f"{name} ({dtype}, {list(shape)}) is a quantised tensor, but the quantization_config of the checkpoint "
                f"doesn't say how its layer is quantised, so nobody would read it: {_SERVED}"
            )


def refuse_saving(model: nn.Module) -> None:
    """Raise NotImplementedError for weights that would be saved wrong.

    bitsandbytes reorders 4-bit weights at their first forward on a CPU, and undoes it only nearly.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise NotImplementedError(
                f"{name} holds bitsandbytes' 4-bit quantised weights in the order of its CPU kernel, which it cannot "
                "save exactly: save the model before its first forward, or on a GPU"
            )


__all__ = ["Header", "read_headers", "refuse_method", "refuse_saving", "refuse_unannounced", "refuse_unreadable"]
