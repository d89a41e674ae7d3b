"""An fp32 model under autocast to bf16, as Trainer evaluates it: what must stay in fp32 does, and caches serve."""

import pytest
import torch

from kimi_linear.kernels.prompt.attention_lse import attention_with_lse
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache


@torch.no_grad()
def test_the_router_stays_in_fp32(model):
    """A product in bf16 would choose other experts, and the fused routing takes fp32 only."""
    gate = model.model.layers[1].block_sparse_moe.gate
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = gate(x)
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected))


def test_attention_by_blocks_takes_keys_of_another_dtype():
    """PyTorch's GPU operators would read fp32 keys as the query's bf16, so they are cast for them on every device."""
    query, key, value = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    query, rounded = query.bfloat16(), (key.bfloat16(), value.bfloat16())
    expected = attention_with_lse(query, *rounded, causal=True, scale=0.3)
    outputs = attention_with_lse(query, key, value, causal=True, scale=0.3)
    assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(20, 20), (20, 1, 1, 3), (3, 17, 20)])
def test_caches_serve_under_autocast(model, lengths, random_ids):
    """In parts as in one: to bf16's eps of 2 ** -8 on each of some ten products between input and logits."""
    ids = random_ids(2, sum(lengths))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, use_cache=False).logits
        cache = KimiLinearCache(model.config)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(lengths, dim=1)], dim=1)
    error = (logits - expected).float().norm() / expected.float().norm()
    assert float(error) < 10 * 2**-8
