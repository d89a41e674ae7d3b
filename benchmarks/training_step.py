"""A training step of the released widths on one GPU: seconds, memory, and where the time goes, kernel by kernel.

    python -m benchmarks.training_step [--layers 8] [--tokens 8192] [--checkpointing] [--lora] [--native] [--out f.json]

Random bf16 weights, random tokens as ids and labels; a step is forward and backward from gradients that are None, no
optimiser. GiB is the peak of allocated memory above the weights: 25.8 GiB of it are the gradients of 8 layers. `--lora`
trains adapters of rank 16 on attention and stacked experts (PEFT) instead of all parameters. The table by kernel is
torch.profiler's, forward and backward apart. Floor and predictions: benchmarks/training_notes.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_model import free_memory, native_model, random_model, released_config
from benchmarks.record import write
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

_GIB = 2**30
# layers: (goal s, goal GiB above weights, limit s) of 8,192 tokens, all parameters (shared/anchors.md, one H200).
GOALS = {8: (0.160, 29.0, 0.09)}
_PROJECTIONS = r".*self_attn\.(q|k|v|o|b|f_a|f_b|g_a|g_b|kv_a|kv_b)_proj(_with_mqa)?$"


def with_adapters(model: torch.nn.Module, rank: int = 16) -> torch.nn.Module:
    """`model` with PEFT's LoRA of `rank` on attention and on the stacked experts, in bf16, weights frozen."""
    from peft import LoraConfig, get_peft_model

    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=rank, target_modules=_PROJECTIONS, target_parameters=experts)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def step(model: torch.nn.Module, ids: torch.Tensor, mark: Callable[[], None] = lambda: None) -> torch.Tensor:
    """The loss of forward and backward; `mark` is called between them. Gradients are None again afterwards."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    mark()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def measure(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of forward and of the step (medians), of the first step, and GiB above what was held before."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    first_loss = float(step(model, ids))
    first = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - held
    rows = []
    for _ in range(repeats):
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        host = time.perf_counter()
        begin.record()
        step(model, ids, middle.record)
        end.record()
        host = time.perf_counter() - host
        torch.cuda.synchronize()
        rows.append((begin.elapsed_time(middle) / 1e3, begin.elapsed_time(end) / 1e3, host))
    forward, whole, host = (statistics.median(column) for column in zip(*rows))
    return {
        "s": whole, "forward_s": forward, "host_s": host, "tokens_per_s": ids.numel() / whole, "first_step_s": first,
        "gib_above_weights": peak / _GIB, "loss": first_loss, "all_s": [row[1] for row in rows],
    }  # fmt: skip


def _kernels(work: Callable[[], Any], rows: int) -> tuple[Any, list[dict[str, Any]]]:
    """(what `work` gives, its time on the GPU by kernel, longest first)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        result = work()
        torch.cuda.synchronize()
    kernels = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    found = [{"kernel": k.key[:140], "ms": k.self_device_time_total / 1e3, "calls": k.count} for k in kernels]
    return result, found[:rows]


def profile(model: torch.nn.Module, ids: torch.Tensor, rows: int = 40) -> dict[str, list[dict[str, Any]]]:
    """Time by kernel of one step's forward and backward."""
    loss, forward = _kernels(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, rows)
    _, backward = _kernels(loss.backward, rows)
    model.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": backward}


def run(label: str, make: Callable[[], torch.nn.Module], arguments: argparse.Namespace) -> dict[str, Any]:
    """What `measure` and `profile` say of one model, which is dropped again."""
    start = time.perf_counter()
    model = make().train()
    if arguments.lora:
        model = with_adapters(model)
    else:
        model.requires_grad_(True)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if arguments.lora:
            model.enable_input_require_grads()
    torch.cuda.synchronize()
    ids = torch.randint(0, 100_000, (1, arguments.tokens), device="cuda")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{label}: {trained / 1e9:.3f}B parameters with gradients, made in {time.perf_counter() - start:.1f} s",
          file=sys.stderr, flush=True)  # fmt: skip
    result = {"layers": arguments.layers, "tokens": arguments.tokens, "trained_parameters": trained}
    result |= measure(model, ids, arguments.repeats)
    print(label, {key: value for key, value in result.items() if key != "all_s"}, flush=True)
    if arguments.profile:
        result["kernels"] = profile(model, ids)
    return result


def show(label: str, result: dict[str, Any]) -> None:
    """Print one row beside its goal, and time by kernel."""
    goal, gib, limit = GOALS.get(result["layers"], (None, None, None))
    print(f"{label}, {result['layers']} layers, {result['tokens']} tokens: {result['s']:.3f} s (goal {goal}; {limit})")
    print(f"  forward {result['forward_s']:.3f} s, {result['gib_above_weights']:.1f} GiB above weights (goal {gib}),")
    print(f"  {result['tokens_per_s']:.0f} tokens/s, first step {result['first_step_s']:.1f} s")
    for part, kernels in result.get("kernels", {}).items():
        print(f"{part}: {sum(k['ms'] for k in kernels):.1f} ms in the kernels listed")
        for kernel in kernels:
            print(f"{kernel['ms']:9.2f} ms {kernel['calls']:6} x  {kernel['kernel']}", flush=True)


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, layer by layer")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16 instead of all parameters")
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="leave out the table by kernel")
    parser.add_argument("--native", action="store_true", help="measure transformers' native class too")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    config = released_config(layers=arguments.layers)
    parts = {"ours": run("ours", lambda: random_model(KimiLinearForCausalLM, config), arguments)}
    show("ours", parts["ours"])
    write(arguments.out, "training_step", **parts)  # at once: what comes next may fail
    if arguments.native:
        free_memory()
        parts["native"] = run("native", lambda: native_model(config), arguments)
        show("native", parts["native"])
        write(arguments.out, "training_step", **parts)


if __name__ == "__main__":
    main()
