#!/usr/bin/env python3
"""Set-up and checks in one place; needs nothing but Python >= 3.10 with pip.

    python3 tasks.py demo     generate text with the small trained checkpoint, through AutoModelForCausalLM
    python3 tasks.py test     run the tests            [--transformers VERSION] [pytest arguments: -m interpreter]
    python3 tasks.py lint     ruff, lint and format
    python3 tasks.py wheel    build the wheel, install it into a fresh environment, export a folder with it

VERSION is a number, or newest (5.24.0, which needs Python 3.11), oldest (5.10.1), or latest: whatever pip finds, be it
outside the range that pyproject.toml claims.

Each command makes the virtual environment it needs (.venv, .venv-tf-VERSION, .venv-demo, .venv-wheel,
.venv-lint) on its first run.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# The lanes of CI. The range in pyproject.toml is what lies between them.
TRANSFORMERS = {"newest": "5.24.0", "oldest": "5.10.1"}
TORCH = "2.13.0"
TRITON = "3.9.0"
RUFF = "0.17.6"
NOTHING_SELECTED = 5  # pytest's exit code


def run(*command: str | Path, accepted: tuple[int, ...] = (0,), **environment: str) -> int:
    """Run a command from the repository root; an exit code that isn't accepted ends this program with it."""
    print("+", *(str(part) for part in command), file=sys.stderr, flush=True)
    code = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}).returncode
    if code not in accepted:
        sys.exit(code)
    return code


def environment(name: str, *requirements: str) -> Path:
    """The python of virtual environment `name`, made and filled if its requirements have changed."""
    folder = ROOT / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = folder / "installed"
    wanted = "\n".join([*requirements, (ROOT / "pyproject.toml").read_text()])
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        # torch goes first: whatever depends on it would otherwise pick a build of its own.
        for requirement in requirements:
            run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirement.split())
        stamp.write_text(wanted)
    return python


def test_environment(version: str) -> Path:
    """The python of the environment with transformers `version`, or with the latest that pip finds."""
    version = TRANSFORMERS.get(version, version)
    torch, triton = f"torch=={TORCH} numpy", f"triton=={TRITON}"
    if version != "latest":
        name = ".venv" if version == TRANSFORMERS["newest"] else f".venv-tf-{version}"
        return environment(name, torch, f"transformers=={version}", triton, "-e .[dev]")
    python = environment(".venv-tf-latest", torch, triton, "-e .[dev]")
    # By itself and in every run: pip then goes beyond the range of pyproject.toml (and says so).
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "transformers")
    run(python, "-c", "import transformers; print('transformers', transformers.__version__)")
    return python


def test(python: Path, arguments: list[str]) -> None:
    """The tests in two runs, for Triton decides when it is imported whether it interprets."""
    # Two test processes with one thread each keep two cores busy without fighting over them.
    command = (python, "-m", "pytest", "-n", "2", *arguments)
    options = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    codes = [run(*command, accepted=(0, NOTHING_SELECTED), **options, TRITON_INTERPRET=lane) for lane in ("0", "1")]
    if 0 not in codes:
        sys.exit(NOTHING_SELECTED)


def main() -> None:
    """Parse the command line and run one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["demo", "test", "lint", "wheel"])
    parser.add_argument(
        "--transformers", metavar="VERSION", default="newest", help="a number, newest, oldest or latest"
    )
    arguments, rest = parser.parse_known_args()
    if rest and arguments.task not in ("test", "demo"):
        parser.error(f"{arguments.task} takes no further arguments, got {' '.join(rest)}")

    if arguments.task == "lint":
        python = environment(".venv-lint", f"ruff=={RUFF}")
        run(python, "-m", "ruff", "check", ".")
        run(python, "-m", "ruff", "format", "--check", ".")
    elif arguments.task == "wheel":
        newest = f"transformers=={TRANSFORMERS['newest']}"
        python = environment(".venv-wheel", f"torch=={TORCH} numpy", f"{newest} build")
        run(python, "-m", "build", "--wheel", "--outdir", "dist")
        wheel = max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
        run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
        run(python, "-m", "pip", "install", "--quiet", wheel)
        run(python, "-P", "-m", "kimi_linear.hub_card.demo")
    elif arguments.task == "demo":
        print(
            f"The demo runs in .venv-demo. The first run downloads torch {TORCH} (some GB on Linux, where it "
            "brings GPU libraries), transformers and what they need. The model is in this repository.",
            file=sys.stderr,
        )
        newest = f"transformers=={TRANSFORMERS['newest']}"
        python = environment(".venv-demo", f"torch=={TORCH} numpy", newest, "-e .")
        run(python, "-m", "kimi_linear.hub_card.demo", *rest)
    else:
        test(test_environment(arguments.transformers), rest)


if __name__ == "__main__":
    main()
