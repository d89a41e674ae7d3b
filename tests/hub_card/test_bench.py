"""bench: which cases there are, what becomes of those that fail, and that nothing measured is lost."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoints import tiny_config

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.bench import command, models, plot, report, running
from kimi_linear.hub_card.bench.cases import Case, cases_of
from kimi_linear.hub_card.cli import main
from kimi_linear.hub_card.measure.machine import Machine
from kimi_linear.hub_card.measure.random_models import empty_model, random_model
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM
from kimi_linear.modeling.prompt import segments

MACHINE = Machine("cpu", ("a CPU",), (2**33,), 1e10, 1e11)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """config.json of a tiny shape, on a machine that needn't be measured, with runs as short as can be."""
    monkeypatch.setattr(command, "look_at_machine", lambda kind: MACHINE)
    monkeypatch.setattr(running, "_SECONDS_A_RUN", 1e-6)
    monkeypatch.setattr(command, "has_matplotlib", lambda: False)  # one test draws
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config(), "dtype": "bfloat16"}))
    return tmp_path / "config.json"


def run(config_file, *arguments: str, contexts: str = "8", batches: str = "1") -> tuple[int, dict | None]:
    """(exit code, record) of a run over one context."""
    out = config_file.parent / "out.json"
    words = ["bench", "--config", str(config_file), "--contexts", contexts, "--batches", batches]
    code = main([*words, "--device", "cpu", "--repeats", "1", "--out", str(out), *arguments])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_measures_prints_records_and_draws(config_file, native_class, capsys, monkeypatch):
    monkeypatch.setattr(command, "has_matplotlib", lambda: True)
    code, record = run(config_file)
    text = capsys.readouterr().out
    rows = {(row["model"], row["what"]): row for row in record["rows"]}
    models_ = ("ours", "all_mla", "native")
    assert rows.keys() == {(model, what) for model in models_ for what in ("decode", "prompt")}
    measured = [row for row in record["rows"] if row["status"] == "measured"]
    assert len(measured) >= 5  # a busy machine may leave a difference of two runs below zero
    assert all(row["ms"] > 0 and row["limit_ms"] > 0 and row["tokens_a_second"] > 0 for row in measured)
    assert code == 0 and record["machine"]["names"] == ["a CPU"] and record["versions"]["torch"] == torch.__version__
    assert "estimate: about" in text and "prompt, seconds" in text and "all MLA" in text
    assert (config_file.parent / "out.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "--draw", str(config_file.parent / "out.json")]) == 0
    capsys.readouterr()
    assert run(config_file)[0] == 2
    assert "exists: give another --out" in capsys.readouterr().err


def test_estimate_measures_nothing(config_file, capsys):
    assert run(config_file, "--estimate", "--models", "ours") == (0, None)
    assert "ours: 2 cases" in capsys.readouterr().out


def fail_at(monkeypatch, error: BaseException):
    def prompt_ms(model, case, repeats):
        raise error

    monkeypatch.setattr(running, "prompt_ms", prompt_ms)
    monkeypatch.setattr(running, "decode_ms", lambda *_: {"all_ms": [2.0], "new_tokens": 4})


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), 0, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 0, "out of memory"),
        (RuntimeError("an illegal access"), 1, "failed"),
    ],
)
def test_a_case_that_fails_is_named_and_the_rest_goes_on(config_file, monkeypatch, capsys, error, code, status):
    fail_at(monkeypatch, error)
    found, record = run(config_file, "--models", "ours", contexts="8", batches="2")
    assert found == code
    assert [row["status"] for row in record["rows"]] == ["measured", status]
    text = capsys.readouterr().out
    assert f"{status}: ours prompt 8 x 2 (" in text and ("no memory" if code == 0 else "failed") in text


def test_an_interruption_keeps_what_was_measured(config_file, monkeypatch, capsys):
    fail_at(monkeypatch, KeyboardInterrupt())
    code, record = run(config_file)
    assert code == 130 and [row["what"] for row in record["rows"]] == ["decode"]
    assert "interrupted after 1 cases" in capsys.readouterr().err


def test_what_would_end_the_process_on_a_cpu_is_not_tried(config_file, monkeypatch):
    monkeypatch.setattr(command, "look_at_machine", lambda kind: Machine("cpu", ("a CPU",), (600_000,), 1e10, 1e11))
    _, record = run(config_file, "--models", "ours")
    assert {row["status"] for row in record["rows"]} == {"out of memory"}
    assert "0.0 were free" in record["rows"][0]["why"]


def test_captured_steps_that_there_are_not_are_said_to_be_missing(config_file, capsys):
    _, record = run(config_file, "--models", "ours", "--paths", "captured")
    decode = next(row for row in record["rows"] if row["what"] == "decode")
    assert decode["status"] == "not measured" and "the kernels need Triton and an NVIDIA GPU" in decode["why"]


def test_segments_are_those_that_were_asked_for(config_file, monkeypatch):
    seen = []
    original = segments.forward_in_segments

    def forward(model, **options):
        seen.append(segments.segment_bounds(*options["input_ids"].shape))
        return original(model, **options)

    monkeypatch.setattr("kimi_linear.modeling.modeling_kimi_linear.forward_in_segments", forward)
    _, record = run(config_file, "--models", "ours", "--segments", "64", contexts="128")
    assert [row["segment"] for row in record["rows"]] == [0, segments.SEGMENT_TOKENS, 64]
    assert seen == [[(0, 64), (64, 128)]] * 2 and segments.SEGMENT_TOKENS == 32768


def test_cases():
    found = cases_of(["ours", "all_mla", "native"], [2048, 1024], [1], [1024], ["captured", "layers"])
    assert [str(case) for case in found if case.context == 2048] == [
        "ours decode captured 2048 x 1", "ours decode layers 2048 x 1", "ours prompt 2048 x 1",
        "ours prompt segments of 1024 2048 x 1", "all_mla decode captured 2048 x 1", "all_mla prompt 2048 x 1",
        "native decode 2048 x 1", "native prompt 2048 x 1",
    ]  # fmt: skip
    assert sum(case.context == 1024 for case in found) == 7  # 1,024 tokens aren't cut


def test_several_gpus_get_their_parts():
    config = KimiLinearConfig.from_dict({**tiny_config(), "dtype": "bfloat16"})
    size = models.bf16_bytes(config)
    place = models.spread_map(config, Machine("cuda", ("GPU",) * 2, (size, size), 1e12, 1e14))
    modules = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head"]
    assert list(place) == modules  # in order, so that a token changes GPUs once
    assert list(place.values()) == sorted(place.values()) and set(place.values()) == {"cuda:0", "cuda:1"}
    weights = {name: sum(x.nbytes for x in empty_model(KimiLinearForCausalLM, config).get_submodule(name).parameters())
               for name in modules}  # fmt: skip
    halves = [sum(weights[name] for name in modules if place[name] == device) for device in ("cuda:0", "cuda:1")]
    assert max(halves) < 0.65 * sum(halves)
    with pytest.raises(ValueError, match=r"1 GPU has .*--layers 2 would fit"):
        models.check_room(size, Machine("cuda", ("GPU",), (size * 2 // 3,), 1e12, 1e14), 4)


def test_a_device_map_changes_no_weight():
    config = KimiLinearConfig.from_dict({**tiny_config(), "dtype": "bfloat16"})
    place = dict.fromkeys(models.spread_map(config, MACHINE), "cpu")
    spread, whole = (random_model(KimiLinearForCausalLM, config, device, seed=3) for device in (place, "cpu"))
    for (name, one), other in zip(spread.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_plot_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    row = {**vars(Case("ours", "decode", 8, 1, "layers")), "status": "measured", "ms": 1.0, "limit_ms": 0.1}
    about = {"versions": {"flash-linear-attention": "0.6.0"}}
    monkeypatch.setattr(command, "has_matplotlib", lambda: False)
    command._show([{**row, "tokens_a_second": 1e3}], about, tmp_path / "x.json", interrupted=False)
    assert "pip install 'kimi-linear[bench]'" in capsys.readouterr().out


def test_several_lines_share_a_panel_without_overlapping_numbers():
    placed = []
    panel = SimpleNamespace(
        transData=SimpleNamespace(transform=lambda at: at), figure=SimpleNamespace(dpi=72),
        annotate=lambda text, at, offset, **_: placed.append(at[1] + offset[1]),
    )  # fmt: skip
    plot._name_ends(panel, [(10.0, 8, "red"), (11.0, 8, "blue"), (40.0, 8, "grey")])
    assert placed == [10.0, 19.0, 40.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contexts", "0"], "--contexts must be positive"),
        (["--segments", "100"], "multiples of 64"),
        (["--layers", "28"], "--layers must be from 1 to 27"),
        (["--draw", "nowhere.json"], "is not a JSON that bench wrote"),
        (["nowhere"], "nowhere is not a folder"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_durations():
    assert [report.duration(seconds) for seconds in (0.1, 89, 600)] == ["about 1 s", "about 89 s", "about 10 minutes"]
