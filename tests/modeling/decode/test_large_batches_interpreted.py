"""Steps of many rows against the layers, in Triton's interpreter.

Products go to the library from 65 tokens on, and batches are cut by rows from 513 on; here both limits are lower.
Logits in fp32 agree to 1e-5 of their norm, as in test_decode_step_interpreted.py.
"""

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import close, few_programs, layer_by_layer, make_model, same_cache, stepping

from kimi_linear.kernels.decode import latent as decode_latent
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.decode import plan as decode_plan
from kimi_linear.modeling.decode.row_parts import row_bounds
from kimi_linear.modeling.decode.step import DecodeStep

__all__ = ["few_programs", "stepping"]  # fixtures
ROWS = 5


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def low_limits(monkeypatch):
    """From three tokens on the library multiplies; a step takes two rows (or four tokens) at most."""
    monkeypatch.setattr(decode_plan, "SKINNY_TOKENS", 2)
    monkeypatch.setattr(decode_latent, "SKINNY_TOKENS", 2)


def prompts(rows):
    ids = torch.randint(0, 120, (rows, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 3] = 0
    return ids, mask


def filled(model, ids, mask, recording=False):
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model.model(ids, attention_mask=mask, past_key_values=cache)
    if recording:
        cache.activate_past_recording()
    return cache


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2])
def test_the_library_multiplies_many_tokens(model, low_limits, tokens):
    ids, mask = prompts(ROWS)
    caches = [filled(model, ids, mask) for _ in range(2)]
    new = torch.randint(0, 120, (ROWS, tokens))
    mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
    exact = model.lm_head(model.model(new, attention_mask=mask, past_key_values=caches[0]).last_hidden_state)
    step = DecodeStep(model, ROWS, tokens)
    for buffer in step.plan.buffers():  # nothing depends on what a buffer held
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    assert close(step(caches[1], new, mask.bool()), exact)
    assert same_cache(caches[1], caches[0])


@pytest.mark.parametrize(("batch", "most", "bounds"), [
    (513, 512, [(0, 256), (256, 513)]), (4, 2, [(0, 2), (2, 4)]), (5, 2, [(0, 1), (1, 3), (3, 5)]), (1, 7, [(0, 1)]),
])  # fmt: skip
def test_row_bounds(batch, most, bounds):
    assert row_bounds(batch, most) == bounds
    assert all(end - begin <= most for begin, end in bounds)


@pytest.mark.parametrize("recording", [False, True])
def test_batches_are_cut_by_rows(model, stepping, monkeypatch, recording):
    monkeypatch.setattr(decode_path, "MAX_STEP_TOKENS", 2)
    ids, mask = prompts(ROWS)
    caches = [filled(model, ids, mask, recording) for _ in range(2)]
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    new = torch.randint(0, 120, (ROWS, 1))

    def forward(cache):
        with torch.no_grad():
            return model(new, attention_mask=mask, past_key_values=cache).logits

    exact = layer_by_layer(model, lambda: forward(caches[0]))
    assert close(forward(caches[1]), exact) and same_cache(caches[1], caches[0])
    assert sorted(stepping) == [(1, 1), (2, 1), (2, 1)]
    if recording:
        caches[1].crop(-1)
        assert same_cache(caches[1], filled(model, ids, mask[:, :-1]))


def test_greedy_text_of_a_batch_that_is_cut(model, stepping, monkeypatch):
    monkeypatch.setattr(decode_path, "MAX_STEP_TOKENS", 2)
    ids, mask = prompts(3)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 127}
    for eos in (None, 126):
        expected = layer_by_layer(model, lambda: model.generate(ids, eos_token_id=eos, **options))  # noqa: B023
        assert torch.equal(model.generate(ids, eos_token_id=eos, **options), expected)
    assert len(stepping) >= 12


def test_a_part_that_fails_leaves_a_cache_that_refuses(model, stepping, monkeypatch):
    monkeypatch.setattr(decode_path, "MAX_STEP_TOKENS", 2)
    ids, mask = prompts(3)
    new, longer = torch.ones(3, 1, dtype=torch.int64), torch.nn.functional.pad(mask, (0, 1), value=1)
    for recording in (False, True):
        cache = filled(model, ids, mask, recording)
        with monkeypatch.context() as patch, torch.no_grad(), pytest.raises(KeyboardInterrupt):
            launch, calls = decode_plan.StepPlan.launch, []

            def second_fails(plan):
                calls.append(plan)  # noqa: B023
                if len(calls) == 2:  # noqa: B023
                    raise KeyboardInterrupt
                launch(plan)  # noqa: B023

            patch.setattr(decode_plan.StepPlan, "launch", second_fails)
            model(new, attention_mask=longer, past_key_values=cache)
        if recording:
            assert same_cache(cache, filled(model, ids, mask))
        else:
            with torch.no_grad(), pytest.raises(ValueError, match="not whole"):
                model(new, attention_mask=longer, past_key_values=cache)
