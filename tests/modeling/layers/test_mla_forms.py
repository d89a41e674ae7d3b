"""MLA in latent form and expanded: the same numbers, and what hangs on kv_b_proj acts in both."""

import pytest
import torch
from comparisons import assert_same_logits
from torch import nn

from kimi_linear.modeling.layers.mla_attention import KimiMLAAttention


@pytest.fixture
def forms(monkeypatch):
    """Which form each MLA call took: a list that fills with "latent" and "expanded"."""
    taken = []
    for form in ("latent", "expanded"):
        attend = getattr(KimiMLAAttention, f"_attend_{form}")

        def recorded(self, *args, attend=attend, form=form, **kwargs):
            taken.append(form)
            return attend(self, *args, **kwargs)

        monkeypatch.setattr(KimiMLAAttention, f"_attend_{form}", recorded)
    return taken


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("new_tokens", [1, 2, 16])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@torch.no_grad()
def test_latent_form_equals_expanded_form(
    padded, new_tokens, implementation, load_tiny, random_ids, forms, monkeypatch
):
    model, ids = load_tiny("all_mla", attn_implementation=implementation), random_ids(3, 30 + new_tokens)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :7], mask[1, 12:15] = 0, 0
        mask[2, 31:] = 0  # among the new tokens
    logits = []
    for expected in ("latent", "expanded"):
        if expected == "expanded":
            monkeypatch.setattr(KimiMLAAttention, "_prefers_latent_form", lambda *_: False)
        cache = model(ids[:, :30], attention_mask=None if mask is None else mask[:, :30]).past_key_values
        forms.clear()
        logits.append(model(ids[:, 30:], attention_mask=mask, past_key_values=cache).logits)
        assert set(forms) == {expected}
    if mask is None:
        assert_same_logits(*logits)
    else:
        valid = mask[:, 30:].bool()
        assert_same_logits(logits[0][valid], logits[1][valid])


@torch.no_grad()
def test_prompts_and_long_continuations_take_the_expanded_form(shared_tiny, random_ids, forms):
    model = shared_tiny("all_mla")
    cache = model(random_ids(1, 5)).past_key_values
    model(random_ids(1, 40), past_key_values=cache)
    assert set(forms) == {"expanded"}


class DoubledLinear(nn.Linear):
    """Stands for an adapter: a module of another type around the same weight."""

    def forward(self, x):
        return 2 * super().forward(x)


def wrap_by_hook(layer):
    layer.kv_b_proj.register_forward_hook(lambda module, args, output: 2 * output)


def wrap_by_pre_hook(layer):
    layer.kv_b_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def wrap_by_subclass(layer):
    layer.kv_b_proj.__class__ = DoubledLinear


def wrap_by_accelerate(layer):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    hooks.add_hook_to_module(layer.kv_b_proj, Doubling())


def wrap_by_parametrization(layer):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer.kv_b_proj, "weight", Double())


@pytest.mark.parametrize(
    "wrap", [wrap_by_hook, wrap_by_pre_hook, wrap_by_subclass, wrap_by_accelerate, wrap_by_parametrization]
)
@torch.no_grad()
def test_what_hangs_on_kv_b_proj_also_acts_while_decoding(wrap, load_tiny, random_ids):
    model, ids = load_tiny("all_mla"), random_ids(2, 12)
    plain = model(ids).logits
    for layer in model.model.layers:
        wrap(layer.self_attn)
    expected = model(ids).logits
    assert (expected - plain).abs().max() > 0.1
    cache = model(ids[:, :9]).past_key_values
    logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 12)]
    assert_same_logits(torch.cat(logits, 1), expected[:, 9:])


@torch.no_grad()
def test_lora_on_kv_b_proj_also_acts_while_decoding(load_tiny, random_ids):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = random_ids(2, 12)
    settings = peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False, r=4)
    model = peft.get_peft_model(load_tiny("all_mla"), settings).eval()
    expected = model(ids).logits
    with model.disable_adapter():
        assert (expected - model(ids).logits).abs().max() > 1e-2
    cache = model(ids[:, :9]).past_key_values
    logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 12)]
    assert_same_logits(torch.cat(logits, 1), expected[:, 9:])
