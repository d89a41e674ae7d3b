"""What `save_pretrained` writes: the released names and dtypes, whatever hangs on the model in memory."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Experts that were taken apart (llm-compressor does) and the released names of their projections.
_APART = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.")
_RELEASED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class CodeFiles:
    """How the installed package writes a folder's code; a Hub folder has no `writer`, transformers copies its files."""

    writer: Callable[[Any], dict[str, str]] | None = None


def to_released(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give a model's state its released names and dtypes, in place; stacked experts are left to the conversions.

    Correction biases are fp32 in memory. They are saved in `dtype`, as released, unless that would round them.
    """
    for name in list(state_dict):
        tensor = state_dict.pop(name)
        if name.endswith("gate.e_score_correction_bias") and dtype in (torch.bfloat16, torch.float16):
            rounded = tensor.to(dtype)
            if tensor.is_meta or torch.equal(rounded.to(tensor.dtype), tensor):
                tensor = rounded
        if apart := _APART.search(name):
            start, end = apart.span(1)
            name = name[:start] + _RELEASED[apart[1]] + name[end:]
        state_dict[name] = tensor


@contextmanager
def released_on_disk(
    model: Any, state_dict: dict[str, torch.Tensor] | None
) -> Iterator[dict[str, torch.Tensor] | None]:
    """Within this, `save_pretrained` of transformers writes the released layout.

    Args:
        model: the model that is saved.
        state_dict: what the caller wants to be saved, or None for all.

    Yields:
        What to hand to transformers as `state_dict`.
    """
    if state_dict is not None:
        state_dict = dict(state_dict)
        to_released(state_dict, model.dtype)
    hook = model.register_state_dict_post_hook(lambda module, state, *_: to_released(state, module.dtype))
    try:
        yield state_dict
    finally:
        hook.remove()


def write_code(model: Any, folder: Any) -> None:
    """Write the flat code files and name them in the config's `auto_map`, if `model` is of the installed package.

    transformers does so for classes that came from a Hub folder.
    """
    if CodeFiles.writer is not None and not model.is_remote_code():
        model.config.auto_map = CodeFiles.writer(folder)


__all__ = ["CodeFiles", "released_on_disk", "to_released", "write_code"]
