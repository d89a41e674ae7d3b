"""A model that is not on the current GPU, and one that accelerate spread over two. `python -m pytest -m gpu`."""

import pytest
import torch
from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM
from kimi_linear.modeling.prompt import segments as prompt_segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SPREAD = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.norm": 1, "lm_head": 1}
SPREAD |= {f"model.layers.{i}": 1 for i in range(2, 5)}
OPTIONS = {"max_new_tokens": 20, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tiny_config(kda_layers=(1, 2, 3), full_attn_layers=(4, 5)))
    return folder


def load(folder, device_map):
    return KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map).eval()


@pytest.fixture(scope="module")
def on_one(folder):
    return load(folder, {"": 0})


@pytest.fixture(scope="module", params=[{"": 1}, SPREAD], ids=["on the second", "on both"])
def elsewhere(request, folder):
    return load(folder, request.param)


def random_ids(batch, length):
    return torch.randint(0, 120, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy(model, ids, **options):
    return model.generate(ids.to(model.device), do_sample=False, eos_token_id=119, **OPTIONS, **options).cpu()


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 70), (1, 1000)])
def test_logits(on_one, elsewhere, batch, length, monkeypatch):
    """fp32 to 1e-5 of the norm, in one piece and in segments, behind a cache and in front of one."""
    monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 256)
    assert torch.cuda.current_device() == 0
    ids, caches = random_ids(batch, length + 3), [KimiLinearCache(model.config) for model in (on_one, elsewhere)]
    mask = torch.ones_like(ids)
    mask[0, 0] = int(batch == 1)
    for begin, end in ((0, length), (length, length + 3)):
        exact, logits = (
            model(
                ids[:, begin:end].to(model.device), attention_mask=mask[:, :end].to(model.device), past_key_values=cache
            ).logits.cpu()
            for model, cache in zip((on_one, elsewhere), caches)
        )
        seen = mask[:, begin:end].bool()
        assert float((logits - exact)[seen].norm() / exact[seen].norm()) < 1e-5


def test_greedy_text(on_one, elsewhere):
    ids = random_ids(2, 40)
    assert torch.equal(greedy(elsewhere, ids), greedy(on_one, ids))
    on_one_device = elsewhere.lm_head.weight.device == elsewhere.model.embed_tokens.weight.device
    assert elsewhere.decode_path.startswith("captured steps") == on_one_device


def test_prompt_lookup(on_one, elsewhere):
    ids = random_ids(1, 12).repeat(1, 3)
    assert torch.equal(greedy(elsewhere, ids, prompt_lookup_num_tokens=4), greedy(on_one, ids))
