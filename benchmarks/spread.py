"""Milliseconds a token and seconds a prompt of the full 48B shape, spread over two GPUs by accelerate.

    python -m benchmarks.spread [--cases 4096x1 131072x1 1024x64] [--prompts 1024 32768 131072] [--first 14]
                                [--layers 27] [--repeats 3] [--out result.json]

The model has the released shape and random bf16 weights, drawn where they stay: the embedding and the first layers on
the first GPU, the others and the head on the second. A case is CONTEXTxBATCH over a cache filled with random values:
`greedy` is `generate()` as a user calls it; `step` one step after another, each of which waits for the one before it;
`parts` are the parts' graphs, replayed alone. A prompt is one forward with a new cache and the last position's logits.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_model import random_cache, random_model, released_config
from benchmarks.record import write
from kimi_linear.hub_card.measure.timing import generate_ms, wait_for_gpus
from kimi_linear.modeling.decode.step import DecodeStep
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

# From issue 13, on two H100: context x batch to ms a token, and tokens of a prompt to seconds.
GOALS_MS = {"4096x1": 2.9, "131072x1": 3.3, "1024x64": 34.0}
GOALS_S = {131072: 2.1, 1048576: 85.0}


def device_map(layers: int, first: int) -> dict[str, int]:
    """Where `accelerate` is told to put the modules: `first` layers and the embedding on GPU 0, the rest on GPU 1."""
    places = {"model.embed_tokens": 0} | {f"model.layers.{i}": int(i >= first) for i in range(layers)}
    return places | {"model.norm": int(first < layers), "lm_head": 1}


def step_ms(step: DecodeStep, cache: Any, repeats: int = 60) -> float:
    """Time of one step among many, of which none begins before the one before it has ended on every GPU."""
    ids = torch.randint(0, 1000, (step.batch, step.tokens), device=step.device)
    streams = [torch.cuda.current_stream(part.device) for part in step.parts]
    for run in range(2 * repeats):
        if run == repeats:
            wait_for_gpus()
            start = time.perf_counter()
        with step.lock:
            step.prepare(cache, ids)
            step.run()  # without `commit`: the next one begins at the same position
        streams[0].wait_event(streams[-1].record_event())
    wait_for_gpus()
    return (time.perf_counter() - start) / repeats * 1e3


def parts_ms(step: DecodeStep, cache: Any, repeats: int = 40) -> list[float]:
    """Median time of each part's graph alone."""
    ids, medians = torch.randint(0, 1000, (step.batch, step.tokens), device=step.device), []
    with step.lock:
        step.prepare(cache, ids)
        step.run()
        for part in step.parts:
            wait_for_gpus()
            times = []
            with torch.cuda.device(part.device):
                for _ in range(repeats):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    part.plan.past.fill_(cache.get_seq_length())
                    start.record()
                    part.run()
                    end.record()
                    torch.cuda.synchronize()
                    times.append(start.elapsed_time(end))
            medians.append(statistics.median(times[repeats // 4 :]))
    return medians


@torch.no_grad()
def decode(model: Any, case: str) -> dict[str, Any]:
    """One case: the step, its parts, and `generate()`."""
    context, batch = (int(part) for part in case.split("x"))
    step = model._decode.step(model, batch, 1)
    if step is None:
        raise SystemExit(f"{case}: the model decodes {model.decode_path}")
    cache = random_cache(model, batch, context)
    row: dict[str, Any] = {"case": case, "step_ms": step_ms(step, cache), "parts_ms": parts_ms(step, cache)}
    new_tokens = (4, 36) if batch >= 64 else (8, 136)
    row["greedy_ms"] = generate_ms(model, cache, batch, new_tokens, do_sample=False, eos_token_id=None)
    row["goal_ms"] = GOALS_MS.get(case)
    return row


@torch.no_grad()
def prompt(model: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of a prompt, and the peak of memory on each GPU above what lay there before."""
    ids, seconds = torch.randint(0, 100_000, (1, tokens), device=model.device), []
    before = [torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count())]
    for i in range(len(before)):
        torch.cuda.reset_peak_memory_stats(i)
    for _ in range(repeats + 1):
        wait_for_gpus()
        start = time.perf_counter()
        output = model(ids, logits_to_keep=1, use_cache=True)
        finite = bool(torch.isfinite(output.logits).all())
        wait_for_gpus()
        seconds.append(time.perf_counter() - start)
        del output
        if not finite:
            raise SystemExit(f"{tokens} tokens: the logits are not finite")
    peaks = [(torch.cuda.max_memory_allocated(i) - held) / 2**30 for i, held in enumerate(before)]
    timed = seconds[1:] or seconds
    return {
        "tokens": tokens,
        "s": statistics.median(timed),
        "all_s": seconds,
        "gib": peaks,
        "goal_s": GOALS_S.get(tokens),
    }


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(GOALS_MS), help="CONTEXTxBATCH")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1024, 32768, 131072], help="tokens")
    parser.add_argument("--layers", type=int, default=27, help="only the first so many layers")
    parser.add_argument("--first", type=int, help="layers on the first GPU (default: half of them, and one more)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a prompt, after one that is not")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    first = (arguments.layers + 1) // 2 if arguments.first is None else arguments.first
    start = time.perf_counter()
    places = device_map(arguments.layers, first)
    model = random_model(KimiLinearForCausalLM, released_config(layers=arguments.layers), places)
    wait_for_gpus()
    print(f"weights drawn in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    rows: dict[str, list] = {"decode": [], "prompts": []}
    for case in arguments.cases:
        rows["decode"].append(decode(model, case))
        print(rows["decode"][-1], flush=True)
        write(arguments.out, "spread", **rows)
    for tokens in arguments.prompts:
        rows["prompts"].append(prompt(model, tokens, arguments.repeats))
        print(rows["prompts"][-1], flush=True)
        write(arguments.out, "spread", **rows)


if __name__ == "__main__":
    main()
