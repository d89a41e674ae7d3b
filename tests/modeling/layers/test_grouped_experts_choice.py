"""When the experts are computed by the fused path, and when by transformers' own."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module, remove_hook_from_module

from kimi_linear.kernels.gpu import availability as gpu_availability


@pytest.fixture
def block(load_tiny, monkeypatch):
    """A bf16 MoE block on a device that the fused kernels are said to serve."""
    monkeypatch.setattr(gpu_availability, "device_serves", lambda device: True)
    return load_tiny("hybrid", dtype=torch.bfloat16).model.layers[1].block_sparse_moe


TOKENS = torch.zeros(3, 64, dtype=torch.bfloat16)


@torch.no_grad()
def test_plain_experts(block, monkeypatch):
    assert block._takes_grouped(TOKENS)
    assert not block._takes_grouped(TOKENS.float())
    with torch.enable_grad():
        assert block._takes_grouped(TOKENS)
    monkeypatch.setattr(gpu_availability, "device_serves", lambda device: False)
    assert not block._takes_grouped(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_another_implementation_is_honoured(block, implementation, monkeypatch):
    monkeypatch.setattr(block.experts.config, "_experts_implementation", implementation)
    assert not block._takes_grouped(TOKENS)


@torch.no_grad()
def test_what_hangs_on_the_module_is_honoured(block, monkeypatch):
    handle = block.experts.register_forward_hook(lambda module, inputs, output: output)
    assert not block._takes_grouped(TOKENS)
    handle.remove()
    handle = block.experts.register_forward_pre_hook(lambda module, inputs: inputs)
    assert not block._takes_grouped(TOKENS)
    handle.remove()
    for hook, taken in ((AlignDevicesHook(offload=True), False), (CpuOffload(), False), (AlignDevicesHook(), True)):
        add_hook_to_module(block.experts, hook)
        assert block._takes_grouped(TOKENS) == taken
        remove_hook_from_module(block.experts)
    block.experts._is_expert_parallel = True
    assert not block._takes_grouped(TOKENS)
    block.experts._is_expert_parallel = False
    block.experts = torch.nn.Sequential(block.experts)  # as an adapter wraps it
    assert not block._takes_grouped(TOKENS)


@torch.no_grad()
def test_weights_that_are_no_plain_parameters(block):
    class Quantised(torch.Tensor):
        pass

    block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj.data.as_subclass(Quantised), False)
    assert not block._takes_grouped(TOKENS)
