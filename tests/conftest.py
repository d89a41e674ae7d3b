"""Lanes of tests; tiny checkpoints in the released layout, written once a session, and models loaded from them.

Triton decides when it is imported whether it interprets. So a process runs either the files `*_interpreted.py`
(TRITON_INTERPRET=1) or all others; `python3 tasks.py test` starts both.
"""

import functools
import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from tiny_checkpoints import TINY_CONFIGS, write_checkpoint

from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

# CI draws the same examples in every run, so that it fails for what a change did; at the desk each run draws new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING and importlib.util.find_spec("triton") is not None:
    from quick_interpreter import quicken

    quicken()


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config, items):
    """Mark the lanes, and leave out what this process can't run."""
    kept, others = [], []
    for item in items:
        interpreted = item.path.stem.endswith("_interpreted")
        if interpreted:
            item.add_marker("interpreter")
        if "run_isolated" in item.fixturenames:
            item.add_marker("processes")
        (kept if interpreted == INTERPRETING else others).append(item)
    items[:] = kept
    if others:
        config.hook.pytest_deselected(items=others)
        config.stash[OTHER_LANE] = len(others)


OTHER_LANE = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(OTHER_LANE, 0):
        needs = "run without TRITON_INTERPRET" if INTERPRETING else "need TRITON_INTERPRET=1"
        terminalreporter.write_line(f"{count} tests left out: they {needs} (`python3 tasks.py test` runs both lanes)")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a tiny checkpoint: `tiny_folder("hybrid")`, the names are those of TINY_CONFIGS."""

    @functools.cache
    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        path = tmp_path_factory.mktemp(name)
        write_checkpoint(path, TINY_CONFIGS[name], dtype=dtype)
        return path

    return folder


@pytest.fixture(scope="session")
def load_tiny(tiny_folder):
    """A fresh model from a tiny checkpoint, in evaluation mode: `load_tiny("hybrid", dtype="auto")`."""

    def load(name: str = "hybrid", model_class: type = KimiLinearForCausalLM, **options):
        model = model_class.from_pretrained(tiny_folder(name), **options).eval()
        if model.can_generate():
            model.generation_config.eos_token_id = None  # tests count tokens; those of stopping rules set it again
        return model

    return load


@pytest.fixture(scope="session")
def shared_tiny(load_tiny):
    """As `load_tiny`, but one model for all tests that leave it as it was."""
    return functools.cache(load_tiny)


@pytest.fixture(scope="session")
def native_class():
    """transformers' own KimiLinearForCausalLM."""
    if not hasattr(transformers, "KimiLinearForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no native KimiLinearForCausalLM (5.17 and later do)")
    return transformers.KimiLinearForCausalLM


@pytest.fixture
def model(shared_tiny):
    """The shared fp32 model with KDA, MLA, dense and MoE layers; tests must not change it."""
    return shared_tiny("hybrid")


@pytest.fixture
def random_ids():
    """Token ids without the special ones: `random_ids(batch, length)`, the same in every run."""

    def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, 120, (batch, length), generator=torch.Generator().manual_seed(seed))

    return ids
