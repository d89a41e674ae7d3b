"""Text of every number of rows on a CUDA device: by steps and by layers, in a batch and alone.

`python -m pytest -m gpu tests/gpu/test_decode_sizes_on_gpu.py`. fp32 exactly, on the small trained checkpoint.
"""

import pytest
import torch

from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Both sides of what skinny products, groups of experts, graphs and row parts take.
ROWS = [1, 63, 64, 65, 127, 129, 256, 511, 512, 513]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model():
    return KimiLinearForCausalLM.from_pretrained(SMALL_CHECKPOINT, dtype=torch.float32, device_map={"": "cuda"})


def ragged(rows):
    """Left-padded prompts of 2 to 20 tokens, and their mask."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, 1000, (rows, 20), generator=generator)
    padding = torch.randint(0, 19, (rows, 1), generator=generator)
    padding[-1] = 0
    return ids.cuda(), (torch.arange(20)[None] >= padding).long().cuda()


def text(model, ids, mask):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **options)[:, 20:]


@pytest.mark.parametrize("rows", ROWS)
def test_greedy_text_of_every_size(rows, model, by_layers):
    ids, mask = ragged(rows)
    expected = by_layers(lambda: text(model, ids, mask))
    assert model.decode_path.startswith("captured steps")
    assert torch.equal(text(model, ids, mask), expected)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(text(model, ids[row : row + 1], mask[row : row + 1]), expected[row : row + 1])


def test_memory_is_given_back_between_rollouts(model):
    model.free_generation_memory()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for rows in (1, 65):
        text(model, *ragged(rows))
    assert torch.cuda.memory_allocated() > held
    model.free_generation_memory()
    assert torch.cuda.memory_allocated() == held and torch.cuda.memory_reserved() <= reserved
