"""`from_pretrained` and `save_pretrained` of the released layout, in a mixin before transformers' own."""

import dataclasses
from typing import Any

from safetensors import SafetensorError
from transformers.modeling_utils import PreTrainedModel

from .conversions import check_experts_were_read, conversions_for_loading, damaged_file_error, with_released_layout
from .saving import released_on_disk, write_code


class ReleasedCheckpointMixin:
    """Loads the released layout, or ends with an error that names what it cannot read; saves the same layout."""

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **kwargs: Any):
        mapping = conversions_for_loading(load_config.weight_mapping, load_config.hf_quantizer, model)
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        try:
            loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)
        except SafetensorError as error:
            raise damaged_file_error(checkpoint_files, error) from error
        check_experts_were_read(loaded[0], model.config.num_hidden_layers)
        model._weight_conversions = with_released_layout(model._weight_conversions)
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
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            write_code(self, save_directory)
        with released_on_disk(self, state_dict) as released:
            super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=released, **kwargs)


__all__ = ["ReleasedCheckpointMixin"]
