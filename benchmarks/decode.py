"""Milliseconds a token of the full 48B shape on one GPU, beside transformers' native class and the limit.

    python -m benchmarks.decode [--cases 4096x1 131072x1 1048576x1 1024x8 1024x64] [--verify 4 8] [--profile 4096x1]
                                [--sizes [2 3 5 12]] [--lora 16] [--all-mla] [--layers 16] [--native]
                                [--out result.json]

The model has the released shape and random bf16 weights, drawn on the GPU; a case is CONTEXTxBATCH over a cache filled
with random values. `step` is one replay of the captured step. `greedy`, `eos` and `sampled` are `generate()` as a user
calls it, the difference of 264 and 8 new tokens after a first call: without an end token, with one, and with default
sampling. `verify` are steps of several tokens, as speculative decoding takes them, and `recording` is `greedy` over a
cache that can take tokens back. Limits are the bytes that a step must move at the GPU's read bandwidth, those of
several tokens with experts chosen independently; `experts` is how many of them the last layer read in one step, so that
collapsed random text can't flatter; peers are transformers 5.23.0 with fla 0.6.0, measured on another
machine of that kind on 2026-11-23, and `--native` measures them again, over fewer tokens. `--sizes` takes steps of many
numbers of rows at 1k (decode_sizes.py); `--lora` gives the model an unmerged adapter before anything is measured.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_sizes import BETWEEN, add_lora, measure_sizes, show_sizes
from benchmarks.full_model import (
    free_memory,
    native_cache,
    native_model,
    random_cache,
    random_model,
    read_bandwidth,
    released_config,
    step_bytes,
)
from benchmarks.record import write
from kimi_linear.hub_card.measure.timing import NEW_TOKENS, WAYS, generate_ms, replay_ms
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

# context x batch: (goal ms, native ms)
REFERENCE = {
    "4096x1": (2.2, 94.0),
    "131072x1": (2.6, 118.0),
    "1048576x1": (4.5, None),
    "1024x8": (8.0, 115.0),
    "1024x64": (28.0, 143.0),
}
# As NEW_TOKENS, and fewer where one costs 100 ms.
LARGE_BATCH, LARGE_BATCH_NEW_TOKENS = 64, (4, 36)
NATIVE_NEW_TOKENS = (4, 20)


@torch.no_grad()
def measure(model: Any, case: str, verify: list[int]) -> dict[str, Any]:
    """One case: seconds to a captured step, ms of steps and of `generate()`, GiB above weights and cache."""
    context, batch = (int(part) for part in case.split("x"))
    weights = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step = model._decode.step(model, batch, 1)
    if step is None:
        raise SystemExit(f"{case}: the model decodes {model.decode_path}")
    torch.cuda.synchronize()
    row: dict[str, Any] = {"case": case, "capture_s": time.perf_counter() - start}
    cache = random_cache(model, batch, context)
    row["step_ms"] = replay_ms(step, cache)
    row["experts_read"] = max(int(plan.chosen.unique().numel()) for plan in step.plans)
    row["limit_ms"] = step_bytes(model, batch, context) / read_bandwidth() * 1e3
    torch.cuda.reset_peak_memory_stats()
    count = LARGE_BATCH_NEW_TOKENS if batch >= LARGE_BATCH else NEW_TOKENS
    row |= {f"{name}_ms": generate_ms(model, cache, batch, count, **options) for name, options in WAYS.items()}
    row["gib_above_weights_and_cache"] = (torch.cuda.max_memory_allocated() - weights - cache.nbytes) / 2**30
    if batch == 1:
        for n in verify:
            limit = step_bytes(model, 1, context, n) / read_bandwidth() * 1e3
            row[f"verify_{n}"] = {"ms": replay_ms(model._decode.step(model, 1, n), cache), "limit_ms": limit}
        cache.activate_past_recording()
        row["recording_ms"] = generate_ms(model, cache, batch, **WAYS["greedy"])
    return row


@torch.no_grad()
def profile(model: Any, case: str) -> list[dict[str, Any]]:
    """GPU time of one step by kernel, longest first."""
    context, batch = (int(part) for part in case.split("x"))
    step, cache = model._decode.step(model, batch, 1), random_cache(model, batch, context)
    replay_ms(step, cache, repeats=4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        replay_ms(step, cache, repeats=8)
    kernels = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return [{"kernel": k.key[:80], "us": k.self_device_time_total / 8, "calls": k.count / 8} for k in kernels[:30]]


def measure_native(model: Any, case: str) -> dict[str, Any]:
    """transformers' own class inside `generate()`, greedy."""
    context, batch = (int(part) for part in case.split("x"))
    ms = generate_ms(model, native_cache(model, batch, context), batch, NATIVE_NEW_TOKENS, **WAYS["greedy"])
    return {"case": case, "greedy_ms": ms}


def show(rows: list[dict[str, Any]], native: dict[str, dict[str, Any]]) -> None:
    """Print goal, peer, limit and ours."""
    print(
        "context x batch |  goal |  peer | limit |  step (of limit) | greedy   eos sampled | capture s | GiB | tok/s | "
        "experts"
    )
    for row in rows:
        goal, peer = REFERENCE.get(row["case"], (None, None))
        if row["case"] in native:
            peer = native[row["case"]]["greedy_ms"]
        cells = [f"{x:.1f}" if x is not None else "-" for x in (goal, peer)]
        batch = int(row["case"].split("x")[1])
        print(
            f"{row['case']:>15} | {cells[0]:>5} | {cells[1]:>5} | {row['limit_ms']:5.2f} | "
            f"{row['step_ms']:6.2f} ({row['limit_ms'] / row['step_ms']:7.0%}) | "
            f"{row['greedy_ms']:6.2f} {row['eos_ms']:5.2f} {row['sampled_ms']:7.2f} | {row['capture_s']:9.1f} | "
            f"{row['gib_above_weights_and_cache']:.1f} | {1e3 * batch / row['greedy_ms']:6.0f} | {row['experts_read']}",
            flush=True,
        )
        if "recording_ms" in row:
            print(f"{'':>15}   greedy, recording what a rollback needs: {row['recording_ms']:.2f} ms")
        for name in (name for name in row if name.startswith("verify_")):
            ms, limit = row[name]["ms"], row[name]["limit_ms"]
            print(
                f"{'':>15}   {name.replace('_', ' ')} tokens: {ms:.2f} ms, {ms / row['step_ms']:.2f} of a step "
                f"(limit {limit:.2f} ms, {limit / row['limit_ms']:.2f} of a step's)"
            )


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(REFERENCE), help="CONTEXTxBATCH")
    parser.add_argument("--verify", type=int, nargs="*", default=[], help="also steps of so many tokens, at batch 1")
    parser.add_argument("--profile", help="print one step of this case by kernel")
    parser.add_argument("--sizes", type=int, nargs="*", help="also steps of so many rows at 1k (default: a sample)")
    parser.add_argument("--lora", type=int, help="give the model an unmerged adapter of this rank")
    parser.add_argument("--all-mla", action="store_true", help="the same shape with MLA in every layer")
    parser.add_argument("--layers", type=int, help="only the first so many layers, for a smaller GPU (default: all)")
    parser.add_argument("--native", action="store_true", help="measure transformers' native class too")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    start = time.perf_counter()
    model = random_model(KimiLinearForCausalLM, released_config(arguments.all_mla, arguments.layers))
    if arguments.lora:
        add_lora(model, arguments.lora)
    torch.cuda.synchronize()
    print(f"weights drawn in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "native": [], "profile": [], "sizes": []}

    def add(part: str, *rows: dict[str, Any]) -> None:
        found[part] += rows
        write(arguments.out, "decode", **found)  # at once: what comes next may fail

    for case in arguments.cases:
        add("ours", measure(model, case, arguments.verify))
        print(found["ours"][-1], file=sys.stderr, flush=True)
    if arguments.profile:
        add("profile", *profile(model, arguments.profile))
    if arguments.sizes is not None:
        add("sizes", *measure_sizes(model, 1024, arguments.sizes or list(BETWEEN)))
    del model
    if arguments.native:
        free_memory()
        peer = native_model(released_config())
        for case in (case for case in arguments.cases if REFERENCE.get(case, (0, 0))[1]):
            add("native", measure_native(peer, case))
            print(f"native: {found['native'][-1]}", file=sys.stderr, flush=True)
    show(found["ours"], {row["case"]: row for row in found["native"]})
    if found["sizes"]:
        show_sizes(found["sizes"])
    for kernel in found["profile"]:
        print(f"{kernel['us']:9.1f} us {kernel['calls']:5.0f} x  {kernel['kernel']}")


if __name__ == "__main__":
    main()
