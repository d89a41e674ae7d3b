"""What a KDA layer records, on given inputs: room, replays and bytes are what is stated, and states and windows have
the same bits however calls were split and whatever was taken back in between, by random programs.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.cache.kda_layer import KDACacheLayer
from kimi_linear.modeling.cache.recording import KDARecording, KDAStepWeights
from kimi_linear.modeling.layers.sequence_layout import PaddingLayout

HEADS, DIM, TAPS, ROWS = 2, 8, 4, 3
WIDTH = HEADS * DIM


def step_weights(seed: int = 0) -> KDAStepWeights:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    convs = tuple(randn(WIDTH, 1, TAPS) for _ in range(3))
    return KDAStepWeights(convs, randn(HEADS), randn(WIDTH), 1 + randn(DIM) / 10, 1e-5, "torch")


def step_inputs(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (WIDTH, WIDTH, WIDTH, WIDTH, HEADS)
    return tuple(torch.randn(ROWS, tokens, size, generator=generator).to(dtype) for size in sizes)


def feed(layer: KDACacheLayer, inputs: tuple[torch.Tensor, ...], valid: torch.Tensor | None = None) -> None:
    """What KimiDeltaAttention does with the projections of a call."""
    batch_size, tokens = inputs[0].shape[:2]
    window, state = layer.begin_step(tokens, batch_size, (3 * WIDTH, TAPS - 1), (HEADS, DIM, DIM), like=inputs[0])
    taken, lengths = inputs, None
    if valid is not None:
        padding = PaddingLayout.from_mask(valid)
        taken, lengths = tuple(map(padding.compact, inputs)), padding.lengths
    _, window, state = layer.weights.step(taken, None, window, state, lengths)
    layer.store_step(inputs, valid, window, state)


def recording_layer(max_tokens: int | None = 128) -> KDACacheLayer:
    layer = KDACacheLayer()
    layer.weights = step_weights()
    if max_tokens is not None:
        layer.activate_past_recording(max_tokens)
    return layer


def part_of(inputs: tuple[torch.Tensor, ...], start: int, end: int) -> tuple[torch.Tensor, ...]:
    return tuple(x[:, start:end] for x in inputs)


PROGRAMS = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=12
)  # (tokens fed, share of what can be taken back)


@settings(max_examples=60, deadline=None)
@given(PROGRAMS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1000))
def test_any_program_of_calls_and_crops_leaves_the_bits_of_the_kept_tokens(program, dtype, seed):
    layer, kept, fed = recording_layer(max_tokens=24), [], 0
    for tokens, share in program:
        inputs = step_inputs(tokens, seed + fed, dtype)
        feed(layer, inputs)
        kept += [part_of(inputs, t, t + 1) for t in range(tokens)]
        fed += tokens
        removed = int(share * layer.recording.length)
        layer.crop(-removed if removed else len(kept) + 1)  # a length beyond what is there removes nothing
        kept = kept[: len(kept) - removed]
        assert layer.seen_tokens == len(kept)
        assert layer.recording.length <= 24
    plain = recording_layer(max_tokens=None)
    for token in kept:
        feed(plain, token)
    if kept:
        assert torch.equal(layer.state, plain.state)
        assert torch.equal(layer.window, plain.window)
    else:
        assert not layer.state.any()
        assert not layer.window.any()


def test_state_does_not_depend_on_how_calls_were_split():
    inputs = step_inputs(33, seed=0)
    whole = recording_layer(max_tokens=None)
    feed(whole, inputs)
    for splits in ([1] * 33, [16, 16, 1], [2, 31], [5, 7, 11, 10]):
        layer, start = recording_layer(max_tokens=None), 0
        for tokens in splits:
            feed(layer, part_of(inputs, start, start + tokens))
            start += tokens
        assert torch.equal(layer.state, whole.state)
        assert torch.equal(layer.window, whole.window)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0, 1), min_size=ROWS, max_size=ROWS)), max_size=8),
    st.booleans(),
    st.integers(0, 1000),
)
def test_rows_that_keep_different_numbers_of_tokens(program, has_padding, seed):
    layer, kept = recording_layer(max_tokens=32), [[] for _ in range(ROWS)]
    columns: list[list[bool]] = []  # for each column, the rows that still count it
    for i, (tokens, shares) in enumerate(program):
        inputs = step_inputs(tokens, seed + i)
        generator = torch.Generator().manual_seed(seed + i)
        valid = torch.rand(ROWS, tokens, generator=generator) < 0.7 if has_padding else torch.ones(ROWS, tokens) > 0
        feed(layer, inputs, valid if has_padding else None)
        columns += [[(i, t) if valid[row, t] else None for row in range(ROWS)] for t in range(tokens)]
        removed = torch.tensor([int(share * layer.recording.length) for share in shares])
        fewest = int(removed.min())
        layer.roll_back(fewest, removed)
        for row in range(ROWS):
            for column in columns[len(columns) - int(removed[row]) :]:
                column[row] = None
        columns = columns[: len(columns) - fewest]
        assert layer.seen_tokens == len(columns)
    for row in range(ROWS):
        kept = [column[row] for column in columns if column[row] is not None]
        plain = recording_layer(max_tokens=None)
        for i, t in kept:
            feed(plain, part_of(step_inputs(program[i][0], seed + i), t, t + 1))
        if kept:
            assert torch.equal(layer.state[row], plain.state[row])
            assert torch.equal(layer.window[row], plain.window[row])


@pytest.mark.parametrize("tokens", [1, 4, 7, 16])
@pytest.mark.parametrize("crop_every", [1, 5, 1000])
def test_a_quarter_of_a_recording_can_be_taken_back_at_any_time(tokens, crop_every):
    layer = recording_layer(max_tokens=128)
    for i in range(600 // tokens):
        feed(layer, step_inputs(tokens, seed=i))
        assert layer.recording.length >= min(layer.seen_tokens, 32)
        assert len(layer.recording._checkpoints) <= 3
        if i % crop_every == 0 and tokens > 1:
            layer.crop(-1)


@pytest.mark.parametrize("before", [0, 5, 20])
def test_a_draft_longer_than_the_recording_makes_it_grow(before):
    inputs = step_inputs(before + 41, seed=0)
    layer, plain = recording_layer(max_tokens=20), recording_layer(max_tokens=None)
    for t in range(before):
        feed(layer, part_of(inputs, t, t + 1))
    feed(layer, part_of(inputs, before, before + 41))
    layer.crop(-40)
    feed(plain, part_of(inputs, 0, before + 1))
    assert torch.equal(layer.state, plain.state)


def test_replays_are_short(monkeypatch):
    steps = []
    step = KDAStepWeights.step

    def counted(self, inputs, gate, window, state, lengths):
        steps.append(inputs[0].shape[1])
        return step(self, inputs, gate, window, state, lengths)

    monkeypatch.setattr(KDAStepWeights, "step", counted)
    layer = recording_layer()
    for i in range(60):
        feed(layer, step_inputs(5, seed=i))
        steps.clear()
        layer.crop(-(i % 5) if i % 5 else layer.seen_tokens)
        assert sum(steps) <= 5


def test_bytes_of_a_recording_at_the_released_shape():
    config = KimiLinearConfig()
    inner, heads, dim = 32 * 128, config.linear_num_heads, config.linear_head_dim
    with torch.device("meta"):
        recording = KDARecording()
        window, state = torch.empty(1, 3 * inner, 3, dtype=torch.bfloat16), torch.empty(1, heads, dim, dim)
        for tokens in [16] * 4 + [1] * 100:
            recording.prepare(window, state, tokens)
            parts = [torch.empty(1, tokens, size, dtype=torch.bfloat16) for size in [inner] * 4 + [heads]]
            recording.append(tuple(parts), None)
    assert recording.nbytes == 3 * (2 * 2**20 + 72 * 2**10) + 128 * 32_832 + 128
    assert recording.nbytes / 2**20 == pytest.approx(10.2, abs=0.05)  # the figure in the cache's docstring
