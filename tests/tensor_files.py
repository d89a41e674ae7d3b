"""The tensors of a folder of safetensors files."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, and that no name stands in two files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors.update(part)
    return tensors


def assert_same_tensors(saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(saved) == set(expected)
    for name, tensor in expected.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name], tensor), name
