"""plan: its bytes are those of real models and caches, its figures those that are known, and what fits is right."""

import json

import pytest
import torch
from packed_weights import quantised_tensors, write_quantised
from tiny_checkpoints import TINY_CONFIGS, tiny_config

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.cli import main
from kimi_linear.hub_card.measure.counts import cache_bytes, cache_moved, held_bytes, step_bytes
from kimi_linear.hub_card.measure.random_models import empty_model, random_model
from kimi_linear.hub_card.measure.shapes import first_layers
from kimi_linear.hub_card.plan import cards, placing, weights
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

RELEASED = KimiLinearConfig()
GIB = 2**30


def tiny(name: str = "hybrid") -> KimiLinearConfig:
    return KimiLinearConfig.from_dict({**TINY_CONFIGS[name], "dtype": "bfloat16"})


@pytest.mark.parametrize("name", ["hybrid", "all_mla", "all_kda"])
def test_cache_bytes_are_what_a_prompt_leaves_in_the_cache(name):
    model = random_model(KimiLinearForCausalLM, tiny(name), "cpu")
    with torch.no_grad():
        cache = model(torch.zeros(2, 37, dtype=torch.long), use_cache=True).past_key_values
    assert held_bytes(cache) == cache_bytes(tiny(name), 2, 37)


@pytest.mark.parametrize("name", ["hybrid", "interleaved", "dense"])
def test_bf16_bytes_and_those_that_a_step_reads_are_the_models(name):
    model, counted = empty_model(KimiLinearForCausalLM, tiny(name)), weights.bf16_weights(tiny(name))
    biases = 2 * sum(x.numel() for x in model.buffers())  # fp32 in memory, bf16 on disk
    assert counted.total == sum(x.nbytes for x in (*model.parameters(), *model.buffers())) - biases
    read = counted.read(tiny(name), 3) + cache_moved(tiny(name), 3, 100)
    assert read == pytest.approx(step_bytes(model, 3, 100) - biases)


@pytest.mark.parametrize("format", weights.FORMATS, ids=lambda format: format.name)
def test_bytes_of_quantised_weights_are_those_of_packed_modules(format):
    config = first_layers(RELEASED, 2)
    config = KimiLinearConfig.from_dict({**config.to_dict(), "num_experts": 8, "num_experts_per_token": 2})
    model = empty_model(KimiLinearForCausalLM, format.config_of(config))
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert weights.weights_in(format, config).total == pytest.approx(held, rel=1e-3)


def test_known_figures():
    bf16 = weights.bf16_weights(RELEASED)
    assert bf16.total == 98_245_528_576
    assert bf16.read(RELEASED, 1) == pytest.approx(6.21e9, rel=0.002)
    sizes = {format.name: weights.weights_in(format, RELEASED) for format in weights.FORMATS}
    public = next(one for name, one in sizes.items() if name.startswith("W4 experts (int4"))
    assert public.total / GIB == pytest.approx(28.4, abs=0.1)
    assert public.read(RELEASED, 1) == pytest.approx(4.1e9, rel=0.01)
    assert sizes["NVFP4"].total / GIB == pytest.approx(26.8, abs=0.1)
    assert sizes["FP8"].total == pytest.approx(50e9, rel=0.01)
    assert cache_moved(RELEASED, 1, 0) == pytest.approx(84e6, rel=0.01)
    assert cache_bytes(RELEASED, 1, 1) - cache_bytes(RELEASED, 1, 0) == 8064
    assert placing.scratch(RELEASED, 1, 131072, "cuda") / GIB == pytest.approx(4, abs=0.5)


@pytest.fixture(scope="module")
def w4():
    return weights.weights_in(weights.FORMATS[0], RELEASED)


def test_what_fits_where(w4):
    bf16, small, large = weights.bf16_weights(RELEASED), cards.find_card("4090"), cards.find_card("H200")
    assert placing.place(RELEASED, bf16, [large], 1, 131072).fits
    assert not placing.place(RELEASED, bf16, [cards.find_card("h100")], 1, 1).fits
    assert not placing.place(RELEASED, w4, [small], 1, 4096).fits
    placed = placing.place(RELEASED, w4, [small, small], 1, 4096)
    assert placed.fits and sum(placed.layers) == 27 and min(placed.layers) > 0
    assert all(used <= card.usable for used, card in zip(placed.used, [small, small]))
    assert placing.needed_devices(RELEASED, w4, small) == 2


@pytest.mark.parametrize("gib", [40, 80])
def test_largest_batch_and_longest_context_are_at_the_border(w4, gib):
    card = [cards.card_of_size(gib, 1000)]
    batch = placing.largest_batch(RELEASED, w4, card, 131072)
    assert placing.place(RELEASED, w4, card, batch, 131072).fits
    assert not placing.place(RELEASED, w4, card, batch + 1, 131072).fits
    longest = placing.longest_context(RELEASED, w4, card)
    assert longest == 2**20 or not placing.place(RELEASED, w4, card, 1, longest + 1024).fits
    assert placing.place(RELEASED, w4, card, 1, longest).fits


def test_plan_of_a_folder_counts_its_own_bytes(tmp_path, capsys):
    write_quantised(tmp_path / "w4", "w4a16 g32", quantised_tensors("w4a16 g32")[0])
    assert main(["plan", str(tmp_path / "w4"), "--gpu-memory", "24", "24", "--contexts", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    own, bf16 = found["weights"][:2]
    size = (tmp_path / "w4" / "model.safetensors").stat().st_size
    assert 0.8 * size < own["bytes"] < size and own["format"] == "this folder (compressed-tensors)"
    assert bf16["format"] == "bf16" and bf16["decode_path"] == "captured steps"
    (case, *_) = bf16["cases"]
    assert case["fits"] and case["expected_ms_a_token"] > case["limit_ms_a_token"] > 0


def test_plan_for_people(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert main(["plan", "--config", str(tmp_path / "config.json"), "--cpu-memory", "8", "--contexts", "1024"]) == 0
    text = capsys.readouterr().out
    assert "4 layers: 2 KDA, 2 MLA" in text and "layer by layer [1]" in text and "[1] on a CPU" in text
    assert "1,024 x 64" in text and "most rows (up to 512)" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "RTX"], "fits 5 of"),
        (["--gpu", "Voodoo"], "fits 0 of"),
        (["--gpu-memory", "24", "--cpu-memory", "64"], "exclude one another"),
        (["--gpu-memory", "-1"], "must be positive"),
        (["--gpu-memory", "24", "--contexts", "0"], "--contexts must be positive, got 0"),
        (["nowhere", "--gpu-memory", "24"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(arguments, words, capsys):
    assert main(["plan", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
