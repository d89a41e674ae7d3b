"""Prompt lookup on the small trained checkpoint, on the CPU: seconds per token with and without it, same greedy tokens.

    python -m benchmarks.speculative [--tokens 128] [--repeats 5] [--out result.json]

Prompt lookup is for answers that repeat what was there: assignments, numbers, a table. Prose, from topics that the
checkpoint was not trained on, shows what it costs elsewhere. Plain and speculative runs alternate; medians
are reported. The last row is the processor time of single steps with and without recording.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

import kimi_linear.hub_card
from kimi_linear.hub_card.small_corpus import load_corpus
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

SMALL_CHECKPOINT = Path(kimi_linear.hub_card.__file__).parent / "small_checkpoint"
DRAFTS = (4, 8)
RULE, ROW = "+---------+---------+\n", "| item    | number  |\n"
REPETITIVE = {
    "assignments": "x = 1\ny = 2\n" * 20,
    "numbers": "1, 2, 3, 4, 5, " * 12,
    "table": RULE + (ROW + RULE) * 7,
}
# The checkpoint has no talent for copying: it goes on from this in words of its own.
REPEATED_PROMPT = {"prose: one sentence 12 times": "The sequence types support the same operations. " * 12}


def prompts() -> dict[str, str]:
    """Prompt texts by name; those whose names begin with "prose" don't repeat themselves."""
    held_out = load_corpus().held_out
    names = [name for name in sorted(held_out) if len(held_out[name]) > 1500][:2]
    return {**REPETITIVE, **REPEATED_PROMPT, **{f"prose: {name}": held_out[name][:800] for name in names}}


def generated(model: KimiLinearForCausalLM, ids: torch.Tensor, tokens: int, drafts: int) -> tuple[torch.Tensor, float]:
    """(sequence, seconds per new token) of one greedy run; `drafts` 0 is plain."""
    options = {"prompt_lookup_num_tokens": drafts} if drafts else {}
    start = time.perf_counter()
    sequence = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
    return sequence, (time.perf_counter() - start) / (sequence.shape[1] - ids.shape[1])


def row_of(model: KimiLinearForCausalLM, name: str, ids: torch.Tensor, tokens: int, repeats: int) -> dict:
    """One prompt: medians of each way, calls of the model for each, whether the tokens were the same."""
    ways, calls = (0, *DRAFTS), []
    hook = model.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    seconds, sequences, counts = {way: [] for way in ways}, {}, {}
    for _ in range(repeats + 1):
        for way in ways:
            calls.clear()
            sequences[way], taken = generated(model, ids, tokens, way)
            seconds[way].append(taken)
            counts[way] = len(calls)
    hook.remove()
    medians = {way: statistics.median(values[1:]) for way, values in seconds.items()}  # the first run warms up
    return {
        "prompt": name,
        "prompt_tokens": ids.shape[1],
        "plain_ms_per_token": 1e3 * medians[0],
        "lookup": [
            {
                "drafts": way,
                "ms_per_token": 1e3 * medians[way],
                "speed_up": medians[0] / medians[way],
                "calls": counts[way],
                "same_tokens": torch.equal(sequences[way], sequences[0]),
            }
            for way in DRAFTS
        ],
    }


@torch.no_grad()
def recording_row(model: KimiLinearForCausalLM, ids: torch.Tensor, steps: int) -> dict:
    """Medians of single steps' processor time over two caches, one of which records; the steps alternate."""
    caches = {"plain": KimiLinearCache(model.config), "recording": KimiLinearCache(model.config)}
    caches["recording"].activate_past_recording()
    seconds = {name: [] for name in caches}
    for cache in caches.values():
        model(ids, past_key_values=cache)
    for _ in range(steps):
        for name, cache in caches.items():
            start = time.process_time()  # not the clock's: 2% would drown in other work on the machine
            model(ids[:, :1], past_key_values=cache)
            seconds[name].append(time.process_time() - start)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name}_ms": value for name, value in medians.items()},
        "ratio": medians["recording"] / medians["plain"],
    }


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    model = KimiLinearForCausalLM.from_pretrained(SMALL_CHECKPOINT, dtype=torch.float32).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(SMALL_CHECKPOINT), []
    for name, text in prompts().items():
        ids = tokenizer(text, return_tensors="pt").input_ids
        rows.append(row_of(model, name, ids, arguments.tokens, arguments.repeats))
        figures = ["{drafts}: {speed_up:.2f}x in {calls} calls".format(**way) for way in rows[-1]["lookup"]]
        same = all(way["same_tokens"] for way in rows[-1]["lookup"])
        print(
            f"{name:28} plain {rows[-1]['plain_ms_per_token']:6.2f} ms/token, drafts of {', '.join(figures)}; {same=}"
        )
    recording = recording_row(model, ids, steps=300)
    print(
        "single steps, processor time: {plain_ms:.2f} ms, recording {recording_ms:.2f} ms ({ratio:.3f})".format(
            **recording
        )
    )
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join(["python -m benchmarks.speculative", *sys.argv[1:]]),
        "device": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "load_average": os.getloadavg()[0],  # of the minute before; other work on the machine blurs the figures
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": {"checkpoint": "hub_card/small_checkpoint", "dtype": "float32", "new_tokens": arguments.tokens},
        "rows": rows,
        "single_steps": recording,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
