"""
A step's buffers and the cache's, filled with NaN and between guard bands: in Triton's interpreter.

The bits must be those of the same step without all that, which
test_decode_step_interpreted.py compares with the layers.
"""

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import MASK, PROMPT, few_programs, make_model

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode.step import DecodeStep

__all__ = ["few_programs"]  # a fixture
BAND = 128


class Guarded:
    """Copies of tensors, each with bands of a value around it that nothing may touch."""

    def __init__(self):
        self._held = []

    def copy(self, x, keep=True):
        """`x` between guard bands; without `keep` of its values, NaN in a float tensor."""
        band = float("nan") if x.is_floating_point() else False if x.dtype == torch.bool else -77
        memory = torch.full((x.numel() + 2 * BAND,), band, dtype=x.dtype)
        view = memory[BAND : BAND + x.numel()].view(x.shape)
        if keep or not x.is_floating_point():
            view.copy_(x)
        self._held.append((memory, band))
        return view

    def are_intact(self):
        bands = [(part, band) for memory, band in self._held for part in (memory[:BAND], memory[-BAND:])]
        return all(bool((part.isnan() if band != band else part == band).all()) for part, band in bands)


def guard_step(plan, guarded):
    for name, x in list(vars(plan).items()):
        if isinstance(x, torch.Tensor):
            setattr(plan, name, guarded.copy(x, keep=False))
    plan.groups = tuple(guarded.copy(x.fill_(-7)) for x in plan.groups)
    plan.chosen.fill_(-7)


def guard_cache(cache, guarded):
    for layer in cache.layers:
        if hasattr(layer, "state"):
            layer.state, layer.window = guarded.copy(layer.state), guarded.copy(layer.window)
            if layer.recording is not None and layer.recording.inputs is not None:
                layer.recording.inputs = guarded.copy(layer.recording.inputs)
        else:
            layer.storage[:, layer.get_seq_length() :] = float("nan")
            layer.storage = guarded.copy(layer.storage)


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "tokens", "shared", "dtype", "recording"),
    [
        (1, 1, 1, torch.float32, False),
        (1, 1, 0, torch.bfloat16, True),
        (2, 2, 1, torch.float32, True),
        (2, 3, 1, torch.bfloat16, False),
        (1, 5, 0, torch.float32, True),
    ],
)
def test_nothing_is_read_before_it_is_written_nor_written_outside(batch, tokens, shared, dtype, recording):
    model = make_model(num_shared_experts=shared)
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
    prompt, mask, guarded = PROMPT[-batch:], MASK[-batch:], Guarded()
    cache, wanted = KimiLinearCache(model.config), KimiLinearCache(model.config)
    for held in (cache, wanted):
        if recording:
            held.activate_past_recording()
        model.model(prompt, attention_mask=mask, past_key_values=held)
    step, plain = DecodeStep(model, batch, tokens), DecodeStep(model, batch, tokens)
    guard_step(step.plan, guarded)
    guard_cache(cache, guarded)
    for i in range(2):
        new = (torch.arange(batch * tokens).view(batch, tokens) * 7 + 5 * i) % 120
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        given = mask.bool() if batch > 1 else None
        expected = plain(wanted, new, given)
        logits = step(cache, new, None if given is None else guarded.copy(given))
        assert torch.equal(logits, expected) and guarded.are_intact()
    length = cache.get_seq_length()
    assert length == wanted.get_seq_length() == prompt.shape[1] + 2 * tokens
    for layer in cache.layers:
        if hasattr(layer, "storage"):
            assert layer.rows.isfinite().all() and layer.storage[:, length:].isnan().all()


def test_a_band_that_is_written_is_noticed():
    guarded = Guarded()
    for x in (torch.zeros(3), torch.zeros(3, dtype=torch.int64)):
        view = guarded.copy(x)
        assert guarded.are_intact()
        view.as_strided((4,), (1,), view.storage_offset())[3] = 1
        assert not guarded.are_intact()
        guarded = Guarded()
