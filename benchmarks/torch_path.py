"""The PyTorch path of KDA beside transformers' PyTorch fallback, forward, on the CPU: seconds, memory, error.

    python -m benchmarks.torch_path [--tokens 2048] [--heads 8] [--out result.json]

Each runs in a process of its own, from the same bf16 inputs with released-like gates (decay rates up to 200); memory is
what the process's peak resident size rises by, error is against the float64 recurrence.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from kimi_linear.kernels.kda.reference import recurrent_kda_reference
from kimi_linear.kernels.kda.torch_forward import chunk_kda_torch

HEAD_DIM = 128


def inputs(tokens: int, heads: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """q, k, v, g, beta [1, tokens, heads, .] in bf16, and the gate's parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, heads, HEAD_DIM)] * 4 + [(1, tokens, heads)]
    tensors = [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]
    gates = {
        "A_log": torch.linspace(0, math.log(200), heads),
        "dt_bias": torch.randn(heads * HEAD_DIM, generator=generator) - 4,
    }
    return tensors, gates


def run_ours(tensors: list[torch.Tensor], gates: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our chunked path, from raw logits."""
    return chunk_kda_torch(*tensors, **gates)[0]


def run_native(tensors: list[torch.Tensor], gates: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' fallback, which takes activated gates; they are made here, in fp32."""
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    q, k, v, g, beta = tensors
    heads = q.shape[2]
    logits = g.float() + gates["dt_bias"].view(heads, HEAD_DIM)
    decay = -gates["A_log"].exp().view(heads, 1) * F.softplus(logits)
    return chunk_kimi_delta_attention(q, k, v, g=decay, beta=beta.float().sigmoid(), use_qk_l2norm_in_kernel=True)[0]


def measure(name: str, tokens: int, heads: int) -> dict[str, float | str]:
    """Run one path in this process."""
    run = {"ours": run_ours, "native": run_native}[name]
    run(*inputs(64, heads))  # library initialisation
    tensors, gates = inputs(tokens, heads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        start = time.perf_counter()
        o = run(tensors, gates)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    expected, _ = recurrent_kda_reference(*tensors, **gates)
    error = float((o.double() - expected).norm() / expected.norm())
    return {"path": name, "seconds": seconds, "peak_mib": peak / 1024, "relative_error": error}


def main() -> None:
    """Parse the command line, run both, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--only", choices=["ours", "native"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.tokens, arguments.heads)))
        return
    command = [sys.executable, "-m", "benchmarks.torch_path", f"--tokens={arguments.tokens}"]
    rows = []
    for name in ("ours", "native"):
        child = subprocess.run(
            [*command, f"--heads={arguments.heads}", f"--only={name}"], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(child.stdout.splitlines()[-1]))
        print("{path:8} {seconds:8.2f} s {peak_mib:10.0f} MiB   error {relative_error:.1e}".format(**rows[-1]))
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join(["python -m benchmarks.torch_path", *sys.argv[1:]]),
        "device": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": {"tokens": arguments.tokens, "heads": arguments.heads, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
