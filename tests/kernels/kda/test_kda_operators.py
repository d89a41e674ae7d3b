"""
The public ops of the Triton kernels: checks, fake implementations, where they launch, and import without Triton.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from offline_compile import guarded_launches

from kimi_linear.kernels.kda import index, inter, intra
from kimi_linear.kernels.kda import operators as kda_operators
from kimi_linear.kernels.kda import step as kda_step_module
from kimi_linear.kernels.kda.operators import chunk_kda, kda_step

HERE = Path(__file__).parent


def prompt(B=1, T=5, H=2, K=16, V=24, dtype=torch.float32):
    return {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "k": torch.randn(B, T, H, K, dtype=dtype),
        "v": torch.randn(B, T, H, V, dtype=dtype),
        "g": torch.randn(B, T, H, K, dtype=dtype),
        "beta": torch.randn(B, T, H, dtype=dtype),
        "A_log": torch.zeros(H),
        "dt_bias": torch.zeros(H * K),
    }


def step(B=2, T=1, H=2, K=16, V=24, W=4):
    sizes = (H * K, H * K, H * V)
    return {
        "q": torch.randn(B, T, H * K), "k": torch.randn(B, T, H * K), "v": torch.randn(B, T, H * V),
        "f": torch.randn(B, T, H * K), "beta": torch.randn(B, T, H), "gate": torch.randn(B, T, H * V),
        "conv_weights": tuple(torch.randn(n, 1, W) for n in sizes),
        "windows": tuple(torch.randn(B, n, W - 1) for n in sizes),
        "A_log": torch.zeros(H), "dt_bias": torch.zeros(H * K), "norm_weight": torch.ones(V), "norm_eps": 1e-5,
        "state": torch.zeros(B, H, K, V),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": torch.randn(1, 5, 2, 8)}, "k must be"),
        ({"beta": torch.randn(1, 5, 3)}, "beta must be"),
        ({"A_log": torch.zeros(3)}, "A_log"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens"),
        ({"initial_state": torch.zeros(2, 2, 16, 24)}, "initial_state"),
        ({}, "on a GPU"),
    ],
)
def test_wrong_prompt_input(change, said):
    with pytest.raises(ValueError, match=said):
        chunk_kda(**{**prompt(), **change})


def test_boundaries_are_read_once(monkeypatch):
    """What a GPU's cu_seqlens goes through: wrong values raise, right ones are read again only after a change."""
    reads = []
    check = kda_operators.check_cu_seqlens
    monkeypatch.setattr(kda_operators, "check_cu_seqlens", lambda *args: (reads.append(args), check(*args)))
    cu_seqlens = torch.tensor([0, 3, 5])
    for _ in range(3):
        kda_operators._check_boundaries(cu_seqlens, 5)
    assert len(reads) == 1
    with pytest.raises(ValueError, match="number of tokens 6"):
        kda_operators._check_boundaries(cu_seqlens, 6)
    cu_seqlens[1] = 9
    with pytest.raises(ValueError, match=r"\[0, 9, 5\]"):
        kda_operators._check_boundaries(cu_seqlens, 5)
    with torch.inference_mode():
        uncounted = torch.tensor([0, 3, 5])
        kda_operators._check_boundaries(uncounted, 5)
        uncounted[1] = 9
        with pytest.raises(ValueError, match="rise"):
            kda_operators._check_boundaries(uncounted, 5)


def test_exported_for_any_length(monkeypatch):
    """torch.export sees one operator, whatever batch and length."""
    monkeypatch.setattr(kda_operators, "_check_device", lambda x: None)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, g, beta, A_log, dt_bias):
            return chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, output_final_state=True)

    B, T = torch.export.Dim("B", min=2, max=64), torch.export.Dim("T", min=2, max=4096)
    shapes = {n: {0: B, 1: T} for n in ("q", "k", "v", "g", "beta")} | {"A_log": None, "dt_bias": None}
    program = torch.export.export(Layer(), (), prompt(B=3, T=7), dynamic_shapes=shapes)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and "chunk_kda_fwd" in str(node.target)]
    assert len(calls) == 1
    o, state = (node.meta["val"] for node in program.graph.output_node().args[0])
    assert o.shape[2:] == (2, 24) and state.shape[1:] == (2, 16, 24)
    assert not any(isinstance(n, int) for n in o.shape[:2])


def test_every_operator_launches_on_the_gpu_of_its_tensors(monkeypatch):
    kernels = (
        index.kda_index_fwd_kernel,
        intra.kda_intra_fwd_kernel,
        inter.kda_inter_fwd_kernel,
        kda_step_module.kda_step_fwd_kernel,
    )
    monkeypatch.setattr(kda_operators, "_check_device", lambda x: None)
    with guarded_launches(kernels, [kda_operators], monkeypatch) as launches:
        chunk_kda(**prompt(B=2))
        chunk_kda(**prompt(), cu_seqlens=torch.tensor([0, 2, 5]))
        kda_step(**step())
    assert {name for name, _ in launches} == {kernel.__name__ for kernel in kernels}
    assert [name for name, guarded in launches if not guarded] == []


def test_head_sizes_are_bounded():
    with pytest.raises(ValueError, match="256"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kda_operators, "_check_device", lambda x: None)
        chunk_kda(**prompt(K=300))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": torch.zeros(2, 2, 16, 24).bfloat16()}, "state must be"),
        ({"k": torch.randn(2, 1, 31)}, "k must be"),
        ({"gate": torch.randn(2, 1, 31)}, "gate must be"),
        ({"windows": (torch.zeros(2, 32, 3), torch.zeros(2, 32, 3), torch.zeros(2, 48, 2))}, "windows of v"),
        ({"conv_weights": (torch.zeros(32, 4), torch.zeros(31, 4), torch.zeros(48, 4))}, "conv_weights of k"),
        ({"norm_weight": torch.ones(3)}, "norm_weight"),
        ({"lengths": torch.ones(2)}, "lengths"),
        ({}, "on a GPU"),
    ],
)
def test_wrong_step_input(change, said):
    with pytest.raises(ValueError, match=said):
        kda_step(**{**step(), **change})


def test_fake_outputs(monkeypatch):
    """torch.compile and export see shapes and dtypes without a launch."""
    monkeypatch.setattr(kda_operators, "_check_device", lambda x: None)
    with FakeTensorMode():
        o, state = chunk_kda(**prompt(B=3, T=7, dtype=torch.bfloat16), output_final_state=True)
        y = kda_step(**step())
    assert (o.shape, o.dtype) == ((3, 7, 2, 24), torch.bfloat16)
    assert (state.shape, state.dtype) == ((3, 2, 16, 24), torch.float32)
    assert y.shape == (2, 1, 2, 24)


@pytest.mark.processes
def test_import_without_triton():
    """
    The modules import where Triton is absent (a Hub folder is loaded file by file), and a call says what is missing.
    """
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['triton.language'] = None\n"
        "import torch\n"
        "from kimi_linear.kernels.kda import operators as m\n"
        "from kimi_linear.kernels.gpu.availability import device_serves, is_available\n"
        "assert not is_available() and not device_serves(torch.device('cuda'))\n"
        "from kimi_linear.modeling.layers import moe, kda_attention, mla_attention\n"
        "from kimi_linear.modeling.layers.norms import KimiRMSNorm\n"
        "assert KimiRMSNorm(8)(torch.randn(2, 8)).shape == (2, 8)\n"
        "x = torch.randn(1, 2, 1, 16)\n"
        "try: m.chunk_kda(x, x, x, x, x[..., 0], A_log=torch.zeros(1), dt_bias=torch.zeros(16))\n"
        "except ValueError as e: assert 'triton' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_loading_the_file_twice():
    """Package and Hub copy of the same file in one process: each registers its operators under its own name."""
    import importlib.util

    import kimi_linear.kernels.kda as package

    spec = importlib.util.spec_from_file_location(
        "kimi_linear.kernels.kda.hub_copy_of_operators", Path(package.__path__[0]) / "operators.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._NAMESPACE != kda_operators._NAMESPACE
