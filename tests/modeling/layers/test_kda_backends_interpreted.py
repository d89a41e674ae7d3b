"""A model computes the same with KDA in Triton and in PyTorch; in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")


def test_the_model_computes_the_same_with_triton(load_tiny, random_ids):
    ours, expected = (load_tiny("hybrid", kda_backend=backend) for backend in ("triton", "torch"))
    tokens = random_ids(2, 37)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        a, b = (model(tokens, attention_mask=mask).logits[mask.bool()] for model in (ours, expected))
    # fp32 logits of order 1 after some 1e3 roundings of 6e-8
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.generate(tokens, **options), expected.generate(tokens, **options))


def test_the_model_trains_the_same_with_triton(load_tiny, random_ids):
    ours, expected = (load_tiny("hybrid", kda_backend=backend).train() for backend in ("triton", "torch"))
    tokens = random_ids(2, 37)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    for model in (ours, expected):
        model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
    for (name, ours_p), p in zip(ours.named_parameters(), expected.parameters()):
        assert (ours_p.grad is None) == (p.grad is None), name
        if p.grad is not None:  # some 1e3 roundings of 6e-8 in a row
            assert float((ours_p.grad - p.grad).norm()) <= 1e-4 * float(p.grad.norm()) + 1e-7, name
