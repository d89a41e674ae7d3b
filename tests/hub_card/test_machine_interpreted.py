"""verify and bench take captured steps where there are some: in Triton's interpreter, which stands for a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import few_programs, make_model, stepping

from kimi_linear.hub_card.bench import running
from kimi_linear.hub_card.bench.cases import Case, Expected
from kimi_linear.hub_card.measure.machine import Machine
from kimi_linear.hub_card.verify import whole_model
from kimi_linear.hub_card.verify.report import Report

__all__ = ["few_programs", "stepping"]  # fixtures


@pytest.fixture(scope="module")
def model():
    model = make_model()
    model.generation_config.eos_token_id = None
    return model


def test_verify_compares_steps_with_layers(model, stepping, monkeypatch):
    monkeypatch.setattr(whole_model, "_STEPS", 2)
    report = Report()
    whole_model.compare_steps(model, torch.arange(9), report)
    assert stepping == [(1, 1)] * 2  # one way by steps, the other without
    assert len(report.texts("right")) == 1 and "2 of 2 greedy tokens are the same" in report.texts("right")[0]


def test_bench_times_captured_steps_and_layers_apart(model, stepping, monkeypatch):
    for name in ("_FEW", "_LEAST", "MOST_TOKENS"):
        monkeypatch.setattr(running, name, 1)
    machine = Machine("cpu", ("a CPU",), (2**40,), 1e10, 1e11)
    for path in ("captured", "layers"):
        stepping.clear()
        running.measure(Case("ours", "decode", 5, 1, path), model, Expected(1.0, 1, 1.0), machine, 1)
        assert (len(stepping) > 0) == (path == "captured"), path
