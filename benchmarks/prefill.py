"""Seconds and memory of prompts through the full 48B shape on one GPU, beside transformers' native class and the limit.

    python -m benchmarks.prefill [--tokens 16 128 1024 4096 8192 32768 131072 1048576] [--batches 64x1024 32x10..4000]
                                 [--over 1024] [--layers 16] [--by-layers] [--profile 32768] [--native] [--out FILE]

The model has the released shape and random bf16 weights, drawn on the GPU; prompts are random tokens. Measured is one
forward over the prompt that fills a cache and returns the logits of the last position, as generate() does it. `host` is
the time until that call returns, where the GPU need not be done yet; `first` that of the first call of its length. GiB
is the peak of allocated memory above the weights, the cache included. `peer` and `limit` are those of the table below,
measured and counted once (see its comment); `--native` measures the peer again, in the same run. A batch is
ROWSxTOKENS, or ROWSxFEWEST..MOST for rows of random lengths, padded on the left. `--over` measures each prompt over a
cache that holds so many tokens too, `--by-layers` without captured and packed plans, as models with hooks run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_model import (
    free_memory,
    held_bytes,
    native_model,
    random_cache,
    random_model,
    read_bandwidth,
    released_config,
    step_bytes,
)
from benchmarks.record import write
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

# tokens: (goal s, goal GiB, native s, native GiB, limit s). Native: transformers 5.23.0 with fla 0.6.0 on one H200,
# 2026-11-23. Limit: operations at 690 TFLOP/s, the bf16 rate measured there.
# Up to 4,096 tokens: ../shared/anchors.md's goals for an H200; limits also count the bytes of the weights in use.
REFERENCE: dict[int, tuple[float | None, ...]] = {
    16: (0.012, None, None, None, 0.009),
    128: (0.026, None, None, None, 0.020),
    1024: (0.030, None, None, None, 0.021),
    4096: (0.060, None, None, None, 0.036),
    8192: (0.13, None, 0.27, None, 0.08),
    32768: (0.55, None, 1.09, None, 0.40),
    131072: (3.8, 6.0, 6.0, 31.5, 2.6),
    1048576: (170.0, 20.0, None, None, 110.0),
}
_GIB = 2**30


def draw_mask(batch: str) -> torch.Tensor:
    """The mask [B, T] of a batch ("64x1024" or "32x10..4000"), padded on the left."""
    rows, lengths = batch.split("x")
    fewest, most = (int(n) for n in (lengths.split("..") * 2)[:2])
    drawn = torch.randint(fewest, most + 1, (int(rows), 1), generator=torch.Generator().manual_seed(0))
    return (torch.arange(most) >= most - drawn).long().to("cuda")


@torch.no_grad()
def measure(
    model: torch.nn.Module, tokens: int, repeats: int, batch: str | None = None, over: int = 0, **options: Any
) -> dict[str, Any]:
    """One prompt, `repeats` times after as many warm-ups as are short: seconds, GiB above weights and of the cache.

    `batch` says which rows, instead of one row of `tokens`; with `over`, a cache holds so many tokens before.
    """
    weights = torch.cuda.memory_allocated()
    mask = draw_mask(f"1x{tokens}" if batch is None else batch)
    ids = torch.randint(0, 100_000, mask.shape, device="cuda")
    tokens = int(mask.sum())
    if batch is not None:
        options["attention_mask"] = mask
    torch.cuda.reset_peak_memory_stats()
    seconds, host, cache_gib = [], [], None
    for _ in range(repeats + (tokens <= 131072)):
        if over:
            options["past_key_values"] = random_cache(model, mask.shape[0], over, room=mask.shape[1])
            options["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], over), mask], dim=1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = model(ids, logits_to_keep=1, use_cache=True, **options)
        host.append(time.perf_counter() - start)
        finite = bool(torch.isfinite(output.logits).all())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
        if not finite:
            raise SystemExit(f"{batch or tokens} tokens: the logits are not finite")
        cache_gib = held_bytes(output.past_key_values) / _GIB
        del output
    warm = int(len(seconds) > repeats)
    return {
        "tokens": tokens,
        "batch": batch,
        "over": over,
        "s": statistics.median(seconds[warm:]),
        "all_s": seconds[warm:],
        "host_s": statistics.median(host[warm:]),
        "first_s": seconds[0],
        "limit_s": prompt_limit(model, tokens) if isinstance(model, KimiLinearForCausalLM) else None,
        "gib_above_weights": (torch.cuda.max_memory_allocated() - weights) / _GIB,
        "cache_gib": cache_gib,
    }


def prompt_limit(model: KimiLinearForCausalLM, tokens: int) -> float:
    """Seconds that a prompt takes at least: the bytes of the weights that it uses, or the operations on them."""
    config, operations = model.config, 0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            used = config.num_experts_per_token / config.num_experts if ".experts." in name else 1
            operations += 2 * tokens * parameter.numel() * used
    return max(step_bytes(model, 1, 0, tokens) / read_bandwidth(), operations / 690e12)


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


def show(rows: list[dict[str, Any]], native: dict[int, dict[str, Any]], whole: bool) -> None:
    """Print goal, peer, limit and ours; a model that is not `whole` has limits of its own."""
    print(
        "  tokens (batch, over) |   goal s  GiB |   peer s   GiB | limit s |   ours s   GiB (cache) | host ms | "
        "first s | tokens/s | of limit"
    )
    for row in rows:
        alone = whole and row["batch"] is None and not row["over"]
        goal, goal_gib, peer, peer_gib, limit = REFERENCE.get(row["tokens"] if alone else 0, (None,) * 5)
        limit = row["limit_s"] if limit is None else limit
        if row["tokens"] in native:
            peer, peer_gib = (native[row["tokens"]][key] for key in ("s", "gib_above_weights"))
        cells = [f"{x:.3f}" if x is not None else "-" for x in (goal, goal_gib, peer, peer_gib, limit)]
        name = f"{row['tokens']} ({row['batch'] or '-'}, {row['over'] or '-'})"
        share = f"{limit / row['s']:.0%}" if limit is not None else "-"
        print(
            f"{name:>22} | {cells[0]:>8} {cells[1]:>4} | {cells[2]:>8} {cells[3]:>5} | {cells[4]:>7} | "
            f"{row['s']:8.4f} {row['gib_above_weights']:5.2f} ({row['cache_gib']:.2f}) | "
            f"{1e3 * row['host_s']:7.1f} | {row['first_s']:7.2f} | {row['tokens'] / row['s']:8.0f} | {share:>8}",
            flush=True,
        )


def run(label: str, make: Callable[[], torch.nn.Module], arguments: argparse.Namespace) -> tuple[list, list]:
    """(rows of `measure`, rows of `profile`) of one model, which is dropped again."""
    start = time.perf_counter()
    model = make()
    torch.cuda.synchronize()
    print(f"{label}: weights drawn in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    if arguments.by_layers and label == "ours":
        model.model.norm.register_forward_hook(lambda module, inputs, output: None)
        print(f"ours: {model.decode_path}", file=sys.stderr, flush=True)
    cases = [(tokens, None, 0) for tokens in arguments.tokens]
    if label == "ours":
        cases += [(tokens, None, over) for over in arguments.over for tokens in arguments.tokens]
        cases += [(0, batch, 0) for batch in arguments.batches]
    rows = []
    for tokens, batch, over in cases:
        progress = {"prompt_progress": _print_progress} if label == "ours" and tokens > 131072 else {}
        repeats = arguments.repeats if tokens <= 131072 else 1
        rows.append(measure(model, tokens, repeats, batch, over, **progress))
        print(f"{label}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows, profile(model, arguments.profile) if arguments.profile else []


def _print_progress(done: int, total: int) -> None:
    print(f"{time.perf_counter():.1f} s: {done} of {total}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(REFERENCE))
    parser.add_argument("--batches", nargs="*", default=[], help="ROWSxTOKENS or ROWSxFEWEST..MOST")
    parser.add_argument("--over", type=int, nargs="*", default=[], help="also over a cache of so many tokens")
    parser.add_argument("--by-layers", action="store_true", help="layer by layer, as with a hook on a module")
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
    show(rows, {row["tokens"]: row for row in native}, whole=arguments.layers is None)
    for kernel in kernels:
        print(f"{kernel['ms']:9.2f} ms {kernel['calls']:6} x  {kernel['kernel']}")
    write(arguments.out, "prefill", ours=rows, native=native, profile=kernels)


if __name__ == "__main__":
    main()
