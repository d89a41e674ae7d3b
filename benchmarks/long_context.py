"""Milliseconds a token and GiB of cache against context length: this model, all-MLA, and transformers' native class.

    python -m benchmarks.long_context [--contexts 4096 16384 65536 131072 262144 524288 1048576]
                                      [--models hybrid all_mla native] [--out result.json]

The paper's Fig. 1b and 7 on one GPU. All have the released shape and random bf16 weights, drawn on the GPU; all-MLA has
MLA in every layer instead of KDA in three of four. Caches are filled with random values. Each context is measured at
batch 1 and, by steps alone, at the largest batch (a power of two up to 64) whose cache fits beside the weights, for a
smaller cache allows larger batches. `step` is one replay of the captured step, `generate()` greedy as benchmarks.decode
times it. Native is transformers' own class, by generate() alone and as far as its memory goes. Limits are the bytes
that a step must move at the copy bandwidth of an H200. The record is written after every case.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import NATIVE_NEW_TOKENS, NEW_TOKENS, REFERENCE
from benchmarks.full_model import (
    cache_bytes,
    free_memory,
    held_bytes,
    native_cache,
    native_model,
    random_cache,
    random_model,
    read_bandwidth,
    released_config,
    step_bytes,
)
from benchmarks.record import default_path, write
from kimi_linear.hub_card.measure.timing import WAYS, generate_ms, replay_ms
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

CONTEXTS = [4096, 16384, 65536, 131072, 262144, 524288, 1048576]
MODELS = ["hybrid", "all_mla", "native"]
LARGEST_BATCH = 64
# all-MLA : hybrid in the paper (arXiv 2510.26692, Fig. 1b and 7), ms a token.
PAPER_BATCH_1 = {524288: 1.8, 1048576: 2.2}
PAPER_LARGER_BATCHES = {1048576: 6.3}
# Left free beside weights and cache: buffers of the steps, their capture, sampling.
_SPARE_BYTES = 4 * 2**30
_GIB = 2**30

Row = dict[str, Any]


def largest_batch(config: Any, context: int, free: int) -> int:
    """The largest power of two, up to `LARGEST_BATCH`, of sequences of `context` tokens whose cache fits `free`."""
    batch = LARGEST_BATCH
    while batch > 1 and cache_bytes(config, batch, context) > free:
        batch //= 2
    return batch


@torch.no_grad()
def measure(model: Any, context: int, batch: int) -> Row:
    """One case of a model of ours: ms of a step, at batch 1 also inside `generate()`."""
    step = model._decode.step(model, batch, 1)
    if step is None:
        raise SystemExit(f"the model decodes {model.decode_path}")
    cache = random_cache(model, batch, context, room=2 * sum(NEW_TOKENS) if batch == 1 else 1)
    row = {
        "cache_gib": held_bytes(cache) / _GIB,
        "limit_ms": step_bytes(model, batch, context) / read_bandwidth() * 1e3,
        "step_ms": replay_ms(step, cache, repeats=20),
    }
    return {**row, "generate_ms": generate_ms(model, cache, batch, **WAYS["greedy"])} if batch == 1 else row


@torch.no_grad()
def measure_native(model: Any, context: int, batch: int) -> Row:
    """The same for transformers' own class."""
    cache = native_cache(model, batch, context)
    held = held_bytes(cache) / _GIB
    return {"cache_gib": held, "generate_ms": generate_ms(model, cache, batch, NATIVE_NEW_TOKENS, **WAYS["greedy"])}


def fitting(measure_case: Any, model: Any, context: int, batch: int) -> Row:
    """A row of `measure_case`, or one that says that the memory does not suffice."""
    try:
        return {"context": context, "batch": batch, "fits": True, **measure_case(model, context, batch)}
    except torch.OutOfMemoryError:
        return {"context": context, "batch": batch, "fits": False}


def rows_of(name: str, contexts: list[int], add: Any) -> None:
    """Measure one model, which is dropped again; `add` takes each row."""
    native, start = name == "native", time.perf_counter()
    make = native_model if native else lambda config: random_model(KimiLinearForCausalLM, config)
    model = make(released_config(all_mla=name == "all_mla"))
    torch.cuda.synchronize()
    print(f"{name}: weights drawn in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    for context in contexts:
        batches = [1]
        if not native:
            batches = sorted({1, largest_batch(model.config, context, free_memory() - _SPARE_BYTES)})
        for batch in batches:
            free_memory()
            row = {"model": name, **fitting(measure_native if native else measure, model, context, batch)}
            add(row)
            print(f"{time.perf_counter() - start:5.1f} s: {row}", file=sys.stderr, flush=True)
        if native and not row["fits"]:
            return


def ratios(rows: list[Row]) -> list[Row]:
    """all-MLA : hybrid by context: step and `generate()` at batch 1, and ms a token at each one's largest batch."""
    found = []
    for context in dict.fromkeys(row["context"] for row in rows):
        measured = [row for row in rows if row["context"] == context and row["fits"] and row["model"] != "native"]
        one = {row["model"]: row for row in measured if row["batch"] == 1}
        most = {row["model"]: row for row in sorted(measured, key=lambda row: row["batch"])}
        if one.keys() != {"hybrid", "all_mla"}:
            continue
        ms_a_token = {name: row["step_ms"] / row["batch"] for name, row in most.items()}
        found.append({
            "context": context,
            "step": one["all_mla"]["step_ms"] / one["hybrid"]["step_ms"],
            "generate": one["all_mla"]["generate_ms"] / one["hybrid"]["generate_ms"],
            "largest_batches": {name: row["batch"] for name, row in most.items()},
            "ms_a_token_at_largest_batches": ms_a_token,
            "at_largest_batches": ms_a_token["all_mla"] / ms_a_token["hybrid"],
        })  # fmt: skip
    return found


def show(rows: list[Row]) -> None:
    """Print goal, peer, limit, ours and the ratios of all-MLA to ours, which is hybrid."""
    ratio = {row["context"]: row for row in ratios(rows)}
    print(
        "batch 1 |  goal |   peer | ours: limit   step generate() | all MLA: limit   step generate() | "
        "ratio: step generate() paper | cache GiB: ours all MLA   peer"
    )
    for context in dict.fromkeys(row["context"] for row in rows):
        at = {row["model"]: row for row in rows if row["context"] == context and row["batch"] == 1}
        ours, full, native = (at.get(name, {}) for name in MODELS)
        both, (goal, recorded) = ratio.get(context, {}), REFERENCE.get(f"{context}x1", (None, None))
        print(
            f"{context:7} | {_cell(goal, 5, 1)} | {_cell(native.get('generate_ms', recorded), 6, 1)} | "
            f"{_cell(ours.get('limit_ms'), 11)} {_cell(ours.get('step_ms'), 6)} {_cell(ours.get('generate_ms'), 10)} | "
            f"{_cell(full.get('limit_ms'), 14)} {_cell(full.get('step_ms'), 6)} {_cell(full.get('generate_ms'), 10)} | "
            f"{_cell(both.get('step'), 11)} {_cell(both.get('generate'), 10)} "
            f"{_cell(PAPER_BATCH_1.get(context), 5, 1)} | {_cell(ours.get('cache_gib'), 15)} "
            f"{_cell(full.get('cache_gib'), 7)} {_cell(native.get('cache_gib'), 6)}"
        )
    print("context | largest batch: ours  ms/token | all MLA  ms/token | ratio paper")
    for context, both in ratio.items():
        batch, ms = both["largest_batches"], both["ms_a_token_at_largest_batches"]
        print(
            f"{context:7} | {batch['hybrid']:19} {ms['hybrid']:9.3f} | {batch['all_mla']:7} {ms['all_mla']:9.3f} | "
            f"{both['at_largest_batches']:5.2f} {_cell(PAPER_LARGER_BATCHES.get(context), 5, 1)}",
            flush=True,
        )


def _cell(x: float | None, width: int, digits: int = 2) -> str:
    return f"{'-' if x is None else f'{x:.{digits}f}':>{width}}"


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache, ascending")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/, with device and date)")
    arguments = parser.parse_args()
    out, rows = arguments.out or default_path("long_context"), []

    def add(row: Row) -> None:
        rows.append(row)
        write(out, "long_context", rows=rows, all_mla_to_hybrid=ratios(rows))

    for name in arguments.models:
        free_memory()
        rows_of(name, sorted(arguments.contexts), add)
    show(rows)


if __name__ == "__main__":
    main()
