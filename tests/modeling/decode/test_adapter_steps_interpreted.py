"""
Captured steps with PEFT's LoRA, unmerged: in Triton's interpreter, against PEFT's own forward through the layers.

Logits in fp32 agree as in test_decode_step_interpreted.py. An adapter's B is drawn, as PEFT begins it with zeros.
"""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft")

import peft
from interpreted_steps import close, few_programs, frozen, layer_by_layer, make_model, same_cache, stepping

__all__ = ["few_programs", "frozen", "stepping"]  # fixtures
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
EVERYTHING = [
    *ATTENTION, "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens",
]  # fmt: skip


def adapted(model, modules, parameters=None, autocast=True, **options):
    """A model with an adapter of random factors."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": modules, "target_parameters": parameters, **options}
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=autocast).eval()
    draw(wrapped)
    return wrapped


def draw(wrapped):
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)


@torch.no_grad()
def filled(model, rows):
    """A cache that has seen a ragged prompt, and the mask of one token more."""
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[0, :3] = 0
    ids = torch.randint(0, 120, (rows, 6), generator=torch.Generator().manual_seed(rows))
    return model(ids, attention_mask=mask[:, :6], use_cache=True).past_key_values, mask


@torch.no_grad()
def agrees(model, cache, mask=None):
    """Whether the next token's logits and states by a step are those by the layers; takes the token."""
    twin, new = cache.fork(1)[0], torch.arange(cache.layers[0].state.shape[0])[:, None] + 7
    run = partial(model, new, attention_mask=mask)
    expected = layer_by_layer(model, lambda: run(past_key_values=twin).logits)
    return close(run(past_key_values=cache).logits, expected) and same_cache(cache, twin)


@pytest.mark.parametrize(
    ("rows", "modules", "parameters"),
    [
        (1, ATTENTION, EXPERTS),
        (1, EVERYTHING, EXPERTS[:1]),
        (3, EVERYTHING, EXPERTS),
        (3, ["v_proj", "g_b_proj"], EXPERTS[1:]),
    ],
)
def test_every_projection(rows, modules, parameters, stepping):
    model = make_model()
    plain = filled(model, rows)[0]
    adapted(model, modules, parameters)
    cache, mask = filled(model, rows)
    assert not same_cache(plain, cache)  # the adapter counts
    assert agrees(model, cache, mask) and stepping == [(rows, 1)]


def test_ranks_that_differ_and_are_large(stepping):
    model = make_model()
    adapted(model, ["q_proj", "o_proj"], r=2, rank_pattern={"q_proj": 70})
    for rows in (1, 2):
        assert agrees(model, *filled(model, rows))
    assert stepping == [(1, 1), (2, 1)]


@torch.no_grad()
@pytest.mark.parametrize(("widened", "rows"), [(True, 1), (False, 1), (True, 3), (False, 3)])
def test_bf16_with_factors_of_either_dtype(widened, rows, stepping):
    """PEFT widens an adapter's factors to fp32 by default. As near to the fp32 logits as the layers are."""
    exact = adapted(make_model(), EVERYTHING, EXPERTS).get_base_model()
    model = make_model().bfloat16()
    wrapped = adapted(model, EVERYTHING, EXPERTS, autocast=widened)
    kept = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(kept[name].data)
    assert {x.dtype for name, x in wrapped.named_parameters() if "lora_" in name} == {
        torch.float32 if widened else torch.bfloat16
    }
    new = torch.arange(rows)[:, None] + 7
    runs = [partial(held, new, past_key_values=filled(held, rows)[0]) for held in (exact, model, model)]
    wanted, layers = layer_by_layer(exact, lambda: [run().logits for run in runs[:2]])
    assert float((runs[2]().logits - wanted).norm()) < 1.5 * float((layers - wanted).norm())
    assert stepping == [(rows, 1)]


UNUSUAL = {
    "q_proj has the adapter 'default' as a variant of LoRA": {"use_dora": True},
    "q_proj has the adapter 'default', part of which has a bias": {"lora_bias": True},
    "q_proj drops out 0.5 of the input of the adapter 'default' in training mode": {"lora_dropout": 0.5},
    "gate has an adapter on the parameter weight": {"target_modules": [], "target_parameters": ["gate.weight"]},
    "model.norm is a ModulesToSaveWrapper": {"modules_to_save": ["model.norm"]},
    "o_proj.base_layer has a hook": {},
    "o_proj has the adapter 'default', part of which has a hook": {},
    "o_proj has 2 active adapters (default, other), and a step takes one": {},
    "o_proj has a merged adapter that was disabled": {},
    "adapters are of several dtypes (torch.bfloat16, torch.float32)": {},
}


@pytest.mark.parametrize("words", UNUSUAL)
def test_what_is_left_to_the_layers_is_named(words, stepping):
    model = make_model()
    wrapped = adapted(model, **{"modules": ["q_proj", "o_proj"], **renamed(UNUSUAL[words])})
    o_proj = model.model.layers[0].self_attn.o_proj
    if "2 active" in words:
        wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
        wrapped.base_model.set_adapter(["default", "other"])
    if "drops out" in words:
        model.train()
    if "base_layer has a hook" in words:
        o_proj.base_layer.register_forward_hook(print)
    if "part of which has a hook" in words:
        o_proj.lora_A["default"].register_forward_hook(print)
    if "merged" in words:
        wrapped.merge_adapter()
        o_proj.enable_adapters(False)
    if "dtypes" in words:
        o_proj.lora_A["default"].bfloat16()
        o_proj.lora_B["default"].bfloat16()
    assert model.decode_path.startswith("layer by layer: ") and words in model.decode_path


def renamed(options):
    names = {"target_modules": "modules", "target_parameters": "parameters"}
    return {names.get(name, name): value for name, value in options.items()}


def generate(model, **options):
    """Logits of three tokens, the last two by steps."""
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(torch.tensor([[3, 14, 15, 92]]), **options).logits)


def same_text(wrapped):
    expected = layer_by_layer(wrapped.get_base_model(), lambda: generate(wrapped))
    return close(generate(wrapped), expected)


def test_switches_between_texts(stepping, frozen):
    """Each is noticed, and goes by steps; those of an earlier switch are found again."""
    model = make_model()
    plain = layer_by_layer(model, lambda: generate(model))
    wrapped = adapted(model, ["v_proj"], EXPERTS[1:])
    assert same_text(wrapped) and not close(generate(wrapped), plain)
    first = list(model._decode._steps.values())
    with wrapped.disable_adapter():  # the reference model of GRPO
        assert close(generate(wrapped), plain)
    wrapped.merge_adapter()
    assert same_text(wrapped)
    wrapped.unmerge_adapter()
    generate(wrapped)
    assert [step for step in model._decode._steps.values() if any(step is kept for kept in first)] == first
    rescale(wrapped, 4.0)
    assert same_text(wrapped)
    assert len(stepping) == 2 * 6


def rescale(wrapped, scale):
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = scale


@torch.no_grad()
def test_switches_between_two_forwards_of_ones_own_loop(stepping, frozen):
    """Nothing but the switch itself shows some of them: no module, no tensor is another."""
    model = make_model()
    wrapped = adapted(model, ["v_proj"])
    cache, _ = filled(model, 1)
    second = peft.LoraConfig(r=2, target_modules=["o_proj"])
    changes = [
        lambda: None,
        wrapped.merge_adapter,
        wrapped.unmerge_adapter,
        partial(rescale, wrapped, 9.0),
        lambda: (wrapped.add_adapter("other", second), draw(wrapped)),
        partial(wrapped.set_adapter, "other"),
        partial(wrapped.set_adapter, "default"),
        partial(wrapped.delete_adapter, "other"),
        wrapped.merge_and_unload,
    ]
    for change in changes:
        change()
        assert agrees(model, cache)
    assert stepping == [(1, 1)] * len(changes)


@torch.no_grad()
def test_disabled_between_two_forwards(stepping, frozen):
    model = make_model()
    wrapped = adapted(model, ["v_proj"])
    cache, _ = filled(model, 1)
    assert agrees(model, cache)
    with wrapped.disable_adapter():
        assert agrees(model, cache)
    assert agrees(model, cache) and stepping == [(1, 1)] * 3


@torch.no_grad()
def test_an_optimiser_writes_where_steps_read(stepping, frozen):
    """Fused AdamW moves no version counter; training mode and checkpointing come and go around each rollout."""
    model = make_model()
    wrapped = adapted(model, ["v_proj", "o_proj"], EXPERTS).train()
    cache, _ = filled(model, 1)
    factors = [x for x in wrapped.parameters() if x.requires_grad]
    optimiser = torch.optim.AdamW(factors, lr=0.1, fused=True)
    assert agrees(model, cache)
    held = list(model._decode._steps.values())
    model.gradient_checkpointing_enable()
    for x in factors:
        x.grad = torch.randn_like(x)
    optimiser.step()
    model.gradient_checkpointing_disable()
    wrapped.eval()
    assert agrees(model, cache) and list(model._decode._steps.values()) == held and len(stepping) == 2


def test_memory_is_given_back_between_rollouts(stepping):
    model = make_model()
    wrapped = adapted(model, ["v_proj"])
    cache, _ = filled(model, 1)
    with torch.no_grad():
        assert agrees(model, cache) and model._decode._steps
        wrapped.free_generation_memory()
        assert not model._decode._steps and agrees(model, cache) and len(stepping) == 2
