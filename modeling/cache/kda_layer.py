"""The cache of one KDA layer: state, convolution windows, and while recording the past they can be rolled back to."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from .recording import LONGEST_DRAFT, RECORDED_TOKENS, KDARecording, KDAStepWeights, RawInputs

# transformers once gave `crop` the length to keep, where 0 keeps nothing; now it gives minus the tokens to remove.
_ZERO_KEEPS_NOTHING = "tokens_to_remove" not in inspect.signature(Cache.crop).parameters


def tokens_to_crop(argument: int, length: int) -> int:
    """Tokens that `crop(argument)` drops of `length`: negative counts them, positive is the length to keep.

    0 means what it means in the installed transformers: keep nothing (5.10), or remove nothing.
    """
    if argument == 0:
        return length if _ZERO_KEEPS_NOTHING else 0
    return min(-argument, length) if argument < 0 else max(length - argument, 0)


def _stored(held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """`new`, in the memory of `held` where that is possible, so that addresses stay (captured graphs know them)."""
    if held is None or held is new or held.requires_grad or new.requires_grad:
        return new  # autograd may still need the old values
    if torch.compiler.is_compiling() or (held.is_inference() and not torch.is_inference_mode_enabled()):
        return new
    if held.shape != new.shape or held.dtype != new.dtype or held.device != new.device:
        return new
    held.copy_(new)
    return held


def _writable(held: torch.Tensor) -> torch.Tensor:
    """`held`, or a copy where updating it in place would disturb autograd or inference mode."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return held
    if held.requires_grad or (held.is_inference() and not torch.is_inference_mode_enabled()):
        return held.detach().clone()
    return held


class KDACacheLayer(LinearAttentionCacheLayerMixin):
    """State of one KDA layer after the tokens seen so far; its size does not depend on how many there were.

    State and window keep their addresses from the first token on, through decoding, crop and restore, until `reset`,
    a change of the batch size, or a pass that autograd follows.

    Attributes:
        state: [B, H, K, V] fp32, or None before the first token.
        window: [B, 3 * H * K, W - 1], the last inputs of the q, k and v convolutions, oldest first, or None.
        seen_tokens: positions appended, padding included; equals the MLA layers' length.
        recording: what `crop` needs, or None while nothing is recorded.
        weights: of the layer that filled this one, or None.
        is_changing: whether state and window may lie between those of two lengths: set while they are changed.
    """

    is_compileable = False
    number_of_states = 1

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None
        self.window: torch.Tensor | None = None
        self.seen_tokens = 0
        self.recording: KDARecording | None = None
        self.weights: KDAStepWeights | None = None
        self.is_changing = False
        self.device: torch.device | None = None

    # transformers addresses the tensors of a linear-attention layer by these names, with a state index of 0.
    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        """`{0: window}`."""
        return {0: self.window}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        """`{0: state}`."""
        return {0: self.state}

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """`{0: whether any token was seen}`."""
        return {0: self.state is not None}

    @property
    def is_conv_states_initialized(self) -> dict[int, bool]:
        """`{0: whether the window is allocated}`."""
        return {0: self.window is not None}

    @property
    def is_recurrent_states_initialized(self) -> dict[int, bool]:
        """`{0: whether the state is allocated}`."""
        return {0: self.state is not None}

    @property
    def record_past(self) -> bool:
        """Whether the layer records what `crop` needs (transformers' name)."""
        return self.recording is not None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back (transformers' name): if they are recorded, or there are none."""
        return self.record_past or self.seen_tokens == 0

    def lazy_initialization(
        self, conv_states: torch.Tensor | None = None, recurrent_states: torch.Tensor | None = None, **_: Any
    ) -> None:
        """Take over the values of a window and a state (transformers' name for it)."""
        if conv_states is not None:
            self.window = _stored(self.window, conv_states)
        if recurrent_states is not None:
            self.state = _stored(self.state, recurrent_states)
        held = self.state if self.state is not None else self.window
        self.device = held.device if held is not None else None

    def update_conv_state(self, conv_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Replace the convolution windows, [B, 3 * H * K, W - 1]."""
        self.lazy_initialization(conv_states=conv_states)
        return self.window

    def update_recurrent_state(self, recurrent_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Replace the state, [B, H, K, V]."""
        self.lazy_initialization(recurrent_states=recurrent_states)
        return self.state

    def store(self, window: torch.Tensor, state: torch.Tensor, new_tokens: int) -> None:
        """Take over what `new_tokens` more positions leave behind; recorded positions before them are forgotten."""
        self.is_changing = True
        if self.recording is not None:
            self.recording.restart()
        self.lazy_initialization(conv_states=window, recurrent_states=state)
        self.seen_tokens += new_tokens
        self.is_changing = False

    def begin_step(
        self, new_tokens: int, batch_size: int, window_shape: tuple, state_shape: tuple, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(window, state) to step `new_tokens` positions from, which a kernel may update in place.

        Args:
            new_tokens: T of the step; while recording, room for them is made.
            batch_size: B.
            window_shape: (3 H K, W - 1).
            state_shape: (H, K, V).
            like: where the layer is empty, gives device and dtype of the zeros it begins with (states are fp32, or
                float64 beside float64).
        """
        if self.state is None:
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            window = like.new_zeros(batch_size, *window_shape)
            state = like.new_zeros(batch_size, *state_shape, dtype=dtype)
        else:
            window, state = _writable(self.window), _writable(self.state)
        if self.recording is not None:
            self.recording.prepare(window, state, new_tokens)
        self.is_changing = True
        return window, state

    def store_step(
        self, inputs: RawInputs, valid: torch.Tensor | None, window: torch.Tensor, state: torch.Tensor
    ) -> None:
        """Take over what stepping through `inputs` [B, T, .], behind `begin_step`, left; record them if asked to.

        `valid` is [B, T], or None if none of them is padding.
        """
        self.lazy_initialization(conv_states=window, recurrent_states=state)
        if self.recording is not None:
            self.recording.append(inputs, valid)
        self.seen_tokens += inputs[0].shape[1]
        self.is_changing = False

    def recorded_of(self, new_tokens: int) -> int:
        """How many of the `new_tokens` positions of a call get recorded, the last ones: all, unless it is a prompt.

        A prompt is a call on an empty layer, or a longer one than any draft; half a recording of it is kept.
        """
        is_prompt = self.seen_tokens == 0 or new_tokens > LONGEST_DRAFT
        return min(new_tokens, self.recording.capacity // 2) if is_prompt else new_tokens

    def prepare_recording(self, new_tokens: int) -> None:
        """Before a captured graph steps through `new_tokens` positions: room for them in the recording, if any.

        `recording.inputs` moves only if they are more than `recording.capacity`.
        """
        if self.recording is not None:
            self.recording.prepare(self.window, self.state, new_tokens)

    def advance(self, new_tokens: int, recorded: bool = False) -> None:
        """Count positions, none of them padding, that a captured graph has taken into `state` and `window` in place.

        Args:
            new_tokens: how many.
            recorded: whether it also wrote `recording.inputs` from row `recording.length` on, behind
                `prepare_recording(new_tokens)`. If not, positions up to here can't be taken back any more.
        """
        if self.recording is not None and not recorded:
            self.recording.restart()
        # From here on nothing is called, so that no signal handler can come in between.
        if self.recording is not None and recorded:
            self.recording.length += new_tokens
        self.seen_tokens += new_tokens
        self.is_changing = False

    def get_seq_length(self) -> int:
        """Positions appended so far."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) of a mask over all positions."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def activate_past_recording(self, max_tokens: int = RECORDED_TOKENS) -> None:
        """Record from now on what `crop` needs, for up to `max_tokens` positions at a time.

        A layer that records already goes on, unless `max_tokens` is more than it has room for: then it starts anew.
        """
        if self.recording is None or self.recording.capacity < max_tokens:
            self.recording = KDARecording(max_tokens)

    def deactivate_past_recording(self) -> None:
        """Stop recording and free its memory."""
        self.recording = None

    def check_crop(self, tokens: int) -> None:
        """Raise ValueError unless the last `tokens` positions can be taken back."""
        if tokens > 0 and self.recording is None:
            raise ValueError(
                f"crop: {tokens} tokens can't be taken back, since a KDA layer's state has swallowed them and nothing "
                "was recorded; call cache.activate_past_recording() before the tokens that may be taken back, or "
                "cache.snapshot() and cache.restore(...)"
            )
        if tokens > 0 and tokens > self.recording.length:
            raise ValueError(
                f"crop: {tokens} tokens can't be taken back, only the last {self.recording.length} were recorded; "
                "activate_past_recording(max_tokens=...) says how many may be, and the past before it was called can't"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Put state and window back as they were before the last `-tokens_to_remove` positions, bit for bit.

        A positive number is the length to keep, as in older transformers.

        Raises:
            ValueError: if not so many positions were recorded; nothing is changed then.
        """
        tokens = tokens_to_crop(tokens_to_remove, self.seen_tokens)
        self.check_crop(tokens)
        self.roll_back(tokens)

    @torch.no_grad()
    def roll_back(self, tokens: int, row_tokens: torch.Tensor | None = None) -> None:
        """Take back the last `tokens` positions, and of each row its last `row_tokens` [B] >= `tokens` (on the CPU)."""
        if self.recording is None or self.state is None:
            return
        keep = self.recording.length - tokens
        row_keep = None if row_tokens is None else self.recording.length - row_tokens
        if tokens or row_keep is not None:
            window, state = self.recording.replay(self.weights, keep, row_keep)
            self._overwrite(window, state)
        self.recording.truncate(keep, row_keep)
        self.seen_tokens -= tokens

    def undo(self, seen_tokens: int) -> bool:
        """After a call that failed: go back to `seen_tokens` positions, those before the call. False if that can't be.

        It can be if nothing was changed, or if the positions before the call are recorded.
        """
        taken = self.seen_tokens - seen_tokens
        if taken == 0 and not self.is_changing:
            return True
        recording = self.recording
        if recording is None or self.state is None or not recording.can_replay(recording.length - taken):
            return False
        self.is_changing = True
        self.roll_back(taken)
        if taken == 0:  # the failed call stepped on from here, in place
            self._overwrite(*recording.replay(self.weights, recording.length))
        self.is_changing = False
        return True

    def restore(
        self,
        window: torch.Tensor | None,
        state: torch.Tensor | None,
        seen_tokens: int,
        weights: KDAStepWeights | None,
    ) -> None:
        """Continue from copies of a window and a state, and by these weights; recorded positions are forgotten."""
        if state is None:
            self.reset()
            return
        self._overwrite(window.clone(), state.clone())
        self.seen_tokens, self.is_changing = seen_tokens, False
        self.weights = weights or self.weights
        if self.recording is not None:
            self.recording.restart()

    def _overwrite(self, window: torch.Tensor, state: torch.Tensor) -> None:
        if self.state is not None and self.state.shape != state.shape and self.recording is not None:
            self.recording = KDARecording(self.recording.capacity)  # of another batch size
        self.lazy_initialization(conv_states=window, recurrent_states=state)

    def apply_to_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by function(tensor), which picks rows of the batch or moves to a device."""
        if self.state is not None:
            self.window, self.state = function(self.window), function(self.state)
        if self.recording is not None:
            self.recording.apply(function)

    def reset(self) -> None:
        """Forget every token."""
        self.state = self.window = None
        self.seen_tokens, self.is_changing = 0, False
        if self.recording is not None:
            self.recording = KDARecording(self.recording.capacity)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep rows `beam_idx` of the batch, in that order."""
        self.apply_to_tensors(lambda x: _stored(x, x.index_select(0, beam_idx.to(x.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.apply_to_tensors(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        self.apply_to_tensors(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move the tensors to the CPU; `prefetch` brings them back."""
        self.apply_to_tensors(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to the layer's device."""
        if self.state is not None and self.state.device != self.device:
            self.apply_to_tensors(lambda tensor: tensor.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Bytes of state and window."""
        return 0 if self.state is None else self.state.nbytes + self.window.nbytes

    @property
    def recording_nbytes(self) -> int:
        """Bytes that recording takes."""
        return 0 if self.recording is None else self.recording.nbytes


__all__ = ["KDACacheLayer", "tokens_to_crop"]
