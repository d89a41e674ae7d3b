"""The commands for a user's own machine: `bench`, `verify` and `plan`, with their help; run by `cli`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BENCH = """\
Measure prompts and decoding on this machine: this package, by captured steps and layer by layer, beside transformers'
own class and beside the same shape with full attention (MLA) in every layer. Says before it starts how long it will
take and how much memory it needs, and writes a table, a JSON and a plot.

  FOLDER           its weights, on one GPU, spread over several, or on the CPU
  --config FILE    random weights of a config.json
  neither          random weights of the released shape, 91.5 GiB; --layers N takes the first N of its 27 layers

Decoding is greedy generate() over a cache with random contents; a prompt is one forward over random tokens that fills
a cache. Each is timed after a run that isn't counted; the table has the medians. "limit" is what the bytes (decoding)
or the operations (prompts) of our model take at the rates that this machine was measured to have just before.
"""
_BENCH_EXAMPLES = """\
examples:
  {program} bench kimi-48b
  {program} bench kimi-48b --contexts 4096 131072 --batches 1 16 64 --models ours native
  {program} bench --layers 16 --out h100.json                 # an 80 GB GPU
  {program} bench kimi-48b --models ours --contexts 131072 --segments 8192 16384
  {program} bench kimi-48b --estimate                         # how long it would take
  {program} bench --draw h100.json                            # the plot again

A case that runs out of memory is named, and the rest goes on. Ctrl-C keeps what was measured. The JSON is written after
every case, never over an older file; without --out it is kimi-bench-DEVICE-TIME.json in this folder.

exit codes: 0 done, 1 a case failed for another reason than memory, 2 wrong arguments, 130 interrupted
"""

_VERIFY = """\
Verify the weights of a folder: names, shapes, dtypes and bytes of every tensor against the released layout, ids and
chat text of the tokenizer against what is known of the released one, then one pass over a known text, layer by layer
from disk: finite outputs, experts in use, agreement with transformers' own class, plausible logits. Memory for one
layer is enough (24 GB of main memory at the released shape, less on a GPU). Where the whole model fits a GPU, captured
steps are compared with layers. Says what it could not check.

Quantised folders are read as they are; their layers are compared with their dequantised weights.
"""
_VERIFY_EXAMPLES = """\
examples:
  {program} verify Kimi-Linear-48B-A3B-Instruct
  {program} verify kimi-48b --generate          # also the greedy reference text
  {program} verify kimi-48b --headers-only      # seconds: names, shapes, dtypes, bytes, tokenizer

exit codes: 0 all that could be checked is right, 1 something is wrong, 2 wrong arguments or no such folder
"""

_PLAN = """\
Say what fits where, how it decodes, and how fast it should be: weights by format, cache by context and rows, scratch,
the way of decoding, and milliseconds a token counted from the bytes that a step must read. Nothing is downloaded or
loaded. Without --gpu, --gpu-memory and --cpu-memory the machine at hand is measured.

  FOLDER           a folder, whose own bytes are counted beside the other formats
  --config FILE    a config.json
  neither          the released shape, 49.1 billion parameters

"limit" is bytes divided by the rate of reading. "expected" is what this package should take, from a fit to one H200:
captured steps 1.15 of the limit and 0.018 ms a layer; layer by layer 3 ms a layer on a GPU, twice the limit and 0.5 ms
a layer on a CPU. Layers of several GPUs compute one after the other, so more GPUs hold more and are no faster.
"""
_PLAN_EXAMPLES = """\
examples:
  {program} plan --gpu-memory 24                        # what runs on one 24 GiB card?
  {program} plan --gpu "RTX 4090" "RTX 4090" --contexts 8192 131072 --batches 1 4
  {program} plan --gpu-memory 48 48 --read-rate 860
  {program} plan --cpu-memory 128 --read-rate 200
  {program} plan kimi-48b --json

exit codes: 0 planned, 2 wrong arguments
"""


def add_machine_commands(commands: Any, program: str) -> None:
    """Add the commands to a sub-parser's group."""
    texts = (
        ("bench", "measure prompts and decoding on this machine", _BENCH, _BENCH_EXAMPLES, _add_bench),
        ("verify", "verify the weights of a folder", _VERIFY, _VERIFY_EXAMPLES, _add_verify),
        ("plan", "say what fits where and how fast it should be", _PLAN, _PLAN_EXAMPLES, _add_plan),
    )
    for name, help, description, examples, add in texts:
        add(_command(commands, name, help, description, examples.format(program=program)))


def _command(commands: Any, name: str, help: str, description: str, examples: str) -> Any:
    layout = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=help, description=description, epilog=examples, formatter_class=layout)


def _add_source(parser: Any) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="an exported or a released folder")
    source.add_argument("--config", type=Path, metavar="FILE", help="a config.json without weights")


def _add_bench(parser: Any) -> None:
    parser.set_defaults(run=_run_bench)
    _add_source(parser)
    add = parser.add_argument
    add("--layers", type=int, metavar="N", help="only the first N layers (random weights)")
    add("--contexts", type=int, nargs="+", metavar="N", help="tokens (default: 4096 32768 131072; CPU: 256 1024)")
    add("--batches", type=int, nargs="+", metavar="N", help="rows (default: 1 8; CPU: 1 4)")
    add("--segments", type=int, nargs="+", metavar="N", help="also prompts in segments of N tokens")
    add("--models", nargs="+", choices=("ours", "all_mla", "native"), help="default: all three")
    add("--paths", nargs="+", choices=("captured", "layers"), help="of our decoding (default: both; CPU: layers)")
    add("--device", choices=("auto", "cuda", "cpu"), help="default: GPUs where there are any")
    add("--repeats", type=int, metavar="N", help="timed runs of each case (default: 3)")
    add("--out", type=Path, metavar="FILE.json", help="what to write; the plot lies beside it")
    add("--estimate", action="store_true", help="say how long it would take, and stop")
    add("--draw", type=Path, metavar="FILE.json", help="draw the plot of an earlier run again, and stop")


def _run_bench(arguments: argparse.Namespace) -> int:
    from .bench.command import BenchRequest, bench

    return _run(lambda: bench(BenchRequest(**_values(arguments))))


def _add_verify(parser: Any) -> None:
    parser.set_defaults(run=_run_verify)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="an exported or a released folder with weights")
    add("--generate", action="store_true", help="compare greedy text too")
    add("--headers-only", action="store_true", help="leave the weights unread")
    add("--device", choices=("auto", "cuda", "cpu"), help="default: a GPU where there is one")


def _run_verify(arguments: argparse.Namespace) -> int:
    from .verify.command import VerifyRequest, verify

    return _run(lambda: verify(VerifyRequest(**_values(arguments))))


def _add_plan(parser: Any) -> None:
    parser.set_defaults(run=_run_plan)
    _add_source(parser)
    add = parser.add_argument
    add("--gpu", nargs="+", metavar="NAME", help='cards by name, each as often as it is there: "RTX 4090"')
    add("--gpu-memory", type=float, nargs="+", metavar="GIB", help="GiB of each card")
    add("--read-rate", type=float, metavar="GB/S", help="GB a second that a card (--gpu-memory) or the CPU reads")
    add("--cpu-memory", type=float, metavar="GIB", help="plan for a CPU with so much main memory")
    add("--contexts", type=int, nargs="+", metavar="N", help="tokens (default: 4096 32768 131072 1048576)")
    add("--batches", type=int, nargs="+", metavar="N", help="rows (default: 1 8 64)")
    add("--json", action="store_true", dest="as_json", help="print JSON")


def _run_plan(arguments: argparse.Namespace) -> int:
    from .plan.command import PlanRequest, plan

    return _run(lambda: plan(PlanRequest(**_values(arguments))))


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a command by name, lists as tuples; what was not given is left to the request's own default."""
    given = {
        name: value for name, value in vars(arguments).items() if name not in ("run", "rest") and value is not None
    }
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _run(command: Callable[[], int]) -> int:
    """Exit code of `command`; what the user can mend is one line on standard error and exit code 2."""
    try:
        return command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


__all__ = ["add_machine_commands"]
