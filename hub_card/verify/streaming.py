"""A model whose layers are read from disk one at a time: a pass over a prompt needs memory for one layer only.

At the released shape that is 3.7 GB for a layer with its experts, as much again for what it is compared with, and 1.5
GB for embedding and output layer. The arithmetic is the model's own: hooks on its layers read the weights before a
layer computes and drop them after it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...modeling.checkpoint.packed_modules import KimiPackedExperts, KimiPackedLinear
from ...modeling.modeling_kimi_linear import KimiLinearForCausalLM
from .layout import StoredTensor

Tensors = dict[str, torch.Tensor]
# Called with (index, layer, its input [B, T, D], its output, its tensors by released name).
Watcher = Callable[[int, nn.Module, torch.Tensor, torch.Tensor, Tensors], None]


def model_dtype(config: KimiLinearConfig) -> torch.dtype:
    """The dtype that the config gives its weights."""
    given = config.dtype or "bfloat16"
    return given if isinstance(given, torch.dtype) else getattr(torch, given)


class TensorFiles:
    """Reads tensors by name; files stay open, and their tensors are views of the mapped file."""

    def __init__(self, stored: dict[str, StoredTensor]) -> None:
        self._stored = stored
        self._open: dict[Path, Any] = {}

    def below(self, prefix: str) -> Tensors:
        """All tensors whose names begin with `prefix`, by the rest of their names."""
        return {name[len(prefix) :]: self._read(name) for name in self._stored if name.startswith(prefix)}

    def _read(self, name: str) -> torch.Tensor:
        file = self._stored[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(name)


class StreamedModel:
    """`KimiLinearForCausalLM` with embedding, final norm and output layer in memory and layers on disk.

    Args:
        config: of the folder, quantised or not.
        stored: what the folder's files hold, as `check_layout` found it to be right.
        device: where each layer computes.
    """

    def __init__(self, config: KimiLinearConfig, stored: dict[str, StoredTensor], device: str) -> None:
        self.config, self.device, self.files = config, device, TensorFiles(stored)
        self.dtype = dtype = model_dtype(config)
        with torch.device("meta"):
            self.model = KimiLinearForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
        for name, module in (
            ("model.embed_tokens", self.model.model.embed_tokens),
            ("model.norm", self.model.model.norm),
        ):
            _fill(module, self.files.below(f"{name}."), device)
        if config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
        else:
            _fill(self.model.lm_head, self.files.below("lm_head."), device)
        self._tensors: Tensors = {}

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, watch: Watcher) -> torch.Tensor:
        """Logits [B, T, vocab_size] of one pass; `watch` sees each layer before its weights go."""
        handles = []
        for index, layer in enumerate(self.model.model.layers):
            handles.append(layer.register_forward_pre_hook(self._reader(index)))
            handles.append(layer.register_forward_hook(self._dropper(index, watch)))
        try:
            return self.model(input_ids.to(self.device), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    def _reader(self, index: int) -> Callable[..., None]:
        def read(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._tensors = self.files.below(f"model.layers.{index}.")
            _fill(layer, self._tensors, self.device)

        return read

    def _dropper(self, index: int, watch: Watcher) -> Callable[..., None]:
        def drop(layer: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            watch(index, layer, arguments[0], output, self._tensors)
            self._tensors = {}
            layer.to("meta")

        return drop


def _fill(module: nn.Module, tensors: Tensors, device: str) -> None:
    """Give a module on meta storage and its tensors, by released name."""
    module.to_empty(device=device)
    module.load_state_dict(tensors, strict=True)


def dense_tensors(layer: Any, tensors: Tensors) -> Tensors:
    """A layer's tensors by released name with packed weights dequantised; what isn't packed is that of `tensors`."""
    dense: Tensors = {}
    packed: set[str] = set()
    for name, module in layer.named_modules():
        if isinstance(module, KimiPackedLinear):
            dense[f"{name}.weight"] = module.handle().dequantize(module.dense_dtype)
            packed |= {f"{name}.{place.released}" for place in module.places()}
        elif isinstance(module, KimiPackedExperts):
            for projection in module.formats:
                for index, leaf in enumerate(module.leaves(projection)):
                    for expert in range(module.num_experts):
                        handle = module.handle(projection, expert, index)
                        dense[f"{name}.{expert}.{leaf}.weight"] = handle.dequantize(layer.input_layernorm.weight.dtype)
            packed |= {f"{name}.{place.released}" for place in module.places()}
    return {**{name: tensor for name, tensor in tensors.items() if name not in packed}, **dense}


__all__ = ["StreamedModel", "TensorFiles", "Tensors", "dense_tensors", "model_dtype"]
