"""Seconds and memory of prompts through the full 48B shape on one GPU, beside transformers' native class and the limit.

    python -m benchmarks.prefill [--tokens 8192 32768 131072 1048576] [--profile 32768] [--native] [--out result.json]

The model has the released shape and random bf16 weights, drawn on the GPU; prompts are random tokens. Measured is one
forward over the prompt that fills a cache and returns the logits of the last position, as generate() does it. GiB is
the peak of allocated memory above the weights, the cache included. `peer` and `limit` are those of the table below,
measured and counted once (see its comment); `--native` measures the peer again, in the same run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_model import free_memory, held_bytes, native_model, random_model, released_config
from benchmarks.record import write
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

# tokens: (goal s, goal GiB, native s, native GiB, limit s). Native: transformers 5.23.0 with fla 0.6.0 on one H200,
# 2026-11-23. Limit: operations at 690 TFLOP/s, the bf16 rate measured there.
REFERENCE: dict[int, tuple[float | None, ...]] = {
    8192: (0.13, None, 0.27, None, 0.08),
    32768: (0.55, None, 1.09, None, 0.40),
    131072: (3.8, 6.0, 6.0, 31.5, 2.6),
    1048576: (170.0, 20.0, None, None, 110.0),
}
_GIB = 2**30


@torch.no_grad()
def measure(model: torch.nn.Module, tokens: int, repeats: int, **options: Any) -> dict[str, Any]:
    """One prompt, `repeats` times behind as many warm-ups as are short: seconds, GiB above weights and of the cache."""
    weights = torch.cuda.memory_allocated()
    ids = torch.randint(0, 100_000, (1, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    seconds, cache_gib = [], None
    for run in range(repeats + (tokens <= 131072)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = model(ids, logits_to_keep=1, use_cache=True, **options)
        finite = bool(torch.isfinite(output.logits).all())  # waits for the GPU
        elapsed = time.perf_counter() - start
        if not finite:
            raise SystemExit(f"{tokens} tokens: the logits are not finite")
        cache_gib = held_bytes(output.past_key_values) / _GIB
        del output
        if run or tokens > 131072:
            seconds.append(elapsed)
    return {
        "tokens": tokens,
        "s": statistics.median(seconds),
        "all_s": seconds,
        "gib_above_weights": (torch.cuda.max_memory_allocated() - weights) / _GIB,
        "cache_gib": cache_gib,
    }


@torch.no_grad()
def profile(model: torch.nn.Module, tokens: int, rows: int = 40) -> list[dict[str, Any]]:
    """Time on the GPU by kernel of one prompt, longest first."""
    ids = torch.randint(0, 100_000, (1, tokens), device="cuda")
    model(ids, logits_to_keep=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        model(ids, logits_to_keep=1)
        torch.cuda.synchronize()
    kernels = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return [{"kernel": k.key[:110], "ms": k.self_device_time_total / 1e3, "calls": k.count} for k in kernels[:rows]]


def show(rows: list[dict[str, Any]], native: dict[int, dict[str, Any]]) -> None:
    """Print goal, peer, limit and ours."""
    print("  tokens |   goal s  GiB |   peer s   GiB | limit s |   ours s   GiB (cache) | tokens/s | of limit")
    for row in rows:
        goal, goal_gib, peer, peer_gib, limit = REFERENCE.get(row["tokens"], (None,) * 5)
        if row["tokens"] in native:
            peer, peer_gib = (native[row["tokens"]][key] for key in ("s", "gib_above_weights"))
        cells = [f"{x:.2f}" if x is not None else "-" for x in (goal, goal_gib, peer, peer_gib, limit)]
        share = f"{limit / row['s']:.0%}" if limit is not None else "-"
        print(
            f"{row['tokens']:8} | {cells[0]:>8} {cells[1]:>4} | {cells[2]:>8} {cells[3]:>5} | {cells[4]:>7} | "
            f"{row['s']:8.3f} {row['gib_above_weights']:5.2f} ({row['cache_gib']:.2f}) | "
            f"{row['tokens'] / row['s']:8.0f} | {share:>8}",
            flush=True,
        )


def run(label: str, make: Callable[[], torch.nn.Module], arguments: argparse.Namespace) -> tuple[list, list]:
    """(rows of `measure`, rows of `profile`) of one model, which is dropped again."""
    start = time.perf_counter()
    model = make()
    torch.cuda.synchronize()
    print(f"{label}: weights drawn in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    rows = []
    for tokens in arguments.tokens:
        progress = {"prompt_progress": _print_progress} if label == "ours" and tokens > 131072 else {}
        rows.append(measure(model, tokens, arguments.repeats if tokens <= 131072 else 1, **progress))
        print(f"{label}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows, profile(model, arguments.profile) if arguments.profile else []


def _print_progress(done: int, total: int) -> None:
    print(f"{time.perf_counter():.1f} s: {done} of {total}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(REFERENCE))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of prompts up to 131072 tokens; else one")
    parser.add_argument("--profile", type=int, help="print time by kernel of a prompt of so many tokens")
    parser.add_argument("--layers", type=int, help="only the first so many layers, for a smaller GPU (default: all)")
    parser.add_argument("--native", action="store_true", help="measure transformers' native class too")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    rows, kernels = run(
        "ours", lambda: random_model(KimiLinearForCausalLM, released_config(layers=arguments.layers)), arguments
    )
    write(arguments.out, "prefill", ours=rows, profile=kernels)  # at once: what comes next may fail
    free_memory()
    native = (
        run("native", lambda: native_model(released_config(layers=arguments.layers)), arguments)[0]
        if arguments.native
        else []
    )
    show(rows, {row["tokens"]: row for row in native})
    for kernel in kernels:
        print(f"{kernel['ms']:9.2f} ms {kernel['calls']:6} x  {kernel['kernel']}")
    write(arguments.out, "prefill", ours=rows, native=native, profile=kernels)


if __name__ == "__main__":
    main()
