"""
Equal recipe, small: the 3:1 hybrid beside the same model with MLA in every layer, three seeds, one GPU:

    python -m benchmarks.equal_recipe                  # 15 minutes at most
    python -m benchmarks.equal_recipe --plot OUT.svg RECORD.json

Both read the sources of the running Python's standard library as bytes; every twentieth file is held out. Data order,
schedule, steps, widths and depth are the same; the all-MLA model gets wider MLPs until it has as many parameters.
Results go to a JSON file after each run, and runs that stand there are not done again: interrupted, the command goes
on. Such a size shows whether the hybrid learns as well per token; it says nothing of long contexts or of scale.
"""

import argparse
import itertools
import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.captured_training import CapturedTraining
from benchmarks.small_runs import SmallRuns, add_options, draw_record
from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

MODELS = ("hybrid", "all MLA")
HELD_OUT_EVERY = 20
LENGTH, ROWS, STEPS = 1024, 32, 2500
LEARNING_RATE, WARM_UP_STEPS = 1.5e-3, 200
EVALUATE_EVERY, EVALUATED_ROWS = 125, 256
LAYERS, HIDDEN = 8, 512
HYBRID_MLP = 1408


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and held-out bytes, int64; each file ends with a zero."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for i, path in enumerate(files):
        parts[i % HELD_OUT_EVERY == 0].append(path.read_bytes() + b"\0")
    training, held_out = (torch.frombuffer(bytearray(b"".join(parts[k])), dtype=torch.uint8) for k in (False, True))
    return training.long(), held_out.long()


def config_of(kind: str, intermediate_size: int) -> KimiLinearConfig:
    """Eight layers; the hybrid's fourth and eighth are MLA."""
    full = [4, 8] if kind == "hybrid" else list(range(1, LAYERS + 1))
    kda = [i for i in range(1, LAYERS + 1) if i not in full]
    return KimiLinearConfig(
        vocab_size=256, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=intermediate_size, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, num_experts=None, first_k_dense_replace=LAYERS, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
        linear_attn_config={"head_dim": 128, "num_heads": 4, "kda_layers": kda, "full_attn_layers": full},
    )  # fmt: skip


def parameters(kind: str, intermediate_size: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in KimiLinearForCausalLM(config_of(kind, intermediate_size)).parameters())


def equal_width() -> int:
    """Width of the all-MLA model's MLPs at which it has as many parameters as the hybrid, to a multiple of 8."""
    missing = parameters("hybrid", HYBRID_MLP) - parameters("all MLA", HYBRID_MLP)
    return HYBRID_MLP + 8 * round(missing / (3 * HIDDEN * LAYERS) / 8)


@torch.no_grad()
def held_out_loss(model: KimiLinearForCausalLM, rows: torch.Tensor) -> float:
    """Mean nats a byte of rows [P, LENGTH + 1], each read alone."""
    losses = []
    for part in rows.split(ROWS):
        with torch.autocast(part.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()))
    return float(torch.stack(losses).mean())


def run(kind: str, seed: int, steps: int, text: tuple[torch.Tensor, torch.Tensor], device: str) -> dict[str, Any]:
    """Train one model; the seed decides weights and data order, the latter alike for both kinds."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    training, held_out = (x.to(device) for x in text)
    rows = held_out.unfold(0, LENGTH + 1, LENGTH)[:EVALUATED_ROWS]
    width = HYBRID_MLP if kind == "hybrid" else equal_width()
    model = KimiLinearForCausalLM(config_of(kind, width)).to(device).train()
    steps_of = CapturedTraining(model, F.cross_entropy, LEARNING_RATE)
    generator = torch.Generator(device).manual_seed(seed)
    places, history, losses = torch.arange(LENGTH + 1, device=device), [], torch.zeros((), device=device)
    bar = tqdm(range(1, steps + 1), desc=f"{kind}, seed {seed}", leave=False, mininterval=1.0)
    for step in bar:
        starts = torch.randint(len(training) - LENGTH, (ROWS, 1), generator=generator, device=device)
        batch = training[starts + places]
        steps_of.set_learning_rate(_rate(step, steps))
        losses += steps_of.step(batch[:, :-1], batch[:, 1:])
        if step % EVALUATE_EVERY == 0 or step == steps:
            since = step - (history[-1]["step"] if history else 0)
            history.append({"step": step, "training": float(losses) / since, "held_out": held_out_loss(model, rows)})
            losses.zero_()
            bar.set_postfix(held_out=f"{history[-1]['held_out']:.4f}")
    return {
        "model": kind, "seed": seed, "steps": steps, "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": history[-1]["held_out"], "seconds": round(time.perf_counter() - started, 1), "history": history,
    }  # fmt: skip


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step <= WARM_UP_STEPS:
        return LEARNING_RATE * step / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * progress))


def table(rows: list[dict[str, Any]]) -> str:
    """Held-out loss by model: each seed's, mean and spread."""
    lines = ["| model | parameters | nats a byte, held out, by seed | mean | spread |", "|---|---|---|---|---|"]
    for kind in MODELS:
        mine = sorted((row for row in rows if row["model"] == kind), key=lambda row: row["seed"])
        if mine:
            losses = [row["held_out"] for row in mine]
            by_seed = " / ".join(f"{loss:.4f}" for loss in losses)
            spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            lines.append(
                f"| {kind} | {mine[0]['parameters']:,} | {by_seed} | {statistics.mean(losses):.4f} | {spread} |"
            )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Held-out loss over steps, a line a run."""
    import matplotlib.pyplot as plt

    from benchmarks.figures import COLOURS, save

    figure, panel = plt.subplots(figsize=(6, 3.4))
    for kind, colour in zip(MODELS, (COLOURS[1], COLOURS[2])):
        for i, row in enumerate(row for row in rows if row["model"] == kind):
            steps, losses = zip(*((entry["step"], entry["held_out"]) for entry in row["history"]))
            panel.plot(steps, losses, color=colour, lw=1.1, label=kind if i == 0 else None)
    panel.set_yscale("log")
    panel.set_xlabel("steps", fontsize=8)
    panel.set_ylabel("nats a byte, held-out files", fontsize=8)
    panel.legend(fontsize=8, frameon=False)
    panel.grid(lw=0.4, color="#dadce0")
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (default: %(default)s)")
    add_options(parser, minutes=15)
    args = parser.parse_args()
    if args.plot:
        draw_record(draw, args.plot)
        return
    runs, text = SmallRuns("equal_recipe", args.minutes, args.out, table), corpus()
    for seed, kind in itertools.product(args.seeds, MODELS):
        if any((row["model"], row["seed"], row["steps"]) == (kind, seed, args.steps) for row in runs.rows):
            continue
        if runs.over():
            break
        row = run(kind, seed, args.steps, text, runs.device)
        runs.add(row, training_bytes=len(text[0]), held_out_bytes=len(text[1]))
        tqdm.write(json.dumps({key: value for key, value in row.items() if key != "history"}))
    runs.show()


if __name__ == "__main__":
    main()
