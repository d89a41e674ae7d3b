"""What layers are given, brought to the device of each: over several GPUs a prompt's segments form a pipeline.

PyTorch's copy between two GPUs lets the stream of each wait for that of the other. The GPU of the first layers would
then wait with the next segment until the GPU of the last layers has taken the one before it. Here copies between GPUs
go through streams of their own, and only the target waits. The host never waits, so it launches the first layers of
segment i + 1 while the last layers compute segment i.
"""

from functools import lru_cache
from typing import Any

import torch

from ..placement import device_of_layer


class Carrying:
    """What all layers of one forward are given beside the hidden state, on the device of each.

    Args:
        hidden_states: what the first layer is given.
        options: by name; tensors and what has a `to` method are moved.
    """

    def __init__(self, hidden_states: torch.Tensor, **options: Any) -> None:
        self._here = hidden_states.device
        self._options = {
            name: _moved(x, self._here) if isinstance(x, torch.Tensor) else x for name, x in options.items()
        }
        self._by_device = {self._here: self._options}

    def beside(self, layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """(`hidden_states`, the options), where `layer` is; where accelerate brings its weights, it moves these too.

        Raises:
            ValueError: if the layer is on another device and in another dtype than the hidden state.
        """
        device = device_of_layer(layer)
        if hidden_states.device != device and device.type != "meta":
            _check_dtype(layer, hidden_states)
            hidden_states = carried(hidden_states, device)
        if hidden_states.device != self._here:
            self._here = hidden_states.device
            if self._here not in self._by_device:
                self._by_device[self._here] = {name: _moved(x, self._here) for name, x in self._options.items()}
            self._options = self._by_device[self._here]
        return hidden_states, self._options


def _check_dtype(layer: Any, hidden_states: torch.Tensor) -> None:
    weight = layer.self_attn.o_proj.weight if hasattr(layer.self_attn.o_proj, "weight") else None
    if torch.is_autocast_enabled(hidden_states.device.type) or weight is None or not weight.is_floating_point():
        return
    if weight.dtype.itemsize >= 2 and weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"model.layers.{layer.self_attn.layer_idx} is in {weight.dtype} on {weight.device}, and the layers before "
            f"it are in {hidden_states.dtype} on {hidden_states.device}; give the whole model one dtype"
        )


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, torch.Tensor):
        return x if x.device == device else carried(x, device)
    return x.to(device) if hasattr(x, "to") else x


def carried(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`, whose current stream waits for it; between GPUs nothing else waits, if no gradient is wanted."""
    if not (x.is_cuda and device.type == "cuda") or x.device == device or torch.is_grad_enabled():
        return x.to(device)
    source, target = torch.cuda.current_stream(x.device), torch.cuda.current_stream(device)
    leaving, arriving = _streams_between(x.device, source.cuda_stream, device, target.cuda_stream)
    leaving.wait_stream(source)
    with torch.cuda.stream(leaving), torch.cuda.stream(arriving):
        there = x.to(device, non_blocking=True)
    x.record_stream(leaving)
    target.wait_stream(arriving)
    there.record_stream(target)
    return there


@lru_cache(maxsize=64)
def _streams_between(
    source: torch.device, source_stream: int, target: torch.device, target_stream: int
) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of copies for a caller's streams: two callers in different streams don't meet in them."""
    return torch.cuda.Stream(source), torch.cuda.Stream(target)


__all__ = ["Carrying", "carried"]
