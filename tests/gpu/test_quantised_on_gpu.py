"""Quantised files on a CUDA device. `python -m pytest -m gpu tests/gpu/test_quantised_on_gpu.py`.

Every layout by the exact path: the bound is the one of the tests on the CPU. bitsandbytes is not among them: its files
are the library's own, and it was not there to run.
"""

import pytest
import torch
from float64_model import Float64Model
from packed_weights import (
    IGNORED,
    LAYOUTS,
    QUANTISED_CONFIG,
    config_of,
    format_of,
    quantised_tensors,
    write_quantised,
)
from safetensors.torch import load_file

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.kernels.weights.tiles import tile_format
from kimi_linear.modeling.checkpoint.packed_modules import KimiPackedExperts, KimiPackedLinear
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Logits of order 1 to 10, each after some 1e3 roundings of 6e-8 (test_quantised_layouts.py).
BOUND = {"atol": 1e-4, "rtol": 1e-4}


def load(folder, device="cuda", **options):
    pytest.importorskip("compressed_tensors", reason="transformers reads its files with it")
    return KimiLinearForCausalLM.from_pretrained(folder, device_map={"": device}, **options).eval()


def same_bits(x, y):
    return (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(
        x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_layout_is_right_stays_packed_and_is_saved_bit_for_bit(layout, tmp_path, random_ids):
    stored, dense = quantised_tensors(layout)
    write_quantised(tmp_path / "file", layout, stored)
    model, ids = load(tmp_path / "file"), random_ids(2, 9)
    assert isinstance(model.model.layers[0].self_attn.q_proj, KimiPackedLinear)
    assert isinstance(model.model.layers[1].block_sparse_moe.experts, KimiPackedExperts)
    tensors = [*model.parameters(), *model.buffers()]
    assert {x.device.type for x in tensors} == {"cuda"}
    assert sum(x.nbytes for x in tensors) == sum(x.nbytes for x in stored.values())
    exact = Float64Model(QUANTISED_CONFIG, dense)(ids).float().detach()
    torch.testing.assert_close(model(ids.cuda()).logits.cpu(), exact, **BOUND)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("file", "again"))
    assert before.keys() == after.keys()
    assert [name for name, x in before.items() if not same_bits(x, after[name])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_greedy_text_is_that_of_the_cpu(layout, tmp_path, random_ids):
    stored, _ = quantised_tensors(layout)
    write_quantised(tmp_path / "file", layout, stored)
    ids, options = random_ids(2, 9), {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    model = load(tmp_path / "file")
    text = model.generate(ids.cuda(), **options)
    assert torch.equal(text.cpu(), load(tmp_path / "file", "cpu").generate(ids, **options))
    way = "captured steps" if tile_format(format_of(layout)) else "layer by layer: packed weights: no kernels for"
    assert model.decode_path.startswith(way), model.decode_path


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if tile_format(format_of(layout))])
@torch.no_grad()
def test_512_greedy_tokens_by_steps_are_those_of_the_layers(layout, batch, random_ids, by_layers):
    """In fp32, where two orders of summation don't choose between near-ties; left-padded if there are several rows."""
    config = {**QUANTISED_CONFIG, "quantization_config": config_of(layout, IGNORED)}
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict(config)).eval()
    model.load_state_dict(quantised_tensors(layout)[0])
    model, ids = model.cuda(), random_ids(batch, 20).cuda()
    mask = torch.ones_like(ids)
    mask[0, : 5 * (batch > 1)] = 0
    options = {"max_new_tokens": 512, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    text = model.generate(ids, **options)
    assert model.decode_path.startswith("captured steps"), model.decode_path
    assert torch.equal(text, by_layers(lambda: model.generate(ids, **options)))


@torch.no_grad()
def test_half_of_the_layers_on_the_cpu(tmp_path, random_ids):
    stored, _ = quantised_tensors("w4a16 g32")
    write_quantised(tmp_path / "file", "w4a16 g32", stored)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "lm_head": 0}
    ids = random_ids(2, 9)
    model = KimiLinearForCausalLM.from_pretrained(tmp_path / "file", device_map=places).eval()
    torch.testing.assert_close(model(ids.cuda()).logits.cpu(), load(tmp_path / "file", "cpu")(ids).logits, **BOUND)
