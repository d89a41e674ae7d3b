"""Which backend serves which input, and that the model's logits don't depend on it."""

import pytest
import torch

from kimi_linear.kernels.gpu import availability as gpu_availability
from kimi_linear.kernels.kda import dispatch as kda_dispatch
from kimi_linear.kernels.kda.dispatch import kda, resolve_kda_backend

ON_CPU = torch.zeros(1, 1, 1, 16)


class OnGpu:
    """Stands for a tensor on a GPU, which CI has none of; the choice reads only these two attributes."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype


def installed(monkeypatch, triton: bool = False, fla: bool = False, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu_availability.is_first_choice.cache_clear()
    monkeypatch.setattr(kda_dispatch, "is_available", lambda: triton)
    monkeypatch.setattr(kda_dispatch, "serves", lambda device: triton and device.type == "cuda")
    monkeypatch.setattr(kda_dispatch, "_fla_ops", lambda: ("chunk", "recurrent") if fla else None)


@pytest.fixture(autouse=True)
def fresh_choice():
    """What was cached for the pretended GPU of one test must not reach another."""
    yield
    gpu_availability.is_first_choice.cache_clear()


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("fla", [False, True])
def test_a_cpu_is_always_served_by_pytorch(monkeypatch, triton, fla):
    installed(monkeypatch, triton, fla)
    assert resolve_kda_backend("auto", ON_CPU, 16, needs_grad=False) == "torch"
    assert resolve_kda_backend("auto", ON_CPU, 16, needs_grad=True) == "torch"


@pytest.mark.parametrize(
    ("triton", "fla", "needs_grad", "expected"),
    [
        (True, True, False, "triton"),
        (True, False, False, "triton"),
        (False, True, False, "fla"),
        (False, False, False, "torch"),
        (True, True, True, "fla"),
        (True, False, True, "torch"),
    ],
)
def test_a_gpu_takes_triton_for_inference_and_fla_for_training(monkeypatch, triton, fla, needs_grad, expected):
    installed(monkeypatch, triton, fla)
    assert resolve_kda_backend("auto", OnGpu(), 128, needs_grad) == expected


def test_what_the_kernels_cannot_take_goes_elsewhere(monkeypatch):
    installed(monkeypatch, triton=True)
    assert resolve_kda_backend("auto", OnGpu(torch.float64), 128, needs_grad=False) == "torch"
    assert resolve_kda_backend("auto", OnGpu(), 512, needs_grad=False) == "torch"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fla"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_older_gpus_are_left_to_fla(monkeypatch, capability, expected):
    installed(monkeypatch, triton=True, fla=True, capability=capability)
    assert resolve_kda_backend("auto", OnGpu(), 128, needs_grad=False) == expected


def test_amd_gpus_are_left_to_fla(monkeypatch):
    installed(monkeypatch, triton=True, fla=True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert resolve_kda_backend("auto", OnGpu(), 128, needs_grad=False) == "fla"


@pytest.mark.parametrize(
    ("backend", "x", "needs_grad", "message"),
    [
        ("cuda", ON_CPU, False, "'cuda' must be one of"),
        ("triton", ON_CPU, False, "needs Triton, a GPU.*got device cpu"),
        ("triton", OnGpu(), True, "no backward yet"),
        ("fla", ON_CPU, False, "tensors on a GPU, got device cpu"),
        ("fla", OnGpu(), False, "needs flash-linear-attention"),
    ],
)
def test_a_backend_by_name_that_cannot_serve_is_refused(monkeypatch, backend, x, needs_grad, message):
    installed(monkeypatch, triton=True)
    with pytest.raises(ValueError, match=message):
        resolve_kda_backend(backend, x, 16, needs_grad)


def test_gradients_wanted_of_the_state_alone_count(monkeypatch):
    installed(monkeypatch, triton=True)
    inputs = [torch.randn(1, 3, 2, 16) for _ in range(4)] + [torch.randn(1, 3, 2)]
    gates = {"A_log": torch.zeros(2), "dt_bias": torch.zeros(32)}
    state = torch.zeros(1, 2, 16, 16, requires_grad=True)
    with pytest.raises(ValueError, match="no backward yet"):
        kda(*inputs, **gates, initial_state=state, backend="triton")
