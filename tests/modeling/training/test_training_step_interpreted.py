"""A whole training step with the fused passes, in Triton's interpreter, beside PyTorch's operators."""

import pytest
import torch

pytest.importorskip("triton")

from tiny_checkpoints import TINY_CONFIGS, tiny_config

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.kernels.gpu import availability
from kimi_linear.modeling.layers import moe
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

IDS = torch.randint(0, 100, (1, 4), generator=torch.Generator().manual_seed(1))
# A dense layer and one with experts, without KDA, whose kernels are slow to interpret and have tests of their own.
SMALLEST = tiny_config(kda_layers=(), full_attn_layers=(1, 2))


@pytest.fixture
def fused(monkeypatch):
    """Switches the fused passes on or off for a CPU."""
    return lambda on: monkeypatch.setattr(availability, "device_serves", lambda device: on)


def make(dtype=torch.float32, config=SMALLEST):
    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig(**config)).to(dtype).train()


def step(model, **options):
    """(the loss's output, gradients by name)."""
    output = model(IDS, labels=IDS, use_cache=False, **options)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_every_gradient_is_pytorch_s(fused):
    fused(False)
    wanted, exact = step(make(config=TINY_CONFIGS["hybrid"]), skip_logits=False)
    fused(True)
    output, found = step(make(config=TINY_CONFIGS["hybrid"]))
    assert output.logits is None and abs(output.loss - wanted.loss) < 1e-5
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert (gradient - exact[name]).norm() <= 2e-5 * exact[name].norm(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant, fused):
    """In bf16, where another choice of experts in the recomputation would show."""
    fused(True)
    plain, exact = step(make(torch.bfloat16))
    model = make(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    output, found = step(model)
    assert torch.equal(output.loss, plain.loss)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    counts = [m.tokens_per_expert for m in model.modules() if isinstance(m, moe.KimiTopkRouter)]
    assert counts and all(c.sum() == IDS.numel() * model.config.num_experts_per_token for c in counts)


def adapted(model):
    peft = pytest.importorskip("peft")
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=8, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


def test_adapters_on_experts_are_peft_s(fused, monkeypatch):
    """Beside PEFT's own way, which adapts whole weights; its gradients come within bf16's rounding of float32's."""
    fused(False)
    _, exact = step(adapted(make()))
    calls = []
    run = moe.adapted_experts
    monkeypatch.setattr(moe, "adapted_experts", lambda *inputs: calls.append(1) or run(*inputs))
    fused(True)
    output, found = step(adapted(make(torch.bfloat16)))
    assert len(calls) == 1 and output.loss.isfinite()
    assert found.keys() == exact.keys() and any("experts" in name for name in found)
    for name, gradient in found.items():
        assert (gradient.float() - exact[name]).norm() <= 0.15 * exact[name].norm(), name


def test_hooks_on_experts_are_called(fused):
    fused(True)
    model, seen = make(torch.bfloat16), []
    for module in model.modules():
        if isinstance(module, moe.KimiExperts):
            module.register_full_backward_hook(lambda *args: seen.append(1))
    model.lm_head.register_full_backward_hook(lambda *args: seen.append(2))
    output, _ = step(model)
    assert sorted(seen) == [1, 2] and output.logits is not None
