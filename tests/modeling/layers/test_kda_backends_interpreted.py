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
