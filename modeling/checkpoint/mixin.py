"""`from_pretrained` and `save_pretrained` of the released layout, in a mixin before transformers' own."""

import dataclasses
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.modeling_utils import PreTrainedModel

from ..placement import check_device_map, take_hooks_off_layers
from .conversions import (
    check_experts_were_read,
    conversions_for_loading,
    conversions_for_saving,
    damaged_file_error,
)
from .packed_dequantise import asking
from .packed_loading import finish_packed, pack_modules, prepare_packed
from .refusals import refuse_saving, refuse_unreadable
from .saving import released_on_disk, write_code


class ReleasedCheckpointMixin:
    """Loads the released layout, or ends with an error that names what it cannot read; saves the same layout."""

    def post_init(self) -> None:
        """As transformers', over packed modules where the config says that the checkpoint is quantised."""
        pack_modules(self)
        super().post_init()

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        pack_modules(self)  # again: transformers' FP8 quantizer replaces every module that is called `experts`
        return super()._get_dtype_plan(dtype)

    @property
    def _weight_conversions(self) -> list[Any]:
        """What save_pretrained undoes. Loaders set it; transformers deletes it when it dequantises a model."""
        return conversions_for_saving(self, self.__dict__.get("_conversions_of_the_loader"))

    @_weight_conversions.setter
    def _weight_conversions(self, loaded: list[Any] | None) -> None:
        self.__dict__["_conversions_of_the_loader"] = loaded

    @_weight_conversions.deleter
    def _weight_conversions(self) -> None:
        self.__dict__.pop("_conversions_of_the_loader", None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any):
        """As transformers', but quantised files that would load wrong are refused before a weight is read.

        Of a model that is spread over devices the hooks inside decoder layers are taken off (see placement.py).

        Raises:
            ValueError: for such files, and for a device map that splits a decoder layer or leaves modules out.
        """
        refuse_unreadable(pretrained_model_name_or_path, config, kwargs)
        with asking(kwargs):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        take_hooks_off_layers(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **kwargs: Any):
        if load_config.device_map:
            check_device_map(model, load_config.device_map)
        mapping = conversions_for_loading(load_config.weight_mapping, load_config.hf_quantizer, model, checkpoint_files)
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        prepare_packed(model, checkpoint_files, load_config)
        try:
            loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)
        except SafetensorError as error:
            raise damaged_file_error(checkpoint_files, error) from error
        finish_packed(model, load_config, loaded[0].missing_keys, loaded[1])
        if checkpoint_files or state_dict:  # with nothing to read at all, random weights are what was asked for
            check_experts_were_read(loaded[0], model.config.num_hidden_layers)
        return loaded

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers' own, in the released layout, with the code that reads the folder.

        Args:
            save_directory: the folder to write, a path or its text.
            is_main_process: whether this process writes what is the same on all.
            state_dict: what to save in place of the model's own tensors.
            kwargs: transformers' own.
        """
        refuse_saving(self)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            write_code(self, save_directory)
        with released_on_disk(self, state_dict) as released:
            super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=released, **kwargs)


__all__ = ["ReleasedCheckpointMixin"]
