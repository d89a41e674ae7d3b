"""Launches that compile for a GPU which is not there: what the tests of every kernel folder share."""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Desktop GPUs take the choices of sm_80, with less shared memory.
DESKTOP, DESKTOP_SHARED = GPUTarget("cuda", 120, 32), 99 << 10
DESKTOPS = {"sm_86": GPUTarget("cuda", 86, 32), "sm_89": GPUTarget("cuda", 89, 32), "sm_120": DESKTOP}


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
def compiling(kernels, target, monkeypatch):
    """Inside, launches compile; yields the list of (kernel name, compiled kernel)."""
    compiled = []
    monkeypatch.setattr(driver, "_active", _OfflineDriver(target))
    for kernel in kernels:
        kernel.device_caches.clear()  # they know the device's number only, and it is the same for every target

        def run(*args, grid, warmup, kernel=kernel, launch=kernel.run, **kwargs):
            compiled.append((kernel.__name__, launch(*args, grid=grid, warmup=True, **kwargs)))

        monkeypatch.setattr(kernel, "run", run)
    yield compiled
    monkeypatch.undo()
    for kernel in kernels:
        kernel.device_caches.clear()


@contextlib.contextmanager
def guarded_launches(kernels, modules, monkeypatch):
    """Inside, nothing is launched; yields [(kernel name, whether the GPU of its tensors was made current)].

    `modules` are those that call `launching_on` by that name.
    """
    launches, inside = [], []

    @contextlib.contextmanager
    def launching_on(device):
        inside.append(device)
        yield
        inside.pop()

    for module in modules:
        monkeypatch.setattr(module, "launching_on", launching_on)
    for kernel in kernels:

        def run(*args, kernel=kernel, **kwargs):
            launches.append((kernel.__name__, bool(inside)))

        monkeypatch.setattr(kernel, "run", run)
    yield launches


def assembler_messages(kernel, arch):
    """What ptxas says about a kernel compiled for `arch`, such as "sm_90a"."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"  # the newer of Triton's two
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [str(tool), "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


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


def check_compiles_without_spills(kernels, launch_all, gpu, dtype, monkeypatch):
    """`launch_all(dtype)` launches all `kernels`; none spills or takes more shared memory than all GPUs have."""
    target = TARGETS[gpu]
    with compiling(kernels, target, monkeypatch) as compiled:
        launch_all(dtype)
    assert {name for name, _ in compiled} == {kernel.__name__ for kernel in kernels}
    for name, kernel in compiled:
        registers, spilled = resources(kernel, target.backend)
        print(f"{gpu:7} {dtype} {name:30} registers {registers:3} spilled {spilled:5} shared {kernel.metadata.shared}")
        assert spilled == 0, (name, spilled)
        assert kernel.metadata.shared <= 48 << 10


def check_launches_are_guarded(kernels, launch_all, modules, monkeypatch):
    """`launch_all(bfloat16)` launches all `kernels`, each on the GPU of its tensors."""
    with guarded_launches(kernels, modules, monkeypatch) as launches:
        launch_all(torch.bfloat16)
    assert {name for name, _ in launches} == {kernel.__name__ for kernel in kernels}
    assert [name for name, guarded in launches if not guarded] == []


def unset_uniform_registers(kernel):
    """
    Reads of uniform registers that no instruction before them in the code has set: (address, instruction, register).

    Descriptors of Hopper's matrix products are in such registers. ptxas 12.8 forgot to set one, and the product read
    outside of shared memory; nothing else shows that without a GPU. For sm_80 and sm_90, whose code it reads.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    is_set, found = set(), []
    for address, name, operands in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z]\S*) +(.*?);", text):
        uniform, target = re.match(r"U|R2UR|S2UR|VOTEU|REDUX", name), None
        if uniform:  # it writes the first operand that is not a predicate
            match = re.match(r"(?:!?U?P[T0-9]+, *)*UR(\d+)(.*)", operands)
            if match is not None:
                target, operands = int(match[1]), match[2]
        for kind, number in re.findall(r"(gdesc|desc|)\[?UR(\d+)", operands):
            n = int(number)
            pair = kind == "desc" or (uniform and ".64" in name)
            read = {n + 2, n + 3} if kind == "gdesc" else {n, n + 1} if pair else {n}
            found += [(address, name, f"UR{r}") for r in sorted(read - is_set) if r < 63]
        if target is not None:
            is_set |= {target, target + 1} if ".64" in name or ".WIDE" in name else {target}
    return found
