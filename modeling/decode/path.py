"""Which way a model decodes: by the captured step where it can be served, else layer by layer."""

import threading
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...kernels.gpu.availability import is_first_choice
from ...kernels.gpu.availability import serves as kernels_serve
from ...kernels.kda.operators import MAX_HEAD_DIM
from ...kernels.kda.step import MAX_NEW_TOKENS
from ..cache.kimi_linear_cache import KimiLinearCache
from ..checkpoint.packed_modules import KimiPackedExperts, KimiPackedLinear
from ..input_checks import wants_records
from ..layers.moe import KimiTopkRouter
from ..module_watch import ModuleWatch
from ..placement import device_of_name, layer_spans
from ..plain_adapters import adapter_misfit, adapter_of, adapter_parts, wraps
from ..plain_modules import Noticing, foreign_methods, hanging
from .packed import packed_reason
from .row_parts import RowParts
from .shapes import released_shapes
from .step import MAX_STEP_TOKENS, DecodeStep

# New tokens of all sequences that steps of `MAX_NEW_TOKENS` take one after the other; more are a prompt.
MAX_CHUNKED_TOKENS = 64
# Bytes of the buffers of the steps that are kept, one step per (batch, new tokens). At the released shape the sixteen
# lengths of one sequence take 304 MiB together, so drafts of varying length don't evict one another.
_KEPT_BYTES = 1 << 29


class DecodePath:
    """The captured steps of one model, and whether it can use them. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        # By what adapters are switched to (a number in `_states`), batch and new tokens.
        self._steps: OrderedDict[tuple[int, int, int], DecodeStep] = OrderedDict()
        self._states: dict[int, tuple[Any, ...]] = {}
        self._state = 0
        self._watch = ModuleWatch()
        self._made_from: tuple[Any, ...] | None = None
        self._reason: str | None = "not looked at yet"
        self._look_is_due = True
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodePath":
        return DecodePath()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return DecodePath, ()

    def look_again(self) -> None:
        """A new text begins: let the next question take the whole look (see `plain_modules`)."""
        self._look_is_due = True

    def reason(self, model: Any) -> str | None:
        """Why `model` decodes layer by layer, or None if it decodes by captured steps.

        After `look_again`, or while there is a reason, every module and tensor is looked at; else only what counts
        changes. Steps that were made from other weights or modules are dropped.
        """
        passing = _passing_reason(model)
        if passing is not None:
            return passing
        with self._lock:
            whole = self._look_is_due or self._reason is not None
            if not whole and self._watch.seems_same(model):
                return None
            layers = model.config.num_hidden_layers
            if len(model.model.layers) != layers:
                return f"only {layers} of {len(model.model.layers)} layers are in use (early exit)"
            if not self._watch.is_same(model):
                made_from = self._watch.keep(model)
                if made_from != self._made_from:
                    self._steps.clear()
                    self._made_from = made_from
                self._enter_state(self._watch.switches)
                self._reason = _lasting_reason(model)
            self._look_is_due = False
            return self._reason

    @property
    def made_from(self) -> tuple[Any, ...] | None:
        """What the model was made of at the last whole look: another object once that has changed."""
        return self._made_from

    def _enter_state(self, switches: tuple[Any, ...]) -> None:
        """Find the steps that were made while adapters were switched so; those made otherwise are kept as well."""
        held = {state for state, _, _ in self._steps}
        self._states = {state: kept for state, kept in self._states.items() if state in held}
        found = [state for state, kept in self._states.items() if kept == switches]
        self._state = found[0] if found else max(self._states, default=0) + 1
        self._states[self._state] = switches

    def free(self) -> None:
        """Drop all steps: their graphs and buffers, and what was kept to tell whether they still serve."""
        with self._lock:
            self._steps.clear()
            self._states.clear()
            self._watch, self._made_from = ModuleWatch(), None
            self._reason, self._look_is_due = "not looked at yet", True

    def step(self, model: Any, batch: int, tokens: int) -> DecodeStep | RowParts | None:
        """The step for `tokens` new tokens of `batch` sequences, captured if need be, or None (see `reason`)."""
        if tokens > MAX_NEW_TOKENS or self.reason(model) is not None:
            return None
        if batch * tokens > MAX_STEP_TOKENS:
            return RowParts(partial(self._kept_step, model), batch, tokens, MAX_STEP_TOKENS // tokens)
        return self._kept_step(model, batch, tokens)

    def _kept_step(self, model: Any, batch: int, tokens: int) -> DecodeStep:
        with self._lock:
            key = self._state, batch, tokens
            step = self._steps.get(key)
            if step is None:
                step = self._steps[key] = DecodeStep(model, batch, tokens)
                while len(self._steps) > 1 and sum(kept.nbytes for kept in self._steps.values()) > _KEPT_BYTES:
                    self._steps.popitem(last=False)
            self._steps.move_to_end(key)
            return step


def gpu_has_kernels(model: Any) -> bool:
    """Whether the step's kernels run where the head of `model` is, and are meant to."""
    return _has_kernels(_device_of(model))


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and kernels_serve(device) and is_first_choice(device)


def _device_of(model: Any) -> torch.device:
    weight = getattr(model.lm_head, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu")


def _passing_reason(model: Any) -> str | None:
    """What no look at the modules shows: the state of this thread, and the device."""
    if _device_of(model).type == "meta":
        return f"lm_head {hanging(model.lm_head) or 'has no weights yet'}"
    if not gpu_has_kernels(model):
        return f"the kernels need Triton and an NVIDIA GPU from sm_80 on; the model is on {_device_of(model)}"
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return "the layers are being compiled or captured"
    kind = _device_of(model).type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != model.lm_head.weight.dtype:
        dtypes = torch.get_autocast_dtype(kind), model.lm_head.weight.dtype
        return "autocast to {} is on, and the parameters are {}".format(*dtypes)
    return None


def reason_of_weights(model: Any) -> str | None:
    """Why `model` would decode layer by layer on a GPU that has the kernels, or None; it may be on meta."""
    return _lasting_reason(model)


@torch.no_grad()  # as steps run: backward hooks, which count with gradients alone, would stay in what is remembered
def _lasting_reason(model: Any) -> str | None:
    """What holds until something changes that `ModuleWatch` notices."""
    config = model.config
    if config.kda_backend not in ("auto", "triton"):
        return f"kda_backend is {config.kda_backend!r}"
    if config.linear_head_dim > MAX_HEAD_DIM:
        return f"KDA heads of {config.linear_head_dim} are wider than {MAX_HEAD_DIM}"
    if getattr(config, "is_causal", None) is False:
        return "is_causal is False"
    if config.num_expert_group != config.topk_group:
        return "experts are chosen by group"
    if (packed := packed_reason(model)) is not None:
        return packed
    parts: set[int] = set()  # modules inside of wrappers
    for name, module in model.named_modules():
        if module is model or id(module) in parts:
            continue
        if wraps(module):
            parts.update(map(id, adapter_parts(module)))
            what = adapter_misfit(module)
        else:
            what = hanging(module) or _changed_scalar(module, config)
        if what is not None:
            return f"{name} {what}"
    return _foreign_tensor(model)


def _changed_scalar(module: nn.Module, config: Any) -> str | None:
    """What a module of ours was told to do that a step doesn't, in words that follow its name; or None."""
    if isinstance(module, Noticing):
        replaced = foreign_methods(module)
        if replaced:
            return f"has a method of its own ({replaced[0]})"
    if isinstance(module, KimiTopkRouter):
        chosen = (module.top_k, module.num_experts, module.num_groups == module.topk_group)
        if chosen != (config.num_experts_per_token, config.num_experts, True):
            return "chooses other experts than the config says"
    if getattr(module, "backend", "auto") not in ("auto", "triton"):
        return f"has the backend {module.backend!r}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "renormalises its weight (max_norm)"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if hasattr(module, "gate_up_proj") and implementation not in (None, "eager"):
        function = ALL_EXPERTS_FUNCTIONS.get(implementation)
        if not getattr(function, "__module__", "").startswith("transformers.") or getattr(
            module, "_is_expert_parallel", False
        ):
            return f"computes by {implementation!r}, which is not one of transformers' own ways"
    return None


def _foreign_tensor(model: Any) -> str | None:
    """A parameter or buffer that a step can't read, in words; or None."""
    spans, dtype = layer_spans(model), model.lm_head.weight.dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"parameters are {dtype}"
    shapes = released_shapes(model.config)
    adapters = [module for module in model.modules() if wraps(module)]
    of_adapters = {id(x) for module in adapters for part in adapter_parts(module) for x in part.parameters()}
    packed = tuple(
        f"{name}." for name, x in model.named_modules() if isinstance(x, KimiPackedLinear | KimiPackedExperts)
    )
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        device = device_of_name(name, spans)
        if id(x) in of_adapters:  # `adapter_misfit` has looked at the rest
            if x.device != device:
                return f"{name} is on {x.device}, and what it is for is on {device}"
            continue
        if name.startswith(packed):
            continue  # `packed_reason` has looked at them
        name = name.replace("base_layer.", "")
        if name == "model.norm.weight" and x.device.type == device.type:
            device = x.device  # the last part fetches it
        plain = type(x) in (nn.Parameter, torch.Tensor) and x.is_contiguous() and x.device == device
        fixed = not name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
        if not plain or not x.is_floating_point() or (fixed and x.dtype != dtype):
            return f"{name} is a {type(x).__name__} of {x.dtype} on {x.device}, beside {dtype} on {device}"
        if device.type != spans[-1].device.type or (device.type == "cuda" and not _has_kernels(device)):
            return f"{name} is on {device}, where the kernels don't run"
        wanted = shapes.get(name)
        if wanted is None or tuple(x.shape) != wanted:
            return f"{name} is {list(x.shape)}, and the config says {wanted and list(wanted)}"
    dtypes = {adapter.down.dtype for adapter in map(adapter_of, adapters) if adapter is not None}
    return f"adapters are of several dtypes ({', '.join(sorted(map(str, dtypes)))})" if len(dtypes) > 1 else None


def serves(
    cache: Any, input_ids: torch.Tensor | None, attention_mask: Any, kwargs: dict[str, Any], config: Any
) -> bool:
    """Whether a forward call with these arguments is one that steps can answer: a few tokens over a cache of ours."""
    if not isinstance(cache, KimiLinearCache) or cache.get_seq_length() == 0 or input_ids is None:
        return False
    if input_ids.ndim != 2 or input_ids.numel() == 0 or torch.is_grad_enabled():
        return False
    tokens, most = input_ids.shape[1], MAX_STEP_TOKENS if input_ids.shape[1] <= MAX_NEW_TOKENS else MAX_CHUNKED_TOKENS
    if tokens > 1 and input_ids.numel() > most:
        return False  # a prompt
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        return False
    return kwargs.get("cu_seq_lens_q") is None and not wants_records(kwargs, config)


def step_mask(attention_mask: torch.Tensor | None, new_tokens: int) -> tuple[bool, torch.Tensor | None]:
    """(whether a step can honour it, the bool mask or None where nothing is padding). Waits for the values.

    The mask is dense, as a step reads it by its address.
    """
    if attention_mask is None:
        return True, None
    mask = attention_mask.bool().contiguous()
    whole, new = torch.stack([mask.all(), mask[:, -new_tokens:].all()]).tolist()
    return bool(new), None if whole else mask


__all__ = ["MAX_CHUNKED_TOKENS", "DecodePath", "reason_of_weights", "serves", "step_mask"]
