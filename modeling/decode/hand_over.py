"""What one part of a decode step leaves, brought to the device of another part without a wait of the host."""

import torch


class HandOver:
    """Copies of `source` into `target`, in the current streams of their devices.

    Between GPUs that can't reach each other's memory the copy goes through pinned memory of the host.

    Args:
        source: a dense tensor.
        target: of the same shape and dtype, dense, mostly on another device.
    """

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._source, self._target = source, target
        self._on_host: torch.Tensor | None = None
        if source.is_cuda and target.is_cuda and not _reaches(source.device, target.device):
            self._on_host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._is_written, self._is_read = torch.cuda.Event(), torch.cuda.Event()

    def __call__(self) -> None:
        """What the source's stream was given before is waited for, and so is the copy in the target's stream."""
        if self._on_host is None:
            self._target.copy_(self._source, non_blocking=True)
            return
        streams = [torch.cuda.current_stream(x.device) for x in (self._source, self._target)]
        with torch.cuda.stream(streams[0]):
            streams[0].wait_event(self._is_read)  # by the copy before this one
            self._on_host.copy_(self._source, non_blocking=True)
            self._is_written.record(streams[0])
        with torch.cuda.stream(streams[1]):
            streams[1].wait_event(self._is_written)
            self._target.copy_(self._on_host, non_blocking=True)
            self._is_read.record(streams[1])


def _reaches(source: torch.device, target: torch.device) -> bool:
    """Whether one GPU writes into the memory of the other."""
    return source == target or torch.cuda.can_device_access_peer(source, target)


__all__ = ["HandOver"]
