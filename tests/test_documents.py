"""The README's snippet runs as it stands, and the documents name files and links that exist."""

import os
import re
from pathlib import Path

import pytest

from kimi_linear.hub_card.exporter import ExportRequest, export

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def test_the_readme_snippet_runs_as_written(tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippet.splitlines()) == 6
    export(ExportRequest(tmp_path / "kimi-small"))
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert 'The "try" statement' in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: os.fspath(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document):
    text = document.read_text()
    links = re.findall(r"\]\(([^)#\s]+)\)", text)
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    named = re.findall(r"`((?:kernels|modeling|configuration|hub_card|tests|benchmarks|docs)/[\w./]*)", text)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{document.name} names what is not there: {missing}"
