"""The command line: help, exit codes, one line for a mistake."""

import subprocess
import sys

import pytest

from kimi_linear.hub_card import exporter
from kimi_linear.hub_card.cli import main


@pytest.mark.processes
def test_help_answers_without_torch_and_shows_examples():
    code = "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"
    code += "from kimi_linear.hub_card.cli import main\nmain(['export', '--help'])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    for word in ("--checkpoint", "--config", "--random", "--weights", "examples:", "exit codes:"):
        assert word in process.stdout


def test_export(released, tmp_path, capsys):
    assert main(["export", "--out", str(tmp_path / "out"), "--checkpoint", str(released)]) == 0
    assert f"wrote {tmp_path / 'out'}: " in capsys.readouterr().out
    assert (tmp_path / "out" / "modeling_kimi_linear.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "--out", "{tmp}/x", "--checkpoint", "{tmp}/none"], 1, "error: --checkpoint"),
        (["export", "--out", "{tmp}", "--checkpoint", "{released}"], 1, "exists and is not empty"),
        (["export", "--out", "{tmp}/x", "--random"], 1, "--random needs --config"),
    ],
)
def test_mistakes_are_one_line(released, tmp_path, capsys, arguments, code, words):
    (tmp_path / "file").touch()
    assert main([text.format(tmp=tmp_path, released=released) for text in arguments]) == code
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["export"],
        ["export", "--out", "x", "--weights", "move"],
        ["export", "--out", "x", "--config", "a", "--checkpoint", "b"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_interruption_says_how_to_go_on(released, tmp_path, capsys, monkeypatch):
    def stop(files, folder, mode):
        (folder / (files[0].name + ".part")).write_bytes(b"begun")
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "place_weights", stop)
    arguments = ["export", "--out", str(tmp_path / "out"), "--checkpoint", str(released)]
    assert main([*arguments, "--weights", "copy"]) == 130
    assert "out.partial keeps what was written: run the same command again" in capsys.readouterr().err
    assert main([*arguments[:2], str(tmp_path / "linked"), *arguments[3:]]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "linked.partial").exists()
