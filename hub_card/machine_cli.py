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


def add_machine_commands(commands: Any, program: str) -> None:
    """Add the commands to a sub-parser's group."""
    _add_bench(
        _command(commands, "bench", "measure prompts and decoding on this machine", _BENCH, _BENCH_EXAMPLES, program)
    )


def _command(commands: Any, name: str, help: str, description: str, examples: str, program: str) -> Any:
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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
    add("--segments", type=int, nargs="+", metavar="N", default=[], help="also prompts in segments of N tokens")
    add("--models", nargs="+", choices=("ours", "all_mla", "native"), default=["ours", "all_mla", "native"])
    add("--paths", nargs="+", choices=("captured", "layers"), help="of our decoding (default: both; CPU: layers)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: GPUs where there are any")
    add("--repeats", type=int, default=3, metavar="N", help="timed runs of each case (default: 3)")
    add("--out", type=Path, metavar="FILE.json", help="what to write; the plot lies beside it")
    add("--estimate", action="store_true", help="say how long it would take, and stop")
    add("--draw", type=Path, metavar="FILE.json", help="draw the plot of an earlier run again, and stop")


def _run_bench(arguments: argparse.Namespace) -> int:
    from .bench.command import BenchRequest, bench

    return _run(lambda: bench(BenchRequest(**_values(arguments))))


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a command by name, lists as tuples."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "rest")}
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
