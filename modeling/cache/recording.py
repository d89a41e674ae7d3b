"""What a KDA layer records so that the tokens it has swallowed can be taken back, bit for bit.

A recurrent state cannot be run backwards. While recording, a layer keeps copies of its state and windows from a few
positions (checkpoints) and the raw inputs of every token since the oldest of them; rolling back copies the last
checkpoint before the cut and steps through the kept tokens again, by the very code that took them first.

Layout, per layer: `inputs` [B, capacity, 3 H K + H K + H] in the model's dtype, allocated once; row t of it is token t
since the oldest checkpoint, as (q | k | v) before the convolutions, gate logits after f_b_proj, beta logits after
b_proj. `valid` [B, capacity] is False where a row's token is padding or was taken back. Everything that counts is a
Python integer, so a captured graph can write `inputs[:, length]` and count with `advance`.

Bytes a sequence and layer at the released shape in bf16: 3 checkpoints of 2 MiB + 72 KiB, and 32,832 a token of
the capacity: 4.0 MiB at the default of 128. For 20 layers together 204 MiB, whatever the length of the context.

Time: a token writes those 32,832 bytes. A checkpoint, 4.1 MiB read and written, is taken once in 16 tokens, or at
the first call after a crop. Of the 6.2 GB of weights that a step reads that is 0.1%, and 1.4% in steps after a crop;
on an H200 a token of `generate()` takes 0.8 to 1.5% longer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.kda.dispatch import step_kda
from ...kernels.kda.step import MAX_NEW_TOKENS
from ..layers.sequence_layout import PaddingLayout

# Tokens that fit into a recording.
RECORDED_TOKENS = 128
# Drafts of more tokens than fit make the recording grow; a call beyond this is taken for a prompt.
LONGEST_DRAFT = 256

RawInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v, f, beta


@dataclass(frozen=True, eq=False)
class KDAStepWeights:
    """The weights of a KDA layer between its projections and o_proj, and the config's `kda_backend`.

    Copies of a cache share them.
    """

    conv_weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_eps: float
    backend: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "KDAStepWeights":
        return self

    def step(
        self,
        inputs: RawInputs,
        gate: torch.Tensor | None,
        window: torch.Tensor,
        state: torch.Tensor,
        lengths: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """`step_kda` with these weights: (y, window, state); window and state may be changed in place."""
        return step_kda(
            *inputs,
            gate,
            conv_weights=self.conv_weights,
            window=window,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.norm_weight,
            norm_eps=self.norm_eps,
            state=state,
            lengths=lengths,
            backend=self.backend,
        )


@dataclass
class _Checkpoint:
    """Window and state before recorded token `offset`."""

    offset: int
    window: torch.Tensor
    state: torch.Tensor


class KDARecording:
    """The recorded past of one KDA layer (module docstring: layout, bytes, time).

    Attributes:
        capacity: tokens that fit.
        length: tokens recorded since the oldest checkpoint, padding included: how many can be taken back.
        inputs: [B, capacity, 3 H K + H K + H], or None before the first recorded call.
        valid: [B, capacity] bool, True after `length`; or None before the first recorded call.
        has_holes: whether some recorded token may not be valid.
    """

    def __init__(self, capacity: int = RECORDED_TOKENS) -> None:
        self.capacity = capacity
        self.length = 0
        self.inputs: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.has_holes = False
        self._checkpoints: list[_Checkpoint] = []
        self._was_cropped = False
        self._is_moving = False  # while rows are moved: an interruption there leaves nothing to replay

    def restart(self) -> None:
        """Forget what was recorded; the next call records from the state that it finds."""
        if self.has_holes:
            self.valid.fill_(True)
        self.length, self.has_holes, self._checkpoints, self._is_moving = 0, False, [], False

    def can_replay(self, keep: int) -> bool:
        """Whether `replay` of the first `keep` recorded tokens is possible."""
        return not self._is_moving and any(checkpoint.offset <= keep for checkpoint in self._checkpoints)

    # What is recorded in inference mode is written outside of it too, which PyTorch forbids for tensors made there.
    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, window: torch.Tensor, state: torch.Tensor, new_tokens: int) -> None:
        """Make room for `new_tokens` more, and take a checkpoint if one is due.

        Args:
            window: [B, 3 H K, W - 1] before them.
            state: [B, H, K, V] before them.
            new_tokens: how many the next call brings.
        """
        if new_tokens > self.capacity:
            self._grow(2 * new_tokens)
        is_full = self.length + new_tokens > self.capacity
        if not self._checkpoints:
            self._take_checkpoint(window, state)
        since = self.length - self._checkpoints[-1].offset
        if since > 0 and (is_full or self._was_cropped or since >= MAX_NEW_TOKENS):
            self._take_checkpoint(window, state)
        self._was_cropped = False
        while self.length + new_tokens > self.capacity:
            self._drop_oldest()

    @torch.inference_mode(False)
    def allocate(self, like: torch.Tensor, batch_size: int, width: int) -> None:
        """Make `inputs` [batch_size, R, width] and `valid`, with device and dtype of `like`, unless they are there."""
        if self.inputs is None:
            inputs = torch.zeros(batch_size, self.capacity, width, dtype=like.dtype, device=like.device)
            self.valid = torch.ones(batch_size, self.capacity, dtype=torch.bool, device=like.device)
            self.inputs = inputs

    def append(self, inputs: RawInputs, valid: torch.Tensor | None) -> None:
        """Record the tokens of a call, [B, T, .] each; `valid` [B, T] where some are padding."""
        batch_size, new_tokens = inputs[0].shape[:2]
        self.allocate(inputs[0], batch_size, sum(part.shape[-1] for part in inputs))
        end = self.length + new_tokens
        with torch.no_grad():
            torch.cat(inputs, dim=-1, out=self.inputs[:, self.length : end])
        if valid is not None:
            self.valid[:, self.length : end], self.has_holes = valid, True
        self.length = end

    def replay(
        self, weights: KDAStepWeights, keep: int, row_keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(window, state) as they were after the first `keep` recorded tokens, in new tensors.

        Args:
            weights: of the layer that recorded them.
            keep: recorded tokens to step through.
            row_keep: [B] on the CPU, the same per row, none above `keep`; None where all rows keep `keep`.
        """
        lowest = keep if row_keep is None else int(row_keep.min())
        start = [checkpoint for checkpoint in self._checkpoints if checkpoint.offset <= lowest][-1]
        window, state = start.window.clone(), start.state.clone()
        if keep == start.offset:
            return window, state
        inputs, lengths = self.inputs[:, start.offset : keep], None
        if self.has_holes or row_keep is not None:
            valid = self.valid[:, start.offset : keep]
            if row_keep is not None:
                valid = valid & _before(row_keep - start.offset, keep - start.offset, valid.device)
            layout = PaddingLayout.from_mask(valid)
            inputs, lengths = layout.compact(inputs), layout.lengths
        heads, key_dim, value_dim = state.shape[1:]
        sizes = [heads * key_dim, heads * key_dim, heads * value_dim, heads * key_dim, heads]
        _, window, state = weights.step(inputs.split(sizes, dim=-1), None, window, state, lengths)
        return window, state

    def truncate(self, keep: int, row_keep: torch.Tensor | None = None) -> None:
        """Forget recorded tokens after the first `keep`, and for each row those after its `row_keep`."""
        lowest = keep
        if row_keep is not None:
            lowest, self.has_holes = int(row_keep.min()), True
            self.valid[:, :keep] &= _before(row_keep, keep, self.valid.device)
        if self.has_holes:
            self.valid[:, keep:] = True
        self._checkpoints = [checkpoint for checkpoint in self._checkpoints if checkpoint.offset <= lowest]
        self.length, self._was_cropped = keep, True

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by function(tensor): rows of the batch, or the device."""
        if self.inputs is not None:
            self.inputs, self.valid = _plain(function(self.inputs)), _plain(function(self.valid))
        for checkpoint in self._checkpoints:
            checkpoint.window = _plain(function(checkpoint.window))
            checkpoint.state = _plain(function(checkpoint.state))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        tensors = [checkpoint.window for checkpoint in self._checkpoints]
        tensors += [checkpoint.state for checkpoint in self._checkpoints]
        tensors += [] if self.inputs is None else [self.inputs, self.valid]
        return sum(tensor.nbytes for tensor in tensors)

    def _take_checkpoint(self, window: torch.Tensor, state: torch.Tensor) -> None:
        # Three are enough: the oldest; one from half of the capacity after it on, which becomes the oldest when the
        # recording is full; and the newest, which keeps replays short and moves on until it is far enough after the
        # others to stay.
        offsets = [checkpoint.offset for checkpoint in self._checkpoints]
        if len(offsets) < 2 or offsets[-1] - offsets[-2] >= self.capacity // 2:
            self._checkpoints.append(_Checkpoint(self.length, _copied(window), _copied(state)))
            return
        newest = self._checkpoints.pop()  # while it is overwritten there is none
        newest.window.copy_(window)
        newest.state.copy_(state)
        newest.offset = self.length
        self._checkpoints.append(newest)

    def _grow(self, capacity: int) -> None:
        if self.inputs is not None:
            inputs = self.inputs.new_zeros(self.inputs.shape[0], capacity, self.inputs.shape[2])
            valid = self.valid.new_ones(inputs.shape[0], capacity)
            inputs[:, : self.capacity], valid[:, : self.capacity] = self.inputs, self.valid
            self.inputs, self.valid = inputs, valid
        self.capacity = capacity

    def _drop_oldest(self) -> None:
        shift = self._checkpoints[1].offset
        self._is_moving = True
        for tensor in (self.inputs, self.valid):
            tensor[:, : self.length - shift] = tensor[:, shift : self.length].clone()
        self._checkpoints.pop(0)
        if self.has_holes:
            self.valid[:, self.length - shift :] = True
        for checkpoint in self._checkpoints:
            checkpoint.offset -= shift
        self.length -= shift
        self._is_moving = False


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that can be written in and outside of inference mode, where this is called outside of it."""
    return torch.empty_like(tensor, requires_grad=False).copy_(tensor)


@torch.inference_mode(False)
@torch.no_grad()
def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it if it was made in inference mode."""
    return _copied(tensor) if tensor.is_inference() else tensor


def _before(row_ends: torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
    """[B, length] bool, True before each row's end."""
    return torch.arange(length, device=device) < row_ends.to(device)[:, None]


__all__ = ["RECORDED_TOKENS", "KDARecording", "KDAStepWeights", "RawInputs"]
