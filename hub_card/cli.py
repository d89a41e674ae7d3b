"""Command line of the Hub tools: `python -m kimi_linear.hub_card export --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .machine_cli import add_machine_commands

PROGRAM = "python -m kimi_linear.hub_card"

_EXPORT_DESCRIPTION = """\
Write a folder that transformers loads with trust_remote_code=True where kimi-linear is not installed: code, config.json
with auto_map, generation_config.json, tokenizer files, README.md (the model card) and, if asked for, weights.

  --checkpoint FOLDER      a released snapshot; its weights are linked or copied, its code replaced
  --config FILE            code and config, without weights
  --config FILE --random   the same with random weights
  none of these            the small trained checkpoint that comes with kimi-linear
"""
_EXPORT_EPILOG = f"""\
examples:
  {PROGRAM} export --out kimi-small
  {PROGRAM} export --out kimi-48b --checkpoint Kimi-Linear-48B-A3B-Instruct
  {PROGRAM} export --out kimi-48b --checkpoint SNAPSHOT --weights copy
  {PROGRAM} export --out kimi-tiny --config tiny/config.json --random

Nothing is overwritten: --out must not exist, or be an empty folder. The folder appears under its name when it is
complete; until then it is OUT.partial. An interrupted copy of weights goes on where it stopped when the same command is
run again. Links share their bytes with the source: keep the source of symlinks, and save changed weights to another
folder.

exit codes: 0 done, 1 the export was refused or failed, 2 wrong arguments, 130 interrupted
"""

_CHECK_DESCRIPTION = """\
Check whether vLLM (0.11.1 or later) and SGLang (0.5.5 or later) can serve a folder: the fields of config.json that they
read, and names and shapes of every tensor. Nothing is loaded; serving_engines.md beside this program says what was read
in their sources.
"""
_CHECK_EPILOG = f"""\
example:
  {PROGRAM} check-serving kimi-48b

exit codes: 0 they can serve it, 1 they cannot or the folder is damaged, 2 wrong arguments
"""
_SERVE_DESCRIPTION = """\
Answer OpenAI-style requests with transformers' own server and the code of FOLDER, which is executed. Options that are
not listed go to `transformers serve`, for example --host, --port, --device, --dtype and --log-level.
"""
_SERVE_EPILOG = f"""\
example:
  {PROGRAM} serve kimi-48b --host 127.0.0.1 --port 8000

exit codes: 0 stopped, 1 the folder cannot be served or packages are missing, 2 wrong arguments
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: by default those of the process.
    """
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and parsed.run is not _run_serve:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.rest = rest
    return parsed.run(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Tools for Kimi Linear folders of the Hugging Face Hub.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_export(commands)
    check = commands.add_parser(
        "check-serving",
        help="check whether vLLM and SGLang can serve a folder",
        description=_CHECK_DESCRIPTION,
        epilog=_CHECK_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(run=_run_check)
    check.add_argument("folder", type=Path, metavar="FOLDER", help="an exported or a released folder with weights")
    server = commands.add_parser(
        "serve",
        help="serve a folder over HTTP with transformers' server",
        description=_SERVE_DESCRIPTION,
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    server.set_defaults(run=_run_serve)
    server.add_argument("folder", type=Path, metavar="FOLDER", help="an exported folder with weights and tokenizer")
    add_machine_commands(commands, PROGRAM)
    return parser


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a folder that loads with trust_remote_code",
        description=_EXPORT_DESCRIPTION,
        epilog=_EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.set_defaults(run=_run_export)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    source = export.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="released folder whose weights to take")
    source.add_argument(
        "--config", type=Path, metavar="FILE", help="released config.json, for an export without weights"
    )
    export.add_argument("--random", action="store_true", help="with --config: write random bf16 weights")
    export.add_argument("--seed", type=int, default=0, help="of --random (default: 0)")
    export.add_argument(
        "--weights",
        choices=("auto", "hardlink", "symlink", "copy"),
        default="auto",
        help="how the weights of --checkpoint get there; auto is the first that works of hardlink, symlink, copy",
    )
    export.add_argument(
        "--base-model",
        metavar="ID",
        help="Hub id of the checkpoint, for the card (default: what the path of --checkpoint tells)",
    )
    export.add_argument("--repo-id", metavar="ID", help="what the card's usage loads (default: the name of DIR)")


def _run_export(arguments: argparse.Namespace) -> int:
    # Imported here, so that --help answers at once and without torch.
    from .exporter import ExportRequest, export
    from .staging import staging_path

    request = ExportRequest(**{name: value for name, value in vars(arguments).items() if name not in ("run", "rest")})
    staging = staging_path(request.out)
    try:
        report = export(request)
    except (ValueError, OSError) as error:
        return _report_error(error)
    except KeyboardInterrupt:
        kept = f"; {staging} keeps what was copied: run the same command again to go on, or remove it"
        print(f"interrupted{kept if staging.exists() else ''}", file=sys.stderr)
        return 130
    weights = (
        f"{report.weight_bytes / 1e9:.3g} GB of weights ({report.weights})" if report.weight_bytes else "no weights"
    )
    print(f"wrote {request.out}: {len(report.code_files)} code files, {weights}")
    return 0


def _run_check(arguments: argparse.Namespace) -> int:
    from .serving_requirements import ENGINES, check_serving

    try:
        report = check_serving(arguments.folder)
    except (ValueError, OSError) as error:
        return _report_error(error)
    print(f"{ENGINES} {'cannot' if report.problems else 'can'} serve {arguments.folder}")
    for problem in report.problems:
        print(f"  - {problem}")
    for note in report.notes:
        print(f"note: {note}")
    return 1 if report.problems else 0


def _run_serve(arguments: argparse.Namespace) -> int:
    from .transformers_server import serve

    try:
        serve(arguments.folder, arguments.rest)
    except (ValueError, OSError) as error:
        return _report_error(error)
    return 0


def _report_error(error: Exception) -> int:
    """One line on standard error; the exit code of a failure."""
    message = error.strerror if isinstance(error, OSError) and error.filename is None else None
    print(f"error: {' '.join(str(message or error).split())}", file=sys.stderr)
    return 1


__all__ = ["main"]
