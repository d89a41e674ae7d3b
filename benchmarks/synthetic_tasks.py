"""
The synthetic tasks of arXiv 2510.26692, Fig. 4, with two layers of KDA beside two of full attention (MLA):

    python -m benchmarks.synthetic_tasks                 # 20 minutes at most on one GPU
    python -m benchmarks.synthetic_tasks --plot OUT.svg RECORD.json

Each model has two heads of 128 channels, as in the paper; MLA has no position encoding, as in Kimi Linear. A run
trains on fresh sequences and is measured on others; it ends at its steps, or as soon as it solves its task (accuracy
of SOLVED). The learning rates are tried in their order until one solves; the best accuracy of all counts. Results go
to a JSON file after each run, and runs that stand there are not done again: interrupted, the command goes on.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.captured_training import CapturedTraining
from benchmarks.small_runs import SmallRuns, add_options, draw_record
from benchmarks.synthetic_data import IGNORED, TASKS
from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

LENGTHS = (256, 512, 1024, 2048)
MODELS = ("kda", "full attention")
LEARNING_RATES = (1e-3, 2e-3, 5e-4)
TOKENS_A_STEP = 2**15
STEPS = 5000
EVALUATE_EVERY = 250
EVALUATED_TOKENS = 2**18
SOLVED = 0.999
WARM_UP_STEPS = 100
POOL_TOKENS = 2**23  # made at a time


def build(kind: str, vocab_size: int) -> KimiLinearForCausalLM:
    """Two layers of one kind with dense MLPs, in fp32."""
    kda_layers, full_attn_layers = ([1, 2], []) if kind == "kda" else ([], [1, 2])
    config = KimiLinearConfig(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_experts=None,
        first_k_dense_replace=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        linear_attn_config={
            "head_dim": 128, "num_heads": 2, "kda_layers": kda_layers, "full_attn_layers": full_attn_layers,
        },
    )  # fmt: skip
    return KimiLinearForCausalLM(config)


def batches(task: str, length: int, rows: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
    """Fresh ids and targets [rows, length], for ever."""
    make, _ = TASKS[task]
    while True:
        pool = make(max(rows, POOL_TOKENS // length), length, generator)
        yield from zip(*(x.split(rows) for x in pool))


@torch.no_grad()
def accuracy(model: KimiLinearForCausalLM, ids: torch.Tensor, targets: torch.Tensor, rows: int) -> float:
    """Share of targets [P, T] that the model finds most probable."""
    right = total = 0
    for x, y in zip(ids.split(rows), targets.split(rows)):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            found = model(input_ids=x, use_cache=False).logits.argmax(-1)
        asked = y != IGNORED
        right, total = right + (found == y)[asked].sum(), total + asked.sum()
    return float(right / total)


def run(task: str, length: int, kind: str, rate: float, steps: int, device: str) -> dict[str, Any]:
    """Train one model; accuracy at its end, steps and seconds that it took."""
    torch.manual_seed(0)
    started = time.perf_counter()
    rows = max(1, TOKENS_A_STEP // length)
    model = build(kind, TASKS[task][1]).to(device).train()
    loss_of = functools.partial(F.cross_entropy, ignore_index=IGNORED)
    training = CapturedTraining(model, loss_of, rate, weight_decay=0.0)
    data = batches(task, length, rows, torch.Generator(device).manual_seed(1))
    held_out = TASKS[task][0](max(rows, EVALUATED_TOKENS // length), length, torch.Generator(device).manual_seed(2))
    found = 0.0
    bar = tqdm(range(1, steps + 1), desc=f"{task} {length} {kind} lr {rate:g}", leave=False, mininterval=1.0)
    for step in bar:
        training.set_learning_rate(rate * min(1.0, step / WARM_UP_STEPS, 1.1 - step / steps))
        loss = training.step(*next(data))
        if step % EVALUATE_EVERY == 0 or step == steps:
            found = accuracy(model, *held_out, rows)
            bar.set_postfix(loss=f"{float(loss):.3f}", accuracy=f"{found:.3f}")
            if found >= SOLVED:
                break
    return {
        "task": task, "length": length, "model": kind, "learning_rate": rate, "accuracy": round(found, 5),
        "steps": step, "loss": round(float(loss), 5), "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def best(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """Of the rows with these values, the one of the highest accuracy."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return max(found, key=lambda row: row["accuracy"], default=None)


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy against length in Markdown: a line a task and model, with learning rate and steps of the best run."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| task | model | " + " | ".join(map(str, lengths)) + " |", "|---" * (2 + len(lengths)) + "|"]
    for task in TASKS:
        for kind in MODELS:
            cells = []
            for length in lengths:
                row = best(rows, task=task, model=kind, length=length)
                cells.append(f"{row['accuracy']:.3f} ({row['learning_rate']:g}, {row['steps']})" if row else "")
            lines.append(f"| {task} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Accuracy against length, a panel a task."""
    import matplotlib.pyplot as plt

    from benchmarks.figures import COLOURS, save

    tasks = [task for task in TASKS if best(rows, task=task)]
    figure, panels = plt.subplots(1, len(tasks), figsize=(0.5 + 3 * len(tasks), 2.9), sharey=True, squeeze=False)
    panels = panels[0]
    lengths = sorted({row["length"] for row in rows})
    for panel, task in zip(panels, tasks):
        for kind, colour in zip(MODELS, (COLOURS[1], COLOURS[0])):
            found = [(n, row["accuracy"]) for n in lengths if (row := best(rows, task=task, model=kind, length=n))]
            panel.plot(*zip(*found), "o-", color=colour, ms=4, label=kind)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(n) for n in lengths], fontsize=8)
        panel.set_ylim(-0.03, 1.05)
        panel.set_title(task, fontsize=9)
        panel.set_xlabel("tokens", fontsize=8)
        panel.grid(axis="y", lw=0.4, color="#dadce0")
    panels[0].set_ylabel("accuracy on new sequences", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False, loc="lower left")
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rates", nargs="+", type=float, default=LEARNING_RATES, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="most steps of a run (default: %(default)s)")
    add_options(parser, minutes=20)
    args = parser.parse_args()
    if args.plot:
        draw_record(draw, args.plot)
        return
    runs = SmallRuns("synthetic_tasks", args.minutes, args.out, table)
    cases = [(n, task, kind) for n in args.lengths for task in args.tasks for kind in args.models]
    for length, task, kind in tqdm(cases, desc="cases"):
        for rate in args.rates:
            stands = best(runs.rows, task=task, length=length, model=kind)
            if stands is not None and stands["accuracy"] >= SOLVED:
                break
            if best(runs.rows, task=task, length=length, model=kind, learning_rate=rate) is not None:
                continue
            if runs.over():
                runs.show()
                return
            runs.add(run(task, length, kind, rate, args.steps, runs.device))
            tqdm.write(json.dumps(runs.rows[-1]))
    runs.show()


if __name__ == "__main__":
    main()
