"""What hangs on a module, and how fast a change is noticed: without a GPU, and without running the model."""

import copy
import weakref

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from torch import nn

from kimi_linear.modeling.module_watch import ModuleWatch
from kimi_linear.modeling.plain_modules import hanging, hanging_on_root, own_method


@pytest.fixture
def model(load_tiny):
    return load_tiny("hybrid")


def names_of_hanging(model):
    return [name for name, module in model.named_modules() if module is not model and hanging(module) is not None]


def test_a_fresh_model_is_plain(model):
    assert names_of_hanging(model) == []
    assert hanging_on_root(model, torch.float32) is None


@pytest.mark.parametrize(
    "name",
    ["model", "model.embed_tokens", "model.norm", "lm_head", "model.layers.0", "model.layers.0.self_attn",
     "model.layers.0.self_attn.q_conv1d", "model.layers.0.self_attn.o_norm", "model.layers.1.block_sparse_moe.gate",
     "model.layers.1.block_sparse_moe.experts", "model.layers.1.block_sparse_moe.experts.act_fn"],
)  # fmt: skip
def test_hooks_and_forwards_are_seen_everywhere(model, name):
    module = model.get_submodule(name)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert names_of_hanging(model) == [name]
        handle.remove()
    module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)
    assert names_of_hanging(model) == [name]
    del module.forward
    kind = type(module)
    module.__class__ = type("Steered", (kind,), {})
    assert names_of_hanging(model) == [name]
    module.__class__ = kind
    assert names_of_hanging(model) == []


def test_what_is_hung_on_all_modules_or_on_a_class_is_seen(model, monkeypatch):
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *args: None)
    assert hanging(model.lm_head) is not None
    handle.remove()
    assert hanging(model.lm_head) is None
    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "forward", lambda self, x, residual=None: x)
    assert names_of_hanging(model)[0].endswith("norm")


def test_parametrised_and_quantised_weights_are_seen(model):
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())
    assert "lm_head" in names_of_hanging(model)
    nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight")
    assert names_of_hanging(model) == []


def test_accelerate_that_places_is_harmless_and_what_brings_weights_is_not(model, tmp_path):
    linear = model.model.layers[0].self_attn.o_proj
    add_hook_to_module(linear, AlignDevicesHook("cpu"))
    assert hanging(linear) is None
    add_hook_to_module(linear, AlignDevicesHook("cpu"), append=True)
    assert type(linear._hf_hook) is SequentialHook and hanging(linear) is None
    placed = linear.forward
    linear.forward = lambda x: 2 * placed(x)
    assert hanging(linear) is not None  # patched after accelerate
    linear.forward = placed
    remove_hook_from_module(linear)
    for hook in (CpuOffload("cpu"), AlignDevicesHook("cpu", offload=True, weights_map=dict(linear.named_parameters()))):
        add_hook_to_module(linear, hook)
        assert hanging(linear) is not None
        remove_hook_from_module(linear)
    linear.forward = lambda x: x
    add_hook_to_module(linear, AlignDevicesHook("cpu"))
    assert hanging(linear) is not None  # patched before accelerate
    remove_hook_from_module(linear)


def test_placed_models_are_plain_and_offloaded_ones_are_not(load_tiny, tmp_path):
    placed = accelerate.dispatch_model(load_tiny("hybrid"), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(placed.model.layers[0].self_attn.o_proj, "_hf_hook") or hasattr(placed, "_hf_hook")
    assert names_of_hanging(placed) == [] and hanging_on_root(placed, torch.float32) is None
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    offloaded = accelerate.dispatch_model(load_tiny("hybrid"), device_map, main_device="cpu", offload_dir=tmp_path)
    assert any(name.startswith("model.layers.0") for name in names_of_hanging(offloaded))


def test_recorders_and_the_hook_for_checkpointing_are_harmless(model, random_ids):
    model(random_ids(1, 4), output_hidden_states=True, output_router_logits=True)
    assert model.model.layers[0]._forward_hooks  # transformers leaves them there
    model.enable_input_require_grads()
    assert model.model.embed_tokens._forward_hooks
    assert names_of_hanging(model) == []

    def make_inputs_require_grads(module, input, output):  # the name alone says nothing
        return 2 * output

    model.model.embed_tokens.register_forward_hook(make_inputs_require_grads)
    assert names_of_hanging(model) == ["model.embed_tokens"]


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps one state a process, which a Trainer of another test may have set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_trl_and_accelerate_around_the_root(load_tiny, fresh_accelerator):
    trl_utils = pytest.importorskip("trl.trainer.utils")
    model = load_tiny("hybrid")
    trl_utils.add_fused_lm_head(model)
    assert hanging_on_root(model, torch.float32) is None
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert prepared is model and model._original_forward is not model.forward
    assert "autocast" in hanging_on_root(model, torch.float32)
    assert hanging_on_root(model, torch.bfloat16) is None  # autocast to what the weights are changes nothing
    wrapped = model.forward
    model.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    assert hanging_on_root(model, torch.bfloat16) is not None
    model = load_tiny("hybrid")
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    trl_utils.add_fused_lm_head(model)
    assert hanging_on_root(model, torch.float32) is not None  # TRL's wrapper, around one that isn't known


def test_trl_casting_the_head_is_seen(load_tiny):
    model = load_tiny("hybrid")
    model.lm_head.forward = lambda x: nn.functional.linear(x.float(), model.lm_head.weight.float())
    assert names_of_hanging(model) == ["lm_head"]


def test_methods_of_the_model_itself(model):
    own = type(model).prepare_inputs_for_generation
    assert own_method(model, "prepare_inputs_for_generation", own)
    bound = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: bound(*args, **kwargs)
    assert not own_method(model, "prepare_inputs_for_generation", own)
    model.prepare_inputs_for_generation = bound  # what PEFT leaves there afterwards
    assert own_method(model, "prepare_inputs_for_generation", own)
    twin = copy.deepcopy(model)
    twin.prepare_inputs_for_generation = bound  # bound to the other one
    assert not own_method(twin, "prepare_inputs_for_generation", own)


def _patch(module):
    module.forward = lambda *args, **kwargs: None


CHANGES = {
    "hook": lambda model: model.lm_head.register_forward_hook(print),
    "global hook": lambda model: nn.modules.module.register_module_forward_hook(lambda *args: None),
    "forward of a linear": lambda model: _patch(model.model.layers[1].self_attn.o_proj),
    "forward of the embedding": lambda model: _patch(model.model.embed_tokens),
    "forward of a layer": lambda model: _patch(model.model.layers[1]),
    "forward of the decoder": lambda model: _patch(model.model),
    "a layer": lambda model: model.model.layers.__setitem__(0, nn.Identity()),
    "a module": lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Linear(64, 96, bias=False)),
    "a parameter": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().clone())),
    "a bias": lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.zeros(128))),
    "a buffer": lambda model: model.model.layers[1].block_sparse_moe.gate.update_correction_bias(),
    "a router's scalar": lambda model: setattr(model.model.layers[1].block_sparse_moe.gate, "scaling_factor", 9.0),
    "an epsilon": lambda model: setattr(model.model.norm, "variance_epsilon", 0.1),
    "a field of the config": lambda model: setattr(model.config, "kda_backend", "torch"),
    "the experts' way": lambda model: setattr(model.config, "_experts_implementation", "eager"),
    "training": lambda model: model.model.layers[1].train(),
    "dtype": lambda model: model.half(),
    "dtype of a layer": lambda model: model.model.layers[0].half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_cheap_look_notices(model, change):
    watch = ModuleWatch()
    before = watch.keep(model)
    assert watch.seems_same(model) and watch.is_same(model)
    if change == "a buffer":
        model.model.layers[1].block_sparse_moe.gate.tokens_per_expert = torch.arange(8)
    done = CHANGES[change](model)
    try:
        assert not watch.seems_same(model) and not watch.is_same(model)
        if change in ("a parameter", "a router's scalar", "an epsilon", "dtype", "a module", "a buffer"):
            assert watch.keep(model) != before
        if change == "training":
            assert watch.keep(model) == before  # steps are kept
    finally:
        if hasattr(done, "remove"):
            done.remove()


def test_the_whole_look_notices_what_has_no_sign(model):
    watch, linear = ModuleWatch(), model.model.layers[0].self_attn.o_proj

    def check(change):
        watch.keep(model)
        change()
        assert not watch.is_same(model)

    check(lambda: setattr(linear.weight, "data", linear.weight.data.clone()))
    check(lambda: linear.half())
    check(lambda: linear._parameters.update(weight=nn.Parameter(linear.weight.data)))
    check(lambda: linear._forward_hooks.update({-1: print}))
    check(lambda: linear._forward_hooks.clear())
    check(lambda: setattr(linear.weight, "data", linear.weight.data[:, ::2]))


def test_a_forward_replaced_on_a_class_is_noticed(model, monkeypatch):
    watch = ModuleWatch()
    watch.keep(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not watch.seems_same(model)
    monkeypatch.undo()
    assert watch.seems_same(model)


def test_changes_of_another_model_cost_one_whole_look(model, load_tiny):
    watch, other = ModuleWatch(), load_tiny("hybrid")
    watch.keep(model)
    other.model.layers[0].register_forward_hook(print)
    other.lm_head.weight = nn.Parameter(torch.zeros(128, 64))
    other.half()
    assert not watch.seems_same(model) and watch.is_same(model) and watch.seems_same(model)
    model.model.norm.variance_epsilon = 0.5
    assert not watch.is_same(model) and not watch.seems_same(model) and not watch.is_same(model)


def test_training_counts_of_routers_are_no_change(model, random_ids):
    watch = ModuleWatch()
    model.train()
    model(random_ids(1, 5))  # at the first call transformers puts its recorders on the layers
    watch.keep(model)
    model(random_ids(1, 5))
    assert watch.seems_same(model)


def test_a_watch_does_not_keep_its_model(load_tiny):
    model = load_tiny("hybrid")
    watch = ModuleWatch()
    watch.keep(model)
    model.kept_watch = watch
    gone = weakref.ref(model)
    del model
    assert gone() is None  # at once, without the garbage collector
