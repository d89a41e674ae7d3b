"""Copies of a cache: in memory, to go back to, and in a safetensors file, to start from in another process.

A file holds, per layer i, `layers.{i}.state` [B, H, K, V] and `layers.{i}.window` [B, 3 H K, W - 1] (KDA) or
`layers.{i}.rows` [B, L, kv_lora_rank + qk_rope_head_dim] (MLA), and metadata: the format and its version, the shape
of the model, a digest of its decay parameters, the number of tokens, and a digest of the tensors.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .recording import KDAStepWeights

FORMAT = "kimi_linear_cache"
FORMAT_VERSION = "1"
_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "layer_types",
    "linear_num_heads",
    "linear_head_dim",
    "linear_conv_kernel_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
)


def model_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """What a cache depends on in a config; caches of models that differ in it don't fit each other."""
    config = config.get_text_config(decoder=True)
    shape = {name: getattr(config, name, None) for name in _SHAPE_FIELDS}
    return {**shape, "layer_types": list(config.layer_types)[: config.num_hidden_layers]}


def check_same_shape(theirs: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    """Raise ValueError unless two `model_shape`s are the same."""
    wrong = [name for name in ours if theirs.get(name) != ours[name]]
    if wrong:
        raise ValueError(
            f"{what} was made by another model: {wrong[0]} is {theirs.get(wrong[0])} there and {ours[wrong[0]]} here"
        )


@dataclass(frozen=True)
class CacheSnapshot:
    """A copy of what a cache held at some point: `cache.snapshot()` makes it, `cache.restore(snapshot)` goes back.

    Attributes:
        shape: `model_shape` of the cache's config.
        seen_tokens: positions it held, padding included.
        layers: for each layer {"window", "state"} or {"rows"}; empty where the layer was.
        weights: for each layer, those of the KDA layer that filled it, or None.
    """

    shape: dict[str, Any]
    seen_tokens: int
    layers: list[dict[str, torch.Tensor]]
    weights: list[KDAStepWeights | None] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a model by layer index."""
    return {module.layer_idx: module for module in model.modules() if hasattr(module, "layer_idx")}


def digest_of_decays(weights: list[KDAStepWeights | None]) -> str:
    """SHA-256 over the A_log of every KDA layer: tells checkpoints of one shape apart; fp32 in any model dtype."""
    digest = hashlib.sha256()
    for held in weights:
        digest.update(b"-" if held is None else _bytes_of(held.A_log.float()))
    return digest.hexdigest()


def save_snapshot(path: Any, snapshot: CacheSnapshot) -> None:
    """Write a snapshot to a safetensors file at `path`, the only file that our code ever writes by itself."""
    tensors = {
        f"layers.{i}.{name}": tensor.contiguous()
        for i, layer in enumerate(snapshot.layers)
        for name, tensor in layer.items()
    }
    if not tensors:
        raise ValueError("an empty cache can't be saved; run a prompt through the model first")
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": json.dumps(snapshot.shape),
        "decays": digest_of_decays(snapshot.weights),
        "seen_tokens": str(snapshot.seen_tokens),
        "tensors": _digest_of_tensors(tensors),
    }
    save_file(tensors, path, metadata=metadata)


def load_snapshot(path: Any, shape: dict[str, Any], weights: list[KDAStepWeights | None]) -> CacheSnapshot:
    """Read a snapshot that `save_snapshot` wrote, on the CPU.

    Args:
        path: the file.
        shape: `model_shape` of the model that shall continue from it.
        weights: of each KDA layer of that model, None for MLA layers.

    Raises:
        ValueError: if the file is damaged, of another format or version, or was made by another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file or a damaged one ({error}); save it again") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no cache that KimiLinearCache.save wrote")
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('version')!r} and this code reads {FORMAT_VERSION!r}; "
            "save the cache again"
        )
    if metadata.get("tensors") != _digest_of_tensors(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not those that were saved; save it again")
    check_same_shape(json.loads(metadata["model"]), shape, str(path))
    if metadata["decays"] != digest_of_decays(weights):
        raise ValueError(
            f"{path} was made by another model of the same shape: the decay rates (A_log) differ; "
            "caches fit the checkpoint that made them only"
        )
    layers = [{} for _ in shape["layer_types"]]
    for name, tensor in tensors.items():
        _, i, kind = name.split(".")
        layers[int(i)][kind] = tensor
    return CacheSnapshot(shape, int(metadata["seen_tokens"]), layers, weights)


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a tensor as a byte array."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _digest_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(_bytes_of(tensors[name]))
    return digest.hexdigest()


__all__ = [
    "CacheSnapshot",
    "attention_layers",
    "check_same_shape",
    "load_snapshot",
    "model_shape",
    "save_snapshot",
]
