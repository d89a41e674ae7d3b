"""Kernels are launched on the GPU of their tensors; two real ones are in tests/gpu/test_two_gpus.py."""

import ast
import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kimi_linear.kernels.gpu import compile_threads as gpu_compile_threads
from kimi_linear.kernels.gpu import launching as gpu_launching

KERNELS = Path(gpu_launching.__file__).parents[1]
SECOND = torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch):
    """The devices that were made current, innermost last."""
    devices = []

    @contextlib.contextmanager
    def device(wanted):
        devices.append(wanted)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def test_the_first_argument_decides(current):
    @gpu_launching.launches_beside_first_argument
    def where(x, *, extra):
        """Its docstring."""
        return list(current), extra

    assert where(SimpleNamespace(device=SECOND), extra=1) == ([SECOND], 1)
    assert where(torch.zeros(1), extra=2) == ([], 2)
    assert not current and where.__doc__ == "Its docstring."


def test_threads_have_the_device_and_their_errors_are_raised(current):
    seen = []
    gpu_compile_threads.run_in_threads(SECOND, lambda: seen.append(1), lambda: seen.append(current[-1]))
    assert sorted(map(str, seen)) == ["1", "cuda:1"]

    def fail():
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        gpu_compile_threads.run_in_threads(SECOND, fail, lambda: seen.append(2))
    assert seen[-1] == 2


def custom_ops():
    """(file, function, source) of every custom operator."""
    for path in sorted(KERNELS.rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any("custom_op(" in decorator for decorator in decorators):
                    yield path.name, node.name, "\n".join([*decorators, ast.unparse(node)])


@pytest.mark.parametrize(
    ("file", "name", "source"), list(custom_ops()), ids=lambda part: part if len(part) < 60 else ""
)
def test_every_custom_operator_is_guarded(file, name, source):
    assert "launches_beside_first_argument" in source or "with launching_on(" in source


def test_custom_operators_are_found():
    assert len(list(custom_ops())) >= 10
