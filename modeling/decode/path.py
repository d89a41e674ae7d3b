"""Which way a model decodes: by the captured step where it can be served, else layer by layer."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ...kernels.gpu.availability import is_first_choice
from ...kernels.gpu.availability import serves as kernels_serve
from ...kernels.kda.operators import MAX_HEAD_DIM
from ..cache.kimi_linear_cache import KimiLinearCache
from ..checkpoint.packed_modules import packed_formats
from ..layers.kda_attention import KimiDeltaAttention, ShortConvolution
from ..layers.mla_attention import KimiMLAAttention
from ..layers.moe import KimiExperts, KimiMLP, KimiSparseMoeBlock, KimiTopkRouter
from ..layers.norms import KimiRMSNorm, KimiRMSNormGated
from .step import MAX_STEP_TOKENS, DecodeStep

# New tokens of each sequence that one step takes at most: what the KDA step holds.
MAX_NEW_TOKENS = 16
# Steps kept, one per (batch, new tokens): buffers of up to some 30 MB each at the released shape.
_KEPT_STEPS = 8
# transformers leaves its hooks on the layers once hidden states, attentions or router logits were asked for.
_RECORDERS = "transformers.utils.output_capturing"
_LEAVES = (
    nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, KimiRMSNorm, KimiRMSNormGated, ShortConvolution,
    KimiDeltaAttention, KimiMLAAttention, KimiMLP, KimiSparseMoeBlock, KimiExperts, KimiTopkRouter,
)  # fmt: skip


class DecodePath:
    """The captured steps of one model, and whether it can use them. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._steps: OrderedDict[tuple[int, int], DecodeStep] = OrderedDict()
        self._fingerprint: tuple[Any, ...] | None = None
        self._reason: str | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodePath":
        return DecodePath()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return DecodePath, ()

    def reason(self, model: Any) -> str | None:
        """Why `model` decodes layer by layer, or None if it decodes by captured steps.

        The answer, like the steps, is kept until parameters or modules move or are replaced; hooks, training mode and
        the backend are looked at anew each time.
        """
        changing = _changing_reason(model)
        if changing is not None:
            return changing
        fingerprint = _fingerprint(model)
        if fingerprint != self._fingerprint:
            self._steps.clear()
            self._fingerprint, self._reason = fingerprint, _lasting_reason(model)
        return self._reason

    def step(self, model: Any, batch: int, tokens: int) -> DecodeStep | None:
        """The step for `tokens` new tokens of `batch` sequences, captured if need be, or None (see `reason`)."""
        if tokens > MAX_NEW_TOKENS or batch * tokens > MAX_STEP_TOKENS or self.reason(model) is not None:
            return None
        with self._lock:
            step = self._steps.get((batch, tokens))
            if step is None:
                step = self._steps[batch, tokens] = DecodeStep(model, batch, tokens)
                if len(self._steps) > _KEPT_STEPS:
                    self._steps.popitem(last=False)
            self._steps.move_to_end((batch, tokens))
            return step


def gpu_has_kernels(model: Any) -> bool:
    """Whether the step's kernels run where `model` is, and are meant to."""
    device = model.lm_head.weight.device
    return device.type == "cuda" and kernels_serve(device) and is_first_choice(device)


def _changing_reason(model: Any) -> str | None:
    """What a user can switch from one call to the next."""
    if not gpu_has_kernels(model):
        return f"the kernels need Triton and an NVIDIA GPU from sm_80 on; the model is on {model.lm_head.weight.device}"
    if len(model.model.layers) != model.config.num_hidden_layers:
        return f"only {model.config.num_hidden_layers} of {len(model.model.layers)} layers are in use (early exit)"
    if model.training:
        return "the model is in training mode; call model.eval()"
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return "the layers are being compiled or captured"
    if model.config.kda_backend not in ("auto", "triton"):
        return f"kda_backend is {model.config.kda_backend!r}"
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if hasattr(module, "_hf_hook") or any(getattr(hook, "__module__", None) != _RECORDERS for hook in hooks):
            return f"{name or 'the model'} has a hook (accelerate's sharding and offloading work by hooks)"
    return None


def _fingerprint(model: Any) -> tuple[Any, ...]:
    tensors = (*model.parameters(), *model.buffers())
    return (*(tensor.data_ptr() for tensor in tensors), *(type(module) for module in model.modules()))


def _lasting_reason(model: Any) -> str | None:
    """What holds while the parameters stay where they are."""
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"parameters are {dtype}"
    config = model.config
    if config.linear_head_dim > MAX_HEAD_DIM:
        return f"KDA heads of {config.linear_head_dim} are wider than {MAX_HEAD_DIM}"
    if config.num_expert_group != config.topk_group:
        return "experts are chosen by group"
    if formats := packed_formats(model):
        return f"packed weights: no kernels for {' and '.join(formats)} yet"
    known = (*_LEAVES, type(model.model.layers[0]))
    for name, module in model.named_modules():
        if name.startswith(("model.layers.", "lm_head")) and type(module) not in known:
            return f"{name} is a {type(module).__name__} (an adapter or quantised storage)"
    for name, x in model.named_parameters():
        plain = type(x) is nn.Parameter and x.is_contiguous() and x.device == device
        if not plain or (x.dtype != dtype and not name.endswith(("A_log", "dt_bias"))):
            return f"{name} is a {type(x).__name__} of {x.dtype} on {x.device}, beside {dtype} on {device}"
    return None


def serves(
    cache: Any, input_ids: torch.Tensor | None, attention_mask: Any, kwargs: dict[str, Any], config: Any
) -> bool:
    """Whether a forward call with these arguments is one that a step can answer: a few tokens over a cache of ours."""
    if not isinstance(cache, KimiLinearCache) or cache.get_seq_length() == 0 or input_ids is None:
        return False
    if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= MAX_NEW_TOKENS or torch.is_grad_enabled():
        return False
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        return False
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            return False
    return kwargs.get("cu_seq_lens_q") is None


def step_mask(attention_mask: torch.Tensor | None, new_tokens: int) -> tuple[bool, torch.Tensor | None]:
    """(whether a step can honour it, the bool mask or None where nothing is padding). Waits for the values."""
    if attention_mask is None:
        return True, None
    mask = attention_mask.bool()
    whole, new = torch.stack([mask.all(), mask[:, -new_tokens:].all()]).tolist()
    return bool(new), None if whole else mask


__all__ = ["MAX_NEW_TOKENS", "DecodePath", "serves", "step_mask"]
