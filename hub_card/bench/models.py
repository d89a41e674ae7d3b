"""The models that are measured: a folder's or random ones, on one GPU, spread over several, or on a CPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...modeling.checkpoint.schemes import quantization_fields
from ...modeling.modeling_kimi_linear import KimiLinearForCausalLM
from ..hub_files import read_config
from ..measure.expect import bf16_bytes
from ..measure.machine import Machine
from ..measure.random_models import empty_model, native_class, native_config, random_model
from ..measure.shapes import first_layers, with_mla_everywhere
from ..weight_files import find_weights

_GIB = 2**30
# Of a GPU's memory, what a spread model's weights may take: caches and scratch need the rest.
_WEIGHTS_SHARE = 0.85
# Layers of ours and of the native class, which a spread model keeps whole.
_BLOCKS = ["KimiDecoderLayer", "KimiLinearDecoderLayer"]
NAMES = {"ours": "ours", "all_mla": "MLA in every layer", "native": "transformers' own class"}


@dataclass(frozen=True)
class Source:
    """Where models come from.

    Args:
        config: of our model.
        folder: its weights, or None for random ones.
        weights: bytes of the folder's files, or of the bf16 weights of `config`.
    """

    config: KimiLinearConfig
    folder: Path | None
    weights: int

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are stored in fewer bits than bf16."""
        return quantization_fields(self.config) is not None

    def config_of(self, model: str) -> KimiLinearConfig:
        """The config of one of the models; with MLA everywhere it is unquantised, for its weights are random."""
        if model != "all_mla":
            return self.config
        config = with_mla_everywhere(self.config)
        if self.is_quantised:
            del config.quantization_config
        return config

    def weights_of(self, model: str) -> int:
        """Bytes of a model's weights."""
        return bf16_bytes(self.config_of(model)) if model == "all_mla" else self.weights

    def why_not(self, model: str) -> str | None:
        """Why a model can't be measured here, or None."""
        if model != "native":
            return None
        try:
            native_class()
        except ValueError as error:
            return str(error)
        if self.is_quantised:
            return "transformers' own class doesn't keep quantised experts; give a bf16 folder to compare with it"
        return None


def find_source(folder: Path | None, config: Path | None, layers: int | None) -> Source:
    """What the arguments name; with neither folder nor config, the released shape.

    Raises:
        ValueError: naming the argument and what to do.
    """
    if folder is not None:
        if layers is not None:
            raise ValueError("--layers goes with random weights: leave FOLDER out and give --config FOLDER/config.json")
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give one with config.json and weights, or --config FILE")
        found, _ = read_config(folder / "config.json")
        return Source(found, folder, sum(file.size for file in find_weights(folder)))
    found = KimiLinearConfig() if config is None else read_config(config)[0]
    if quantization_fields(found) is not None:
        raise ValueError(
            f"{config} describes quantised weights, which can't be drawn: give the folder with them, or take "
            "quantization_config out of the file"
        )
    if layers is not None:
        found = first_layers(found, layers)
    return Source(found, None, bf16_bytes(found))


def make_model(source: Source, name: str, machine: Machine) -> torch.nn.Module:
    """One of the models, in evaluation mode.

    Raises:
        ValueError: if random weights don't fit; the message says how many layers do.
    """
    if source.folder is not None and name != "all_mla":
        model_class = KimiLinearForCausalLM if name == "ours" else native_class()
        place: Any = "auto" if machine.kind == "cuda" else {"": "cpu"}
        return model_class.from_pretrained(source.folder, dtype="auto", device_map=place).eval().requires_grad_(False)
    config = source.config_of(name)
    model_class, own = KimiLinearForCausalLM, config
    if name == "native":
        model_class, own = native_class(), native_config(config)
    return random_model(model_class, own, _place(model_class, own, machine, bf16_bytes(config)))


def _place(model_class: Any, config: Any, machine: Machine, weights: int) -> Any:
    """A device, or a device map where one GPU doesn't hold the weights."""
    check_room(weights, machine, config.num_hidden_layers)
    if machine.kind == "cpu":
        return "cpu"
    room = [int(memory * _WEIGHTS_SHARE) for memory in machine.memory]
    if weights <= room[0]:
        return "cuda:0"
    from accelerate import infer_auto_device_map

    skeleton = empty_model(model_class, config)
    even = int(weights / len(room) * 1.08)
    shares = {index: min(memory, even) for index, memory in enumerate(room)}
    shares[len(room) - 1] = room[-1]
    return infer_auto_device_map(skeleton, max_memory=shares, no_split_module_classes=_BLOCKS, dtype=torch.bfloat16)


def check_room(weights: int, machine: Machine, layers: int) -> None:
    """Raise ValueError, with what would fit, if the machine can't hold the weights."""
    room = sum(machine.memory) * (_WEIGHTS_SHARE if machine.kind == "cuda" else 1.0)
    if weights > room:
        fitting = int(layers * room / weights)
        count = len(machine.memory)
        where = f"{count} GPU{'s have' if count > 1 else ' has'}" if machine.kind == "cuda" else "main memory has"
        advice = f"--layers {fitting} would fit" if fitting else "a smaller config is needed"
        raise ValueError(
            f"random weights of {layers} layers take {weights / _GIB:.1f} GiB, and {where} {room / _GIB:.1f} GiB for "
            f"them: {advice}"
        )


__all__ = ["NAMES", "Source", "check_room", "find_source", "make_model"]
