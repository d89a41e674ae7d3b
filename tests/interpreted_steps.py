"""What tests of captured steps in Triton's interpreter share: a small model, fixtures, and the way by layers."""

import copy

import pytest
import torch
from tiny_checkpoints import tiny_config
from torch import nn

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.kernels.decode.configs import GemvConfig
from kimi_linear.kernels.gpu.sizes import padded
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.decode import plan as decode_plan
from kimi_linear.modeling.decode.step import DecodeStep
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32], [38, 46, 26, 43, 38, 32, 79, 50, 28]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def make_model(**overrides):
    torch.manual_seed(0)
    config = tiny_config(kda_layers=(1,), full_attn_layers=(2,))
    config["linear_attn_config"] = {**config["linear_attn_config"], "num_heads": 2}
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict({**config, **overrides})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)  # ones would hide a norm that is left out
        elif parameter.ndim > 1 and "A_log" not in name:
            parameter.data.mul_(4)  # far enough from uniform logits
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.2, 0.2)
    return model


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Large tiles: the interpreter's time goes with the number of programs."""
    large = {
        "gemv_config": lambda columns, rows: GemvConfig(min(256, padded(rows)), padded(columns), 1, 4),
        "experts_config": lambda columns: GemvConfig(32, padded(columns), 1, 4),
        "down_config": lambda columns: GemvConfig(64, padded(columns), 1, 4),
    }
    for name, config in large.items():
        monkeypatch.setattr(decode_plan, name, config)


@pytest.fixture
def stepping(monkeypatch):
    """Lets the interpreter stand in for a GPU; gives the steps' runs, (batch, tokens) each."""
    runs, run = [], DecodeStep.run

    def counted(self, *args):
        runs.append((self.batch, self.tokens))
        return run(self, *args)

    monkeypatch.setattr(DecodeStep, "run", counted)
    monkeypatch.setattr(decode_path, "gpu_has_kernels", lambda model: True)
    return runs


def layer_by_layer(model, function):
    """`function()` without steps."""
    path = decode_path.gpu_has_kernels
    decode_path.gpu_has_kernels = lambda model: False
    try:
        assert model.decode_path.startswith("layer by layer")
        return function()
    finally:
        decode_path.gpu_has_kernels = path


def close(x, exact):
    return float((x - exact).norm() / exact.norm()) < 1e-5


@pytest.fixture
def frozen(monkeypatch):
    """Steps that keep, as a CUDA graph does, the modules, scalars and addresses that they were captured with."""
    init = DecodeStep.__init__

    def captured(self, model, *args):
        init(self, model, *args)
        memo = {id(x): nn.Parameter(x.data, requires_grad=False) for x in model.parameters()}
        memo |= {id(x): x.detach() for x in model.buffers()}
        twin = copy.deepcopy(model, memo)
        for plan in self.plans:
            plan._model = lambda: twin

    monkeypatch.setattr(DecodeStep, "__init__", captured)


def same_cache(cache, wanted):
    """Whether two caches hold the same, up to rounding."""
    pairs = [
        (x, y, ("state", "window") if hasattr(y, "state") else ("rows",)) for x, y in zip(cache.layers, wanted.layers)
    ]
    return all(close(getattr(x, name), getattr(y, name)) for x, y, names in pairs for name in names)
