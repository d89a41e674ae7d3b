"""Makes `benchmarks` importable without the repository's root on the path, where `kernels` would be importable too."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import tiny_config

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig

_FOLDER = Path(__file__).parents[2] / "benchmarks"
_SPEC = importlib.util.spec_from_file_location(
    "benchmarks", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
sys.modules["benchmarks"] = importlib.util.module_from_spec(_SPEC)


@pytest.fixture
def config():
    """A small bf16 shape with both kinds of layers: `config()`, or with MLA in every layer: `config(all_mla=True)`."""

    def make(all_mla: bool = False) -> KimiLinearConfig:
        layers = {"kda_layers": (), "full_attn_layers": (1, 2, 3)} if all_mla else {}
        return KimiLinearConfig.from_dict({**tiny_config(**layers), "dtype": "bfloat16"})

    return make


@pytest.fixture
def no_waiting(monkeypatch):
    """Lets benchmarks run on a CPU, where there is no GPU to wait for."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
