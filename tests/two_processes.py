"""Two processes, on the CPU (gloo) or a GPU each (nccl), with a model from a folder: for what is spread over ranks."""

import os
import subprocess
import sys
from pathlib import Path

DONE = "all checks of this rank passed"

PREAMBLE = """
import os, sys, torch, torch.distributed as dist
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM
folder, scratch = sys.argv[1:]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(scratch + "/ranks", 2), rank=rank, world_size=2)
assert dist.get_world_size() == 2
whole = KimiLinearForCausalLM.from_pretrained(folder).eval()
ids = torch.randint(0, 120, (2, 20), generator=torch.Generator().manual_seed(0))
"""

GPU_PREAMBLE = (
    PREAMBLE.replace("torch.set_num_threads(1)", "torch.cuda.set_device(rank)")
    .replace('"gloo"', '"nccl"')
    .replace("from_pretrained(folder).eval()", 'from_pretrained(folder).eval().to("cuda")')
    .replace("manual_seed(0))", 'manual_seed(0)).to("cuda")')
)


def run_on_two_processes(body: str, folder: Path, scratch: Path, preamble: str = PREAMBLE) -> None:
    """Run `preamble` and `body` as rank 0 and rank 1; `folder` and `scratch` are names in it. Fails unless both end."""
    script = preamble + body + f"\ndist.barrier()\nprint({DONE!r}, flush=True)\ndist.destroy_process_group()\n"
    # accelerate wants an address, though the group is there already; nobody listens at it.
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(scratch)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, output) in enumerate(zip(ranks, outputs)):
        # The marker counts, not the exit code: gloo's threads now and then abort a process that is done.
        assert f"\n{DONE}\n" in f"\n{output}", f"rank {rank}, exit code {process.returncode}:\n{output[-3000:]}"
