"""The data of the synthetic tasks against plain Python, and records that go on after an interruption."""

import json
import sys

import pytest
import torch

from benchmarks import equal_recipe, synthetic_tasks
from benchmarks.synthetic_data import IGNORED, RECALL_KEYS, TASKS, palindrome, recall, stack


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [16, 17, 64, 255])
def test_shapes_and_vocabulary(task, length, generator):
    make, vocabulary = TASKS[task]
    ids, targets = make(5, length, generator)
    assert ids.shape == targets.shape == (5, length)
    assert ids.min() >= 0 and ids.max() < vocabulary and (targets != IGNORED).any()
    asked = targets != IGNORED
    assert torch.equal(targets[:, :-1][asked[:, :-1]], ids[:, 1:][asked[:, :-1]])  # the token that follows


def test_a_palindrome_is_read_backwards(generator):
    ids, targets = palindrome(3, 21, generator)
    for row, wanted in zip(ids.tolist(), targets.tolist()):
        assert row[10] == 0 and row[11:] == row[:10][::-1]
        assert wanted[:10] == [IGNORED] * 10 and wanted[10:20] == row[:10][::-1]


def test_recall_asks_every_key_once_for_its_value(generator):
    ids, targets = recall(3, 64, generator)
    for row, wanted in zip(ids.tolist(), targets.tolist()):
        values = dict(zip(row[:32:2], row[1:32:2]))
        assert len(values) == 16 and sorted(row[32::2]) == sorted(values)
        assert all(wanted[i] == values[row[i]] >= RECALL_KEYS for i in range(32, 64, 2))
        assert wanted[:32] == [IGNORED] * 32 and set(wanted[33::2]) == {IGNORED}


def test_stacks_give_back_what_came_last(generator):
    ids, targets = stack(4, 300, generator)
    pops = 0
    for row, wanted in zip(ids.tolist(), targets.tolist()):
        stacks: dict[int, list[int]] = {}
        for i in range(0, 300, 3):
            popping, which, element = row[i : i + 3]
            if popping:
                assert stacks[which].pop() == element == wanted[i + 1]
                pops += 1
            else:
                stacks.setdefault(which, []).append(element)
                assert wanted[i + 1] == IGNORED
    assert pops > 60


def test_an_interrupted_benchmark_goes_on(tmp_path, monkeypatch):
    """Runs that stand in the record are not done again, and a solved case takes no further learning rate."""
    done: list[tuple] = []

    def run(task, length, kind, rate, steps, device):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((task, length, kind, rate))
        solved = 1.0 if rate == 2e-3 else 0.5
        return {"task": task, "length": length, "model": kind, "learning_rate": rate, "accuracy": solved, "steps": 1}

    record = tmp_path / "record.json"
    words = ["synthetic_tasks", "--lengths", "16", "--tasks", "stack", "--out", str(record)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(synthetic_tasks, "run", run)
    with pytest.raises(KeyboardInterrupt):
        synthetic_tasks.main()
    done.append(None)  # one more than where it stopped
    synthetic_tasks.main()
    kinds = ("kda", "full attention")
    assert [x for x in done if x] == [("stack", 16, kind, rate) for kind in kinds for rate in (1e-3, 2e-3)]
    rows = json.loads(record.read_text())["rows"]
    assert "| stack | kda | 1.000 (0.002, 1) |" in synthetic_tasks.table(rows)
    synthetic_tasks.draw(rows, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


def test_both_models_of_the_equal_recipe_have_the_same_size():
    hybrid = equal_recipe.parameters("hybrid", equal_recipe.HYBRID_MLP)
    all_mla = equal_recipe.parameters("all MLA", equal_recipe.equal_width())
    assert abs(all_mla - hybrid) < 0.005 * hybrid


def test_a_benchmark_whose_time_is_over_says_so_once(tmp_path, monkeypatch, capsys):
    """Before the first of six runs; what is left stays to be done."""
    monkeypatch.setattr(sys, "argv", ["equal_recipe", "--minutes", "-1", "--out", str(tmp_path / "record.json")])
    monkeypatch.setattr(equal_recipe, "corpus", lambda: (torch.zeros(0), torch.zeros(0)))
    equal_recipe.main()
    assert capsys.readouterr().out.count("minutes are over") == 1
    assert not (tmp_path / "record.json").exists()
