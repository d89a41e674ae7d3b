"""Packed sequences in one row: they equal separate ones, make no cache, and wrong boundaries are refused."""

import pytest
import torch
from comparisons import assert_same_gradients, assert_same_logits, gradients_of
from torch import nn
from transformers import DataCollatorWithFlattening


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["hybrid", "all_kda"])
def test_packed_sequences_equal_separate_ones(name, boundaries, implementation, load_tiny, random_ids):
    model = load_tiny(name, attn_implementation=implementation)
    sequences = [random_ids(1, length, seed=length)[0] for length in (9, 1, 70, 20)]
    collator = DataCollatorWithFlattening(
        return_position_ids=boundaries == "position_ids", return_flash_attn_kwargs=boundaries == "cu_seq_lens"
    )
    batch = collator([{"input_ids": ids.tolist()} for ids in sequences])
    assert batch["input_ids"].shape == (1, 100)
    assert "attention_mask" not in batch

    outputs = model(**batch)
    separate = [model(ids[None]) for ids in sequences]
    assert_same_logits(outputs.logits, torch.cat([output.logits for output in separate], dim=1))

    # The mean over the pack's targets; the collator leaves no target for the first token of a sequence.
    losses = [
        nn.functional.cross_entropy(output.logits[0, :-1], ids[1:], reduction="sum")
        for output, ids in zip(separate, sequences, strict=True)
    ]
    expected = sum(losses) / sum(len(ids) - 1 for ids in sequences)
    torch.testing.assert_close(outputs.loss, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients_of(model, outputs.loss), gradients_of(model, expected))


@torch.no_grad()
def test_packing_makes_no_cache_and_excludes_one(model, random_ids):
    ids, ends = random_ids(1, 10), torch.tensor([0, 4, 10], dtype=torch.int32)
    assert model(ids, cu_seq_lens_q=ends, use_cache=True).past_key_values is None
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="exclude one another"):
        model(ids, cu_seq_lens_q=ends, past_key_values=cache)


@pytest.mark.parametrize("ends", [[0, 4], [0, 4, 11], [1, 10], [0, 6, 4, 10]], ids=str)
def test_wrong_boundaries_are_refused(ends, model, random_ids):
    with pytest.raises(ValueError, match="rise from 0"):
        model(random_ids(1, 10), cu_seq_lens_q=torch.tensor(ends))


def test_boundaries_over_several_rows_are_refused(model, random_ids):
    with pytest.raises(ValueError, match="one row"):
        model(random_ids(2, 5), cu_seq_lens_q=torch.tensor([0, 5, 10]))
