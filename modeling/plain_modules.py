"""The one rule on "does anything hang on this module?", and how a change of the answer is noticed.

Code that reads a module's weights instead of calling the module (captured decode steps, packed prompts, KDA's stepping,
MLA's latent form, grouped experts, the loss without logits) passes over whatever else hangs on it. So each of them asks
`hanging` first, and calls the module where the answer is not None. A module is plain if it is of a class listed with
`reads_weights`, that class's forward is the one it was listed with, and no hook, adapter, patched forward, foreign
method or foreign parameter is on it.

Some wrappers change nothing that counts here. They are known by the code object of the function that their library
makes inside another one, which is an identity, not a name:

| wrapper | where | why it is harmless |
|---|---|---|
| accelerate's `AlignDevicesHook` without offloading | any module | moves inputs; weights are checked by themselves |
| transformers' output recorders | any module | they do nothing unless outputs are asked for, which is asked elsewhere |
| `make_inputs_require_grads` (PEFT, checkpointing) | embeddings | marks a tensor for autograd, values stay |
| TRL's `add_fused_lm_head` | the root's forward | calls the forward it replaced unless `fused_lm_head` is given |
| accelerate's mixed precision | the root's forward | autocast to the model's own dtype, and logits in fp32 |

How a change is noticed by `ModuleWatch`, whose cheap look compares a few counters and lists kept since the last whole
look (`events`):
- a hook added anywhere, global ones included: PyTorch numbers its handles;
- a parameter, buffer or module registered anywhere, which is how one replaces another: PyTorch's registration hooks;
- an attribute set or deleted on a module of ours (a patched `forward`, `training`, a router's scalar), and `.half()`,
  `.cuda()`, `.to(...)` of the model or any module of ours: `Noticing` counts them;
- an attribute added to one of PyTorch's modules (`o_proj.forward = ...`, accelerate's hooks): its dict is longer;
- a forward replaced on a class: compared with the one listed;
- a field of the config: its dict is compared.
What has no such sign is found by the whole look that opens every text: a parameter's `.data` set to another tensor, a
`Linear` cast or moved by itself, entries written straight into `_parameters` or `_forward_hooks`. While the answer is
not None every look is a whole one, so what is taken away is noticed too. A module that PEFT wraps is not plain; which
wrappers captured steps can do all the same, and their switches (set_adapter, disable_adapter, merge), is in
`plain_adapters`, and `ModuleWatch` compares the switches in every look.
"""

import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import CodeType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

# The forward that each class had when it was listed.
_FORWARDS: dict[type, Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)
}
_PACKED: set[type] = set()
_forward_of = attrgetter("forward")
_call_of_modules = nn.Module.__call__
# What a module's own code writes while it runs; no reader depends on it.
_WRITTEN_IN_FORWARD = frozenset({"tokens_per_expert"})
# Methods of nn.Module that others replace on an instance (accelerate warns of `.to` so) and no forward calls.
_METHODS_OF_TORCH = frozenset(dir(nn.Module)) - {"forward"}


class _Changes:
    """Counts changes of any module in this process; only ever compared for equality."""

    count = 0
    registrations_counted = False


def reads_weights(kind: type) -> type:
    """Class decorator: list `kind`, whose instances' weights are read past its forward, with the forward it has now."""
    _FORWARDS[kind] = kind.forward
    return kind


def reads_packed(kind: type) -> type:
    """Class decorator: the same for modules with packed weights, which only those read who know of them."""
    _PACKED.add(kind)
    return reads_weights(kind)


class Noticing(nn.Module):
    """A module whose changed attributes, and casts or moves, are counted (see `events`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in _WRITTEN_IN_FORWARD:
            _Changes.count += 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _Changes.count += 1

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._apply(*args, **kwargs)
        finally:
            _Changes.count += 1


def _count_registration(module: nn.Module, name: str, value: Any) -> None:
    _Changes.count += 1


def count_registrations() -> None:
    """From the first call on, parameters, buffers and modules registered anywhere are counted."""
    if not _Changes.registrations_counted:
        torch_module.register_module_parameter_registration_hook(_count_registration)
        torch_module.register_module_buffer_registration_hook(_count_registration)
        torch_module.register_module_module_registration_hook(_count_registration)
        _Changes.registrations_counted = True


def events() -> tuple[int, int]:
    """Two numbers of which one is new after every change that the module docstring says is counted."""
    return RemovableHandle.next_id, _Changes.count


def classes_are_as_listed() -> bool:
    """Whether every listed class has the forward it was listed with, and modules are called as PyTorch does."""
    same = list(map(_forward_of, _FORWARDS)) == list(_FORWARDS.values())
    return same and nn.Module.__call__ is _call_of_modules


def hanging(module: nn.Module) -> str | None:
    """What hangs on `module` itself, its children aside, in words that follow its name; or None."""
    kind = type(module)
    listed = _FORWARDS.get(kind)
    if listed is None:
        return f"is a {kind.__name__} (an adapter, quantised storage or a subclass)"
    if kind.forward is not listed or nn.Module.__call__ is not _call_of_modules:
        return f"is a {kind.__name__}, whose forward was replaced on the class"
    return hung(module)


def hung(module: nn.Module) -> str | None:
    """`hanging` for a class that the caller knows: hooks, global ones too, and a forward replaced on the instance."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "is called with global hooks (register_module_forward_hook)"
    held = module.__dict__
    if ("forward" in held or "_hf_hook" in held) and not is_placed_only(module):
        return _foreign_forward(module)
    for hooks in (held["_forward_hooks"], held["_forward_pre_hooks"]):
        if hooks and not all(map(_is_harmless_hook, hooks.values())):
            return "has a hook"
    if torch.is_grad_enabled() and _has_backward_hooks(held):
        return "has a backward hook"
    return None


def _foreign_forward(module: nn.Module) -> str:
    """What is around the forward of `module`, in words that follow its name."""
    hooks, hook = sys.modules.get("accelerate.hooks"), module.__dict__.get("_hf_hook")
    if hooks is not None and type(hook) is hooks.AlignDevicesHook and hook.offload:
        return (
            "has weights that accelerate brings from the CPU or from disk at each call; steps need all weights on "
            "GPUs: more of them, a max_memory that leaves none out, or a smaller dtype"
        )
    if hook is not None and not _places_only(hook):
        return f"has a hook of accelerate ({type(hook).__name__})"
    return "has a forward that was replaced on the instance"


def _has_backward_hooks(held: dict[str, Any]) -> bool:
    """Of a module whose attributes these are, or of all modules."""
    return bool(
        held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def weights_are_plain(modules: tuple[nn.Module, ...], device: torch.device) -> bool:
    """Whether nothing hangs on `modules`, and their parameters are dense on `device`."""
    return all(hanging(module) is None and type(module) not in _PACKED for module in modules) and all(
        type(x) is nn.Parameter and x.device == device and x.is_contiguous()
        for module in modules
        for x in module._parameters.values()
        if x is not None
    )


def foreign_methods(module: nn.Module) -> list[str]:
    """Names of methods that were replaced on the instance, but for those of every module (`hanging` has forward)."""
    kind = type(module)
    return [
        name
        for name, value in module.__dict__.items()
        if callable(value) and name not in _METHODS_OF_TORCH and name != "forward" and hasattr(kind, name)
    ]


def hanging_on_root(model: nn.Module, dtype: torch.dtype) -> str | None:
    """What hangs on the outermost model, in words that follow "the model", or None.

    Args:
        model: whose own hooks and forward are asked about, not those of its children. Its class or one of its bases is
            listed.
        dtype: of the parameters; autocast to another one isn't harmless.
    """
    own_forward = next(_FORWARDS[kind] for kind in type(model).__mro__ if kind in _FORWARDS)
    if type(model).forward is not own_forward:
        return f"is a {type(model).__name__}, which has a forward of its own"
    if nn.Module.__call__ is not _call_of_modules or type(model).__call__ is not _call_of_modules:
        return "is called in a way of its own"
    held = model.__dict__
    for hooks in (held["_forward_hooks"], held["_forward_pre_hooks"]):
        if not all(map(_is_harmless_hook, hooks.values())):
            return "has a hook"
    if "_hf_hook" in held and not _places_only(held["_hf_hook"]):
        return _foreign_forward(model)
    if "forward" in held and not _leads_to(held["forward"], own_forward, model, dtype):
        return "has a forward that was replaced on the instance, or autocast to another dtype around it"
    return None


def own_method(model: nn.Module, name: str, function: Callable[..., Any]) -> bool:
    """Whether `model.name` is `function`, bound to the model itself."""
    method = getattr(model, name)
    return getattr(method, "__func__", None) is function and method.__self__ is model


# Known wrappers and callers


def peft_looks_for_parameters() -> bool:
    """Whether the method that asks this was called by PEFT's search for `target_parameters`."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    function = getattr(getattr(tuners, "BaseTuner", None), "_inject_parameters", None)
    return function is not None and sys._getframe(2).f_code is function.__code__


def library_class(library: str, name: str) -> type | None:
    """`library.name` where the library (dotted) is loaded, else None."""
    return getattr(sys.modules.get(library), name, None)


def _made_in(library: str, function: str) -> tuple[CodeType, ...]:
    """Code objects of the functions that `library.function` (dotted) makes; () where the library isn't loaded."""
    maker = sys.modules.get(library)
    for name in function.split("."):
        maker = getattr(maker, name, None)
    code = getattr(maker, "__code__", None)
    return () if code is None else tuple(made for made in code.co_consts if isinstance(made, CodeType))


def _is_harmless_hook(hook: Any) -> bool:
    code = getattr(hook, "__code__", None)
    return code is not None and (
        code in _made_in("transformers.utils.output_capturing", "install_output_capuring_hook")
        or code in _made_in("transformers.modeling_utils", "PreTrainedModel.enable_input_require_grads")
    )


def _places_only(hook: Any) -> bool:
    """Whether accelerate's `hook` moves inputs to where the weights are, and nothing else."""
    hooks = sys.modules.get("accelerate.hooks")
    if hooks is None:
        return False
    if type(hook) is hooks.SequentialHook:
        return all(map(_places_only, hook.hooks))
    return type(hook) is hooks.AlignDevicesHook and not hook.offload


def is_placed_only(module: nn.Module) -> bool:
    """Whether nothing is around the forward of `module`, or what accelerate puts there for a hook that only places."""
    held = module.__dict__
    if "_hf_hook" not in held:  # removing a hook leaves the class's own forward on the instance
        return "forward" not in held or own_method(module, "forward", type(module).forward)
    forward, old = held.get("forward"), held.get("_old_forward")
    return (
        _places_only(held.get("_hf_hook"))
        and type(forward) is partial
        and getattr(forward.func, "__code__", None) in _made_in("accelerate.hooks", "add_hook_to_module")
        and getattr(old, "__func__", None) is type(module).forward
        and old.__self__ is module
    )


def take_hook_off(module: nn.Module) -> None:
    """Take accelerate's hook off `module`, of which `is_placed_only` holds."""
    sys.modules["accelerate.hooks"].remove_hook_from_module(module)
    del module.forward  # the class's own, which accelerate leaves on the instance


def _closed_over(function: Any, name: str) -> Any:
    """What `function` sees under a name of the function that it was made in."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _leads_to(forward: Any, own: Callable[..., Any], model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `forward` is `own`, bound to `model`, perhaps within wrappers that are known to be harmless."""
    while True:
        if type(forward) is MethodType:
            if forward.__self__ is not model:
                return False
            forward = forward.__func__
        if forward is own:
            return True
        if type(forward) is partial and _places_only(model.__dict__.get("_hf_hook")):
            if getattr(forward.func, "__code__", None) not in _made_in("accelerate.hooks", "add_hook_to_module"):
                return False
            forward = model.__dict__.get("_old_forward")
            continue
        code = getattr(forward, "__code__", None)
        if code is None:
            return False
        if code in _made_in("trl.trainer.utils", "add_fused_lm_head"):
            forward = _closed_over(forward, "original_forward")
        elif code in _made_in("accelerate.utils.operations", "convert_outputs_to_fp32"):
            forward = _closed_over(forward, "model_forward").model_forward
        elif code in _made_in("torch.amp.autocast_mode", "autocast_decorator"):
            autocast = _closed_over(forward, "autocast_instance")
            if autocast._enabled and autocast.fast_dtype != dtype:
                return False
            forward = _closed_over(forward, "func")
        else:
            return False


__all__ = [
    "Noticing",
    "classes_are_as_listed",
    "count_registrations",
    "events",
    "foreign_methods",
    "hanging",
    "hanging_on_root",
    "hung",
    "is_placed_only",
    "library_class",
    "own_method",
    "peft_looks_for_parameters",
    "reads_packed",
    "reads_weights",
    "take_hook_off",
    "weights_are_plain",
]
