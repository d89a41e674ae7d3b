"""
Tables of KDA in training: `python -m benchmarks.kda_training`, forward and backward on one GPU.

Gradients are compared with autograd of the float64 recurrence at a small size, in both gate regimes of benchmarks.kda,
in three dtypes and packed; then forward and backward are timed at the sizes of the goals, whole and by stage, with the
memory that they need beyond inputs and gradients. fla, where it is installed, does the same work (gate, l2norm, sigmoid
in its kernels) in the same run. Results go to a JSON file with device, versions and date.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kda import REGIMES, error, fla_chunk_kda, inputs, median, ragged
from benchmarks.record import default_path, write
from kimi_linear.kernels.gpu.classes import gpu_of
from kimi_linear.kernels.gpu.compile_threads import run_in_threads
from kimi_linear.kernels.kda import backward, configs
from kimi_linear.kernels.kda.backward_pairs import kda_pairs_bwd
from kimi_linear.kernels.kda.backward_rest import kda_rest_bwd
from kimi_linear.kernels.kda.backward_scan import kda_scan_bwd
from kimi_linear.kernels.kda.index import Segment
from kimi_linear.kernels.kda.intra import kda_intra_fwd
from kimi_linear.kernels.kda.operators import chunk_kda
from kimi_linear.kernels.kda.reference import recurrent_kda_reference

# B, T, H, packed sequences (0: dense), goal in ms on an H200 (shared/anchors.md)
CASES = [
    (1, 8192, 32, 0, 2.0),
    (1, 32768, 32, 0, 7.5),
    (8, 1024, 32, 0, None),
    (1, 8192, 64, 0, None),
    (1, 8192, 32, 16, None),
]
PARTS = ("cold", "errors", "stages", "times")
# regime, B, T, H, dtype, packed sequences
CHECKS = [
    *((regime, 1, 512, 8, torch.bfloat16, 0) for regime in REGIMES),
    *((regime, 1, 256, 4, dtype, 0) for regime in REGIMES for dtype in (torch.float16, torch.float32)),
    *((regime, 1, 400, 4, torch.bfloat16, 8) for regime in REGIMES),
]


def ours(**x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return chunk_kda(**x, output_final_state=True)


def fla(**x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return fla_chunk_kda(
        **x,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )


def gradients(op: Callable[..., Any], x: dict, do: torch.Tensor, dstate: torch.Tensor, state: torch.Tensor, **kw: Any):
    """By name, those of all inputs and the initial state."""
    leaves = {name: t.detach().requires_grad_() for name, t in {**x, "initial_state": state}.items()}
    o, final = op(**leaves, **kw)
    found = torch.autograd.grad((o, final), list(leaves.values()), (do.to(o.dtype), dstate.to(final.dtype)))
    return dict(zip(leaves, found))


def error_rows(peers: bool) -> Iterator[dict]:
    """Relative errors of every gradient, and whether two runs give the same bits."""
    for regime, B, T, H, dtype, N in CHECKS:
        x = inputs(regime, B, T, H, dtype=dtype)
        kw = {"cu_seqlens": ragged(T, N)} if N else {}
        rows = N or B
        do = torch.randn(B, T, H, 128, device="cuda").to(dtype)
        dstate, state = (0.1 * torch.randn(rows, H, 128, 128, device="cuda") for _ in range(2))
        first, second = (gradients(ours, x, do, dstate, state, **kw) for _ in range(2))
        double = {name: t.double() for name, t in x.items()}
        exact = gradients(recurrent_kda_reference, double, do.double(), dstate.double(), state.double(), **kw)
        row = {"case": f"{B}x{T}x{H}" + (f" packed {N}" if N else ""), "regime": regime, "dtype": str(dtype)}
        row["bit_identical"] = all(torch.equal(first[name], second[name]) for name in first)
        row["error"] = {name: float(f"{error(first[name], exact[name]):.3g}") for name in exact}
        if peers:
            found = gradients(fla, {name: t.contiguous() for name, t in x.items()}, do, dstate, state, **kw)
            row["fla_error"] = {name: float(f"{error(found[name], exact[name]):.3g}") for name in exact}
        yield row


def timed(op: Callable[..., Any], x: dict, do: torch.Tensor, **kw: Any) -> dict[str, Any]:
    """Forward alone, and forward with backward: ms (median, p20, p80) as called; GiB at most beyond what was there."""
    x = {name: t.detach().requires_grad_() for name, t in x.items()}

    def both() -> None:
        torch.autograd.grad(op(**x, **kw)[0], list(x.values()), do)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - held
    return {"forward_ms": median(lambda: op(**x, **kw)), "ms": median(both), "peak_gib": round(peak / 2**30, 3)}


def time_rows(peers: bool, only: list[str]) -> Iterator[dict]:
    for regime in REGIMES:
        for B, T, H, N, goal in CASES:
            case = f"{B}x{T}x{H}" + (f" packed {N}" if N else "")
            if only and case not in only:
                continue
            x, do = inputs(regime, B, T, H), torch.randn(B, T, H, 128, device="cuda").bfloat16()
            kw = {"cu_seqlens": ragged(T, N)} if N else {}
            row = {"case": case, "regime": regime, "goal_ms": goal, **timed(ours, x, do, **kw)}
            if peers:
                row["fla"] = timed(fla, {name: t.contiguous() for name, t in x.items()}, do, **kw)
            yield row


class Stages:
    """The backward's launches on 1x8192x32 in bf16, each to be called apart, with other configurations too."""

    def __init__(self, regime: str, B: int = 1, T: int = 8192, H: int = 32, K: int = 128, V: int = 128) -> None:
        x = inputs(regime, B, T, H, K, V)
        q, k, v, g, beta, A_log, dt_bias = (x[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias"))
        NT, scale, gpu = -(-T // configs.CHUNK), K**-0.5, gpu_of(q.device)
        tiles, borders = backward._workspace(q, V, B * NT, configs.CHUNK)
        do, o, found = torch.randn_like(v), torch.randn_like(v), backward._gradients(q, v)
        do, o = do.contiguous(), o.contiguous()
        sums = tuple(torch.empty(B * NT, H, n, device="cuda") for n in (K // 16, K))
        state, segment = torch.empty(B, H, K, V, device="cuda"), Segment(0, NT)
        self.chosen = {
            "intra": configs.intra_config(gpu, K, "bfloat16"),
            "scan": configs.scan_config(gpu, K, V, "bfloat16"),
            "pairs": configs.pairs_config(gpu, V, "bfloat16"),
            "rest": configs.rest_config(gpu, K, V, "bfloat16"),
        }
        gates = (q, k, v, g, A_log, dt_bias)
        where = {"segment": segment, "tiles": tiles, "upcast": False}
        states = {"state_in": None, "dstate_out": None, "dstate_in": state}
        parts = {**where, "borders": borders, "gradients": found}
        self.launch = {
            "intra": partial(kda_intra_fwd, q, k, g, beta, A_log, dt_bias, scale=scale, **where),
            "scan": partial(kda_scan_bwd, v, do, found[2], borders=borders, **states, **where),
            "pairs": partial(kda_pairs_bwd, *gates, o, do, scale=scale, **parts),
            "rest": partial(kda_rest_bwd, q, k, g, A_log, dt_bias, do, sums=sums, first_sum=0, **parts),
        }
        for name, launch in self.launch.items():
            launch(config=self.chosen[name])

    def compile(self, stage: str, config: Any) -> None:
        self.launch[stage](config=config, compile_only=True)

    def ms(self, stage: str, config: Any = None) -> list[float]:
        return median(lambda: self.launch[stage](config=config or self.chosen[stage]))


def candidates(chosen: dict[str, Any]) -> dict[str, list[Any]]:
    """What the table of configurations was chosen from, by stage."""
    scan, pairs, rest = chosen["scan"], chosen["pairs"], chosen["rest"]
    wide = rest._replace(BK=128, num_warps=8)
    return {
        "scan": [scan._replace(num_stages=n) for n in (3, 4, 5)],
        "pairs": [pairs._replace(num_warps=w, BV=v) for w, v in ((1, 128), (2, 128), (4, 128), (2, 64), (4, 64))],
        "rest": [rest._replace(maxnreg=m, BV=v) for m in (None, 168, 128) for v in (64, 128)]
        + [rest._replace(num_warps=8, maxnreg=128), wide._replace(maxnreg=None), wide._replace(maxnreg=128)],
    }


def stage_rows(tune: bool) -> Iterator[dict]:
    """Times of the stages; `tune`: of the candidates too, the best of which serve the rest of the run."""
    sums: dict[str, dict[Any, float]] = {}
    for regime in REGIMES:
        stages = Stages(regime)
        for stage, config in stages.chosen.items():
            yield {"stage": stage, "regime": regime, "config": str(config), "ms": stages.ms(stage)}
        for stage, found in candidates(stages.chosen).items() if tune else ():
            for config in found:
                ms = stages.ms(stage, config)
                sums.setdefault(stage, {}).setdefault(config, 0.0)
                sums[stage][config] += ms[0]
                yield {"stage": stage, "regime": regime, "candidate": str(config), "ms": ms}
    for stage, times in sums.items():
        best = min(times, key=times.get)
        setattr(backward, f"{stage}_config", lambda *args, best=best: best)
        yield {"stage": stage, "adopted": str(best)}


def compile_candidates() -> None:
    """Compile all candidates at once in threads, so that --tune finds them in the compile cache."""
    stages = Stages("tame", T=64)
    jobs = [(stage, config) for stage, found in candidates(stages.chosen).items() for config in found]
    run_in_threads(torch.device("cuda"), *(partial(stages.compile, stage, config) for stage, config in jobs))


def cold_rows() -> Iterator[dict]:
    """Seconds of the first forward and backward in a new process, nothing compiled, start of CUDA left out."""
    code = (
        "import time, torch; from benchmarks.kda import chunk_kda, inputs; x = inputs('tame', 1, 8192, 32);"
        "x = {n: t.detach().requires_grad_() for n, t in x.items()}; torch.cuda.synchronize(); t = time.time();"
        "chunk_kda(**x)[0].sum().backward(); torch.cuda.synchronize(); print(time.time() - t)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    yield {"first_forward_and_backward_s": round(float(run.stdout), 2)}


def small() -> None:
    """Small launches of every kernel of the backward for compute-sanitizer."""
    for regime in REGIMES:
        for N in (0, 4):
            x = {name: t.detach().requires_grad_() for name, t in inputs(regime, 1, 200, 2).items()}
            cu_seqlens = torch.tensor([0, 0, 70, 130, 200], dtype=torch.int32, device="cuda") if N else None
            o, state = chunk_kda(**x, cu_seqlens=cu_seqlens, output_final_state=True)
            (o.float().sum() + state.sum()).backward()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-peers", action="store_true", help="leave fla out (its first calls autotune for minutes)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="nothing but these (default: all)")
    parser.add_argument("--tune", action="store_true", help="time candidates of the stages and take the best ones")
    parser.add_argument("--compile-candidates", action="store_true", help="only compile what --tune will time")
    parser.add_argument("--only", nargs="+", default=[], help="of the times, only these cases, such as 1x8192x32")
    parser.add_argument("--small", action="store_true", help="only launch small cases (for compute-sanitizer)")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/, with device and date)")
    args = parser.parse_args()
    if args.small or args.compile_candidates:
        (small if args.small else compile_candidates)()
        return
    out, peers = args.out or default_path("kda_training"), fla_chunk_kda is not None and not args.no_peers
    start, found = time.time(), {part: [] for part in args.parts}
    rows = {
        "cold": cold_rows(),
        "errors": error_rows(peers),
        "stages": stage_rows(args.tune),
        "times": time_rows(peers, args.only),
    }
    for part in args.parts:
        for row in rows[part]:
            print(row, flush=True)
            found[part].append(row)
            write(out, "kda_training", **found)  # at once: what comes next may fail
        print(f"{part}: {time.time() - start:.0f} s since the start", flush=True)


if __name__ == "__main__":
    main()
