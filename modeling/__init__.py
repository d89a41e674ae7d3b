"""The model. Only the installed package has this file: it teaches `save_pretrained` to bring the folder's code."""

from pathlib import Path
from typing import Any

from .checkpoint.saving import CodeFiles


def _write_code(folder: Any) -> dict[str, str]:
    """Write the flat code files into `folder`, a path that may not exist; returns the `auto_map` that names them."""
    from ..hub_card.code_flattening import flatten_sources, write_flat_sources
    from ..hub_card.hub_files import AUTO_MAP

    Path(folder).mkdir(parents=True, exist_ok=True)
    write_flat_sources(flatten_sources(), Path(folder))
    return dict(AUTO_MAP)


CodeFiles.writer = staticmethod(_write_code)
