"""
Every KDA kernel with the configurations of the table, compiled offline for the GPU classes of the table: no GPU is
needed.

The launchers run as they are; a launch compiles instead. What can't be launched fails (shared memory over the class's
limit, code that the compiler turned into a trap), as does a kernel whose registers the assembler gave up on, and a
table of registers, spills and shared memory is printed (`pytest -s`).
"""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kimi_linear.kernels import kda_triton, kda_triton_index, kda_triton_inter, kda_triton_intra
from kimi_linear.kernels import kda_triton_step as step_module
from kimi_linear.kernels.kda_triton_configs import CLASSES, inter_config, intra_config, step_config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Bytes (AMD: registers). Seen from the assembler giving up: 7,376, with 32 registers; otherwise at most 1,104 in the
# forward, and 5,696 in the decode step with heads of 256.
SPILL_LIMIT = {"kda_step_fwd_kernel": 6 << 10}
KERNELS = [
    kda_triton_index.kda_index_fwd_kernel, kda_triton_intra.kda_intra_fwd_kernel,
    kda_triton_inter.kda_inter_fwd_kernel, step_module.kda_step_fwd_kernel,
]  # fmt: skip


class _OfflineDriver:
    """Just enough of a Triton driver to compile for a target that is not there."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


@contextlib.contextmanager
def compiling(target, monkeypatch):
    """Inside, launches compile; yields the list of (kernel name, compiled kernel)."""
    compiled = []
    monkeypatch.setattr(driver, "_active", _OfflineDriver(target))
    for kernel in KERNELS:
        kernel.device_caches.clear()  # they know the device's number only, and it is the same for every target

        def run(*args, grid, warmup, kernel=kernel, launch=kernel.run, **kwargs):
            compiled.append((kernel.__name__, launch(*args, grid=grid, warmup=True, **kwargs)))

        monkeypatch.setattr(kernel, "run", run)
    yield compiled
    for kernel in KERNELS:
        kernel.device_caches.clear()


def resources(kernel, backend):
    """Registers, bytes (cuda) or registers (hip) spilled."""
    if backend == "hip":
        text = kernel.asm["amdgcn"]
        return int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), int(
            re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]
        )
    tool = next((Path(triton.__file__).parent / "backends/nvidia/bin").glob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def launch_all(gpu, K, V, dtype, packed):
    """One launch of every kernel, as the ops launch them on class `gpu`."""
    B, T, H, W, name = 1, 128, 2, 4, str(dtype).removeprefix("torch.")
    q, k, g = (torch.empty(B, T, H, K, dtype=dtype) for _ in range(3))
    v, beta = torch.empty(B, T, H, V, dtype=dtype), torch.empty(B, T, H, dtype=dtype)
    A_log, dt_bias, state = torch.empty(H), torch.empty(H * K), torch.empty(B, H, K, V)
    intra = intra_config(gpu, K, name)
    index = None
    if packed:
        cu_seqlens = torch.zeros(2, dtype=torch.int32)
        index = (cu_seqlens, *kda_triton_index.kda_index_fwd(cu_seqlens, T, intra.C))
    tiles = kda_triton._tiles(q, T // intra.C, intra.C)
    kda_triton_intra.kda_intra_fwd(q, k, g, beta, A_log, dt_bias, 0.1, 0, 2, index, tiles, intra, False)
    inter = inter_config(gpu, K, V, name)
    for initial in (None, state) if K == 128 else (state,):
        kda_triton_inter.kda_inter_fwd(v, torch.empty_like(v), initial, state, 0, 2, index, tiles, inter, False)
    sizes = (H * K, H * K, H * V)
    xq, xk, xv = (torch.empty(B, 1, n, dtype=dtype) for n in sizes)
    step_module.kda_step_fwd(
        xq, xk, xv, xq, torch.empty(B, 1, H, dtype=dtype), xv, torch.empty(B, 1, H, V, dtype=dtype),
        tuple(torch.empty(n, W, dtype=dtype) for n in sizes), tuple(torch.empty(B, n, W - 1, dtype=dtype) for n in
        sizes), A_log, dt_bias, torch.empty(V, dtype=dtype), state, None, 0.1, 1e-5, step_config(K, V),
    )  # fmt: skip


CASES = [  # K, V, dtype, packed
    (128, 128, torch.bfloat16, False),
    (128, 128, torch.float32, False),
    (256, 256, torch.bfloat16, False),
    (64, 64, torch.float16, True),
]


@pytest.mark.parametrize(
    ("gpu", "K", "V", "dtype", "packed"),
    [(gpu, *case) for gpu in CLASSES for case in CASES] + [("sm_90", 128, 128, torch.bfloat16, True)],
)
def test_compiles_and_fits(gpu, K, V, dtype, packed, monkeypatch):
    target = TARGETS[gpu]
    with compiling(target, monkeypatch) as compiled:
        launch_all(gpu, K, V, dtype, packed)
    assert {name for name, _ in compiled} >= {kernel.__name__ for kernel in KERNELS[not packed :]}
    for name, kernel in compiled:
        registers, spilled = resources(kernel, target.backend)
        shared = kernel.metadata.shared
        print(f"{gpu:7} K {K:3} {dtype} {name:22} registers {registers:3} spilled {spilled:5} shared {shared:6}")
        assert registers >= 16, (name, registers)  # 4: nothing but a trap
        assert spilled <= SPILL_LIMIT.get(name, 2 << 10), (name, spilled)
        # Desktop GPUs (sm_86, sm_89, sm_120) take the sm_80 choices and have 99 KiB.
        limit = 99 << 10 if gpu == "sm_80" and dtype == torch.bfloat16 else SHARED_LIMIT[gpu]
        assert shared <= limit, (name, shared)
