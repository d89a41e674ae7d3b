"""
Every KDA kernel with the configurations of the table, compiled offline for the GPU classes of the table: no GPU is
needed.

The launchers run as they are; a launch compiles instead. What can't be launched fails (shared memory over the class's
limit, code that the compiler turned into a trap), as does a kernel whose registers the assembler gave up on, and a
table of registers, spills and shared memory is printed (`pytest -s`).
"""

import pytest
import torch

pytest.importorskip("triton")

from offline_compile import (
    DESKTOP,
    DESKTOP_SHARED,
    SHARED_LIMIT,
    TARGETS,
    assembler_messages,
    compiling,
    resources,
    unset_uniform_registers,
)

from kimi_linear.kernels.gpu.classes import CLASSES
from kimi_linear.kernels.kda import backward_pairs, backward_rest, backward_scan
from kimi_linear.kernels.kda import index as kda_index
from kimi_linear.kernels.kda import inter as kda_inter
from kimi_linear.kernels.kda import intra as kda_intra
from kimi_linear.kernels.kda import step as kda_step
from kimi_linear.kernels.kda.backward import _workspace
from kimi_linear.kernels.kda.configs import (
    inter_config,
    intra_config,
    pairs_config,
    rest_config,
    scan_config,
    step_config,
)
from kimi_linear.kernels.kda.index import Segment

# Bytes (AMD: registers). Seen from the assembler giving up: 7,376, with 32 registers; otherwise at most 1,104 in the
# forward, and 5,696 in the decode step with heads of 256.
SPILL_LIMIT = {"kda_step_fwd_kernel": 6 << 10}
KERNELS = [
    kda_index.kda_index_fwd_kernel,
    kda_intra.kda_intra_fwd_kernel,
    kda_inter.kda_inter_fwd_kernel,
    kda_step.kda_step_fwd_kernel,
]
BACKWARD_KERNELS = [
    backward_scan.kda_scan_bwd_kernel,
    backward_pairs.kda_pairs_bwd_kernel,
    backward_rest.kda_rest_bwd_kernel,
]


def launch_backward(gpu, K, V, dtype, packed, B=1, T=128):
    """One launch of every kernel that only the backward has, as its op launches them on class `gpu`."""
    H, name = 2, str(dtype).removeprefix("torch.")
    q, k, g = (torch.empty(B, T, H, K, dtype=dtype) for _ in range(3))
    v, o, do = (torch.empty(B, T, H, V, dtype=dtype) for _ in range(3))
    A_log, dt_bias, state = torch.empty(H), torch.empty(H * K), torch.empty(B, H, K, V)
    C, scan, rest = intra_config(gpu, K, name).C, scan_config(gpu, K, V, name), rest_config(gpu, K, V, name)
    NT = -(-T // C)
    index = None
    if packed:
        index = tuple(torch.zeros(n, dtype=torch.int32) for n in (2, 1, NT))
    tiles, borders = _workspace(q, V, B * NT, C)
    gradients = [torch.empty(B, T, H, n, dtype=tiles[0].dtype) for n in (K, K, V, K)] + [torch.empty(B, T, H)]
    sums = torch.empty(B * NT, H, 4), torch.empty(B * NT, H, K)
    where = {"segment": Segment(0, NT, index=index), "tiles": tiles, "borders": borders, "upcast": False}
    for given in (None, state):
        states = {"state_in": given, "dstate_out": given, "dstate_in": state}
        backward_scan.kda_scan_bwd(v, do, gradients[2], config=scan, **states, **where)
    where["gradients"] = gradients
    pairs = pairs_config(gpu, V, name)
    backward_pairs.kda_pairs_bwd(q, k, v, g, A_log, dt_bias, o, do, scale=0.1, config=pairs, **where)
    backward_rest.kda_rest_bwd(q, k, g, A_log, dt_bias, do, sums=sums, first_sum=0, config=rest, **where)


def launch_all(gpu, K, V, dtype, packed, B=1, T=128):
    """One launch of every kernel, as the ops launch them on class `gpu`."""
    H, W, name = 2, 4, str(dtype).removeprefix("torch.")
    q, k, g = (torch.empty(B, T, H, K, dtype=dtype) for _ in range(3))
    v, beta = torch.empty(B, T, H, V, dtype=dtype), torch.empty(B, T, H, dtype=dtype)
    A_log, dt_bias, state = torch.empty(H), torch.empty(H * K), torch.empty(B, H, K, V)
    intra = intra_config(gpu, K, name)
    index = None
    if packed:
        cu_seqlens = torch.zeros(2, dtype=torch.int32)
        index = (cu_seqlens, *kda_index.kda_index_fwd(cu_seqlens, T, intra.C))
    NT = -(-T // intra.C)
    tiles = kda_intra.intra_tiles(q, B * NT, intra.C)
    where = {"segment": Segment(0, NT, index=index), "tiles": tiles, "upcast": False}
    kda_intra.kda_intra_fwd(q, k, g, beta, A_log, dt_bias, scale=0.1, config=intra, **where)
    inter = inter_config(gpu, K, V, name)
    for initial in (None, state):
        kda_inter.kda_inter_fwd(v, torch.empty_like(v), state_in=initial, state_out=state, config=inter, **where)
    sizes = (H * K, H * K, H * V)
    xq, xk, xv = (torch.empty(B, T, n, dtype=dtype) for n in sizes)
    kda_step.kda_step_fwd(
        xq, xk, xv, xq, torch.empty(B, T, H, dtype=dtype), xv, torch.empty(B, T, H, V, dtype=dtype),
        weights=tuple(torch.empty(n, W, dtype=dtype) for n in sizes),
        windows=tuple(torch.empty(B, n, W - 1, dtype=dtype) for n in sizes),
        A_log=A_log, dt_bias=dt_bias, norm_weight=torch.empty(V, dtype=dtype), state=state, lengths=None,
        scale=0.1, eps=1e-5, config=step_config(K, V),
    )  # fmt: skip


CASES = [  # K, V, dtype, packed
    (128, 128, torch.bfloat16, False),
    (128, 128, torch.float32, False),
    (256, 256, torch.bfloat16, False),
    (64, 64, torch.float16, True),
]


def check(compiled, target, shared_limit, kernels):
    """All `kernels` were compiled, and each can be launched on `target`."""
    assert {name for name, _ in compiled} >= {kernel.__name__ for kernel in kernels}
    for name, kernel in {kernel.hash: (name, kernel) for name, kernel in compiled}.values():
        registers, spilled = resources(kernel, target.backend)
        shared = kernel.metadata.shared
        print(f"{target.arch!s:7} {name:22} registers {registers:3} spilled {spilled:5} shared {shared:6}")
        assert registers >= 16, (name, registers)  # 4: nothing but a trap
        assert spilled <= SPILL_LIMIT.get(name, 2 << 10), (name, spilled)
        assert shared <= shared_limit, (name, shared)
        if target.arch in (80, 90):
            assert not unset_uniform_registers(kernel), name


def chosen_as_for_sm_90(gpu, K, V, dtype):
    """Whether class `gpu` takes the choices of sm_90, whose limits sm_100 shares."""
    name = str(dtype).removeprefix("torch.")
    return all(
        config(gpu, *sizes, name) == config("sm_90", *sizes, name)
        for config, sizes in ((intra_config, (K,)), (inter_config, (K, V)))
    )


# Where sm_100 differs in nothing but the compiler's target, its usual dtype stands for the others: 10 to 20 s each.
FORWARD = [
    (gpu, *case)
    for gpu in CLASSES
    for case in CASES
    if gpu != "sm_100" or case[2] == torch.bfloat16 or not chosen_as_for_sm_90(gpu, *case[:3])
]


@pytest.mark.parametrize(("gpu", "K", "V", "dtype", "packed"), [*FORWARD, ("sm_90", 128, 128, torch.bfloat16, True)])
def test_compiles_and_fits(gpu, K, V, dtype, packed, monkeypatch):
    with compiling(KERNELS, TARGETS[gpu], monkeypatch) as compiled:
        launch_all(gpu, K, V, dtype, packed)
    desktop = gpu == "sm_80" and dtype == torch.bfloat16
    check(compiled, TARGETS[gpu], DESKTOP_SHARED if desktop else SHARED_LIMIT[gpu], KERNELS[not packed :])


@pytest.mark.parametrize(
    ("gpu", "K", "V", "dtype", "packed"),
    [
        *((gpu, 128, 128, torch.bfloat16, False) for gpu in CLASSES),
        ("sm_90", 128, 128, torch.float32, True),
        ("sm_90", 256, 256, torch.bfloat16, False),
        ("sm_80", 64, 64, torch.float16, True),
    ],
)
def test_backward_compiles_and_fits(gpu, K, V, dtype, packed, monkeypatch):
    with compiling(BACKWARD_KERNELS, TARGETS[gpu], monkeypatch) as compiled:
        launch_backward(gpu, K, V, dtype, packed)
    check(compiled, TARGETS[gpu], SHARED_LIMIT[gpu], BACKWARD_KERNELS)


def test_backward_compiles_for_desktops(monkeypatch):
    with compiling(BACKWARD_KERNELS, DESKTOP, monkeypatch) as compiled:
        launch_backward("sm_80", 128, 128, torch.bfloat16, False)
    check(compiled, DESKTOP, DESKTOP_SHARED, BACKWARD_KERNELS)


def test_hopper_products_overlap(monkeypatch):
    """ptxas puts a wait after every tensor-core instruction of a kernel that it can't see through, and says so."""
    with compiling(KERNELS + BACKWARD_KERNELS, TARGETS["sm_90"], monkeypatch) as compiled:
        launch_all("sm_90", 128, 128, torch.bfloat16, False)
        launch_backward("sm_90", 128, 128, torch.bfloat16, False)
    for name in ("kda_inter_fwd_kernel", "kda_scan_bwd_kernel", "kda_rest_bwd_kernel"):
        kernel = dict(compiled)[name]
        assert "wgmma" in kernel.asm["ptx"]
        messages = assembler_messages(kernel, "sm_90a")
        assert "Used" in messages and "serialized" not in messages, messages


@pytest.mark.parametrize(("K", "V"), [(128, 128), (20, 40)])
def test_lengths_and_batches_share_compiled_kernels(K, V, monkeypatch):
    """Lengths and batches that are multiples of 16, odd or 1, with a state or none: one version of each kernel."""
    with compiling(KERNELS + BACKWARD_KERNELS, TARGETS["sm_90"], monkeypatch) as compiled:
        for B, T in ((1, 1), (1, 101), (2, 333), (3, 4096)):
            launch_all("sm_90", K, V, torch.bfloat16, False, B, T)
            launch_backward("sm_90", K, V, torch.bfloat16, False, B, T)
    names = {kernel.hash: name for name, kernel in compiled}.values()
    assert sorted(names) == sorted(kernel.__name__ for kernel in KERNELS[1:] + BACKWARD_KERNELS)
