"""benchmarks.long_context and its plot: what they do with figures, without a GPU to take them from."""

import json
import sys

import pytest
import torch

from benchmarks import decode, full_model, long_context, plot_long_context
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM


def row(model, context, batch, ms, **more):
    return {"model": model, "context": context, "batch": batch, "fits": True, "cache_gib": batch * 0.5, "limit_ms": 1.0,
            "step_ms": ms, **more}  # fmt: skip


ROWS = [
    row("hybrid", 4096, 1, 2.0, generate_ms=2.5),
    row("hybrid", 4096, 64, 16.0),
    row("hybrid", 8192, 1, 2.0, generate_ms=2.5),
    row("all_mla", 4096, 1, 4.0, generate_ms=7.5),
    row("all_mla", 4096, 8, 8.0),
    {"model": "all_mla", "context": 8192, "batch": 1, "fits": False},
    {"model": "native", "context": 4096, "batch": 1, "fits": True, "cache_gib": 0.5, "generate_ms": 100.0},
]


@pytest.mark.parametrize("gib", [0.001, 1, 10, 1000])
def test_largest_batch_is_the_largest_that_fits(config, gib):
    free, context = int(gib * 2**30), 2**20
    batch = long_context.largest_batch(config(), context, free)
    assert batch in (1, 2, 4, 8, 16, 32, 64)
    assert batch == 1 or full_model.cache_bytes(config(), batch, context) <= free
    assert batch == 64 or full_model.cache_bytes(config(), 2 * batch, context) > free


def test_ratios_compare_each_at_its_largest_batch():
    (found,) = long_context.ratios(ROWS)  # at 8192 there is nothing to compare with
    assert (found["context"], found["step"], found["generate"]) == (4096, 2.0, 3.0)
    assert found["largest_batches"] == {"hybrid": 64, "all_mla": 8}
    assert found["at_largest_batches"] == 4.0


def test_table_shows_what_there_is(capsys):
    long_context.show(ROWS)
    lines = capsys.readouterr().out.splitlines()
    first, second = (next(line.split() for line in lines if line.startswith(f"{c:7} ")) for c in (4096, 8192))
    assert " ".join(first) == "4096 | 2.2 | 100.0 | 1.00 2.00 2.50 | 1.00 4.00 7.50 | 2.00 3.00 - | 0.50 0.50 0.50"
    assert " ".join(second) == "8192 | - | - | 1.00 2.00 2.50 | - - - | - - - | 0.50 - -"


def test_record_is_written_after_every_case(monkeypatch, tmp_path, no_waiting):
    """An interruption in the second model leaves the first one's rows."""
    out, seen = tmp_path / "record.json", []

    def measure(model, context, batch):
        seen.append(json.loads(out.read_text())["rows"] if out.exists() else [])
        if model == "all_mla" and batch == 1:
            raise torch.OutOfMemoryError
        if model == "all_mla":
            raise KeyboardInterrupt
        return {"step_ms": 1.0, "cache_gib": 1.0, "limit_ms": 1.0}

    def rows_of(name, contexts, add):
        for context in contexts:
            for batch in (1, 4):
                add({"model": name, **long_context.fitting(measure, name, context, batch)})

    monkeypatch.setattr(long_context, "rows_of", rows_of)
    monkeypatch.setattr(long_context, "free_memory", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["long_context", "--contexts", "8192", "4096", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        long_context.main()
    assert [len(rows) for rows in seen] == [0, 1, 2, 3, 4, 5]
    record = json.loads(out.read_text())
    assert [row["context"] for row in record["rows"]] == [4096, 4096, 8192, 8192, 4096]
    assert [row["fits"] for row in record["rows"]] == [True] * 4 + [False]
    assert record["command"] == "python -m benchmarks.long_context --contexts 8192 4096 --out record.json"
    assert record["versions"]["torch"] == torch.__version__


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["long_context", "--models", "dense"])
    with pytest.raises(SystemExit):
        long_context.main()
    assert "invalid choice: 'dense'" in capsys.readouterr().err


@pytest.mark.parametrize("native", [False, True], ids=["ours", "native"])
def test_generate_is_timed_over_a_filled_cache(native, config, no_waiting, request):
    if native:
        request.getfixturevalue("native_class")
        model = full_model.native_model(config(), "cpu")
        cache = full_model.native_cache(model, 2, 50)
    else:
        model = full_model.random_model(KimiLinearForCausalLM, config(), "cpu")
        cache = full_model.random_cache(model, 2, 50)
    milliseconds = decode.generate_ms(model, cache, 2, (1, 9), **decode.WAYS["greedy"])
    assert 0 < milliseconds < 1000
    # Of each call all tokens but the last are in the cache: one of the prompt and the new ones.
    assert cache.get_seq_length() == 50 + 2 + 1 + 9


def test_plot_from_a_record(tmp_path, monkeypatch):
    record, figures = tmp_path / "record.json", [tmp_path / f"{i}.svg" for i in range(2)]
    record.write_text(json.dumps({"rows": ROWS}))
    for figure in figures:
        monkeypatch.setattr(sys, "argv", ["plot_long_context", str(figure), str(record)])
        plot_long_context.main()
    text = figures[0].read_text()
    assert text == figures[1].read_text()
    assert all(f"<!-- {label} -->" in text for label in (*plot_long_context.LABELS.values(), "4k", "8k", "100"))


def test_plot_needs_two_paths(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot_long_context"])
    with pytest.raises(SystemExit, match="plot_long_context OUT"):
        plot_long_context.main()
