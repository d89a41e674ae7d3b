"""Scales by least squares, recipes and figures of `quantize`."""

import re

import pytest
import torch

from kimi_linear.hub_card.quantising import least_squares, measure, recipes
from kimi_linear.hub_card.quantising.least_squares import quantise_rows
from kimi_linear.hub_card.quantising.recipes import RECIPES, quantization_config
from kimi_linear.kernels.weights.formats import WeightFormat
from kimi_linear.kernels.weights.handle import WeightHandle
from kimi_linear.kernels.weights.reference import dequantize_reference
from kimi_linear.modeling.checkpoint.schemes import Schemes

compressed_tensors = pytest.importorskip("compressed_tensors", reason="quantize packs with it (in the dev extra)")
from compressed_tensors.quantization import QuantizationArgs  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

EXPERT = "model.layers.1.block_sparse_moe.experts.0.w1"


def format_of(recipe: str) -> WeightFormat:
    return Schemes(quantization_config(RECIPES[recipe])).format_of(EXPERT)


# ---- scales


def weights_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(6, 96, generator=generator)
    made = {
        "normal": normal,
        "one large number a group": torch.where(torch.arange(96) % 32 == 5, 20 * normal, normal),
        "tiny": 1e-30 * normal,
        "huge": 1e35 * normal,
        "groups and rows of zeros": normal * (torch.arange(96) > 40) * (torch.arange(6) > 1)[:, None],
    }
    return made[kind].to(dtype)


KINDS = ("normal", "one large number a group", "tiny", "huge", "groups and rows of zeros")


def library_s_error(weight: torch.Tensor, recipe: str) -> torch.Tensor:
    """Squares of the errors of llm-compressor's round to nearest, by compressed-tensors' own functions; a row each."""
    args = QuantizationArgs(**RECIPES[recipe].groups[0][1]["weights"])
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    numbers = quantize(weight, scale, zero_point, args)
    return (weight.double() - dequantize(numbers, scale, args=args, dtype=torch.float64)).square().sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["w4a16", "fp8"])
def test_no_row_gets_worse_than_round_to_nearest(recipe, kind):
    weight, format = weights_of(kind), format_of(recipe)
    made = quantise_rows(weight, format)
    assert (made.tensors["scale"].dtype, made.tensors["packed"].dtype) == (weight.dtype, format.data_dtype)
    assert tuple(made.tensors["scale"].shape) in format.scale_shapes(*weight.shape)
    assert (made.tensors["scale"] > 0).all() and made.tensors["scale"].isfinite().all()
    back = dequantize_reference(format, tuple(weight.shape), made.tensors["packed"], made.tensors["scale"])
    error = (weight.double() - back).square().sum(1)
    energy, ours, nearest = made.squares.unbind(1)
    # Sums of up to 96 squares in fp32, relative to the row's own largest.
    torch.testing.assert_close(energy, weight.double().square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, error, rtol=1e-3, atol=1e-12 * energy.max().item())
    assert (error <= library_s_error(weight, recipe) * (1 + 1e-5)).all()
    if kind == "normal":
        assert ours.sum() < (0.9 if recipe == "w4a16" else 0.99) * nearest.sum()


def test_round_to_nearest_is_the_library_s():
    """What the card compares with is what llm-compressor would have written."""
    weight = weights_of("normal")
    nearest = quantise_rows(weight, format_of("w4a16")).squares[:, 2]
    # The library divides in bf16, so that some numbers near a half go the other way.
    torch.testing.assert_close(nearest, library_s_error(weight, "w4a16"), rtol=0.02, atol=0)


@pytest.mark.parametrize("largest", [7, 8])
def test_weights_that_were_int4_before_are_found_again(largest):
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(-7, 8, (64, 2, 32), generator=generator)
    numbers[..., 0] = -largest
    scales = (0.01 * (0.5 + torch.rand(64, 2, 1, generator=generator))).bfloat16()
    weight = (numbers * scales.float()).flatten(1).bfloat16()
    made = quantise_rows(weight, format_of("w4a16"))
    assert torch.equal(made.tensors["scale"], scales.squeeze(-1))
    handle = WeightHandle(format_of("w4a16"), (64, 64), made.tensors["packed"], made.tensors["scale"])
    assert torch.equal(handle.dequantize(torch.bfloat16), weight)


@pytest.mark.parametrize("recipe", ["w4a16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_and_blocks_of_rows_change_nothing(monkeypatch, recipe, dtype):
    weight = weights_of("normal", dtype)
    whole = quantise_rows(weight, format_of(recipe))
    monkeypatch.setattr(least_squares, "BLOCK_NUMBERS", {"cpu": 1, "cuda": 1})
    by_rows = quantise_rows(weight, format_of(recipe))
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), by_rows.tensors[name].view(torch.uint8))
    assert whole.tensors["scale"].dtype == dtype
    assert torch.equal(whole.squares, by_rows.squares)


# ---- recipes and figures


def test_patterns_mean_what_engines_ask_for():
    """vLLM asks for experts by projections that no file holds; no pattern may reach a module without weights."""
    schemes = Schemes(quantization_config(RECIPES["w4a16-fp8"]))
    for leaf in ("w1", "gate_proj", "up_proj", "down_proj"):
        assert schemes.format_of(f"{EXPERT.removesuffix('w1')}{leaf}").bits == 4
    # compressed-tensors before 0.20 raises for a name that matches and is no linear layer.
    assert not re.match(recipes.EXPERTS.removeprefix("re:"), "model.layers.1.block_sparse_moe.experts.act_fn")
    assert schemes.format_of("model.layers.1.block_sparse_moe.shared_experts.gate_up_proj").storage == "fp8"


def test_divergence_is_that_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(700, 11, generator=generator).log_softmax(-1) for _ in range(2))
    kl, agreement = measure.divergence(measure.Reading(first, 0, ""), measure.Reading(second, 0, ""))
    expected = torch.nn.functional.kl_div(second.double(), first.double(), reduction="batchmean", log_target=True)
    assert kl == pytest.approx(expected.item(), rel=1e-5)
    assert agreement == pytest.approx((first.argmax(-1) == second.argmax(-1)).double().mean().item())
    assert measure.divergence(measure.Reading(first, 0, ""), measure.Reading(first, 0, "")) == (0, 1)
