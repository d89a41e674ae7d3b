"""What a decode step reads and writes by address is checked here, where the cache and the mask enter."""

from functools import partial

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from ..placement import LayerSpan


class StepInputs:
    """The dtypes, shapes, strides and devices that a step of `batch` sequences was captured for.

    Args:
        config: of the model.
        batch: sequences of the step.
        dtype: of the model's parameters.
        spans: of the model: the cache's layers belong where the model's are, the mask to the first device.
    """

    def __init__(self, config: KimiLinearConfig, batch: int, dtype: torch.dtype, spans: list[LayerSpan]) -> None:
        heads, width = config.linear_num_heads, config.linear_head_dim
        self.batch, self.dtype, self.device = batch, dtype, spans[0].device
        self._devices = [span.device for span in spans for _ in range(span.first, span.end)]
        self._state = (batch, heads, width, width)
        self._window = (batch, 3 * heads * width, config.linear_conv_kernel_dim - 1)
        self._row = config.kv_lora_rank + config.qk_rope_head_dim
        self._recorded = heads * (4 * width + 1)

    def check(self, cache: KimiLinearCache, mask: torch.Tensor | None, length: int) -> None:
        """Raise ValueError for a cache that `misfit` names or a mask that `check_mask` refuses."""
        misfit = self.misfit(cache)
        if misfit is not None:
            raise ValueError(misfit)
        self.check_mask(mask, length)

    def misfit(self, cache: KimiLinearCache) -> str | None:
        """What about `cache` a step can't read or write in place, in words; or None."""
        length = cache.get_seq_length()
        for index, (layer, device) in enumerate(zip(cache.layers, self._devices)):
            held = partial(_misfit_of_tensor, device=device)
            if isinstance(layer, KDACacheLayer):
                what = held("a state", layer.state, self._state, torch.float32)
                what = what or held("windows", layer.window, self._window, self.dtype)
                if layer.recording is not None and layer.recording.inputs is not None:
                    shape = (self.batch, layer.recording.capacity, self._recorded)
                    what = what or held("a recording", layer.recording.inputs, shape, self.dtype)
            else:
                rows = layer.storage
                capacity = 0 if rows is None else rows.shape[1]
                what = held("latents", rows, (self.batch, max(capacity, length), self._row), self.dtype)
            if what is not None:
                return f"layer {index} of past_key_values holds {what}"
        return None

    def check_mask(self, mask: torch.Tensor | None, length: int) -> None:
        """Raise ValueError unless `mask` is None or a bool [batch, at least `length`] that a step can read."""
        if mask is None:
            return
        fits = mask.dtype == torch.bool and mask.device == self.device and mask.ndim == 2
        if not fits or mask.shape[0] != self.batch or mask.shape[1] < length or mask.stride(1) != 1:
            raise ValueError(
                f"the mask of a step must be bool [{self.batch}, at least {length}] on {self.device}, dense in its "
                f"last dimension, got {list(mask.shape)} of {mask.dtype} on {mask.device} with strides {mask.stride()}"
            )


def _misfit_of_tensor(
    what: str, x: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> str | None:
    if x is None:
        return f"no {what.removeprefix('a ')}"
    if x.dtype != dtype or x.device != device or x.shape != shape:
        return (
            f"{what} {list(x.shape)} of {x.dtype} on {x.device}, and the model's are {list(shape)} of {dtype} on "
            f"{device}: continue where the cache was made (with autocast, on that device), or start a new one"
        )
    if not x.is_contiguous():
        return f"{what} with strides {x.stride()}; call .contiguous() on what was put there"
    return f"{what} that autograd follows; make the cache under torch.no_grad()" if x.requires_grad else None


__all__ = ["StepInputs"]
