"""Packed weights: every format against the float64 oracle, bit for bit, and gradients through them."""

import pytest
import torch
import torch.nn.functional as F
from packed_weights import LAYOUTS, format_of, random_weight

from kimi_linear.kernels.weights.handle import WeightHandle
from kimi_linear.kernels.weights.linear import packed_linear
from kimi_linear.kernels.weights.packing import pack_weight
from kimi_linear.kernels.weights.reference import dequantize_reference

# Rows and columns that words, groups and blocks divide, and that they don't: the last of each is cut.
SHAPES = [(8, 128), (1, 1), (9, 33), (25, 130), (3, 16)]


def handle_of(name: str, rows: int, columns: int, seed: int = 0, dtype=torch.bfloat16) -> tuple[WeightHandle, dict]:
    format = format_of(name)
    held = random_weight(format, rows, columns, torch.Generator().manual_seed(seed), dtype)
    parts = {"data": held["packed"], "scale": held[format.scale_name]}
    parts |= {part: held.get(part) for part in ("zero_point", "global_scale")}
    return WeightHandle(format, (rows, columns), **parts), parts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantised_in_float64_is_the_oracle(name, shape):
    handle, parts = handle_of(name, *shape)
    expected = dequantize_reference(handle.format, shape, **parts)
    assert torch.equal(handle.dequantize(), expected)
    assert expected.abs().max() > 0 or shape == (1, 1)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded(name, dtype):
    handle, _ = handle_of(name, 9, 33, dtype=torch.float32)
    exact = handle.dequantize()
    # Three roundings in fp32 (scale by global scale, zero point, product), then one to the dtype; fp16 has subnormals.
    bound = exact.abs() * (torch.finfo(dtype).eps + 3 * torch.finfo(torch.float32).eps)
    assert (
        (handle.dequantize(dtype).double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal / 1024
    ).all()
    assert handle.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("name", ["w4a16 channel", "fp8 channel"])
def test_scales_that_an_older_transformers_squeezed_are_the_same(name):
    handle, parts = handle_of(name, 9, 33)
    squeezed = WeightHandle(handle.format, (9, 33), **{**parts, "scale": parts["scale"].squeeze(-1)})
    assert torch.equal(squeezed.dequantize(), handle.dequantize())


def test_strided_parts_give_the_same():
    handle, parts = handle_of("w4a16 g32 asymmetric", 9, 33)
    strided = {key: x if x is None else x.t().contiguous().t() for key, x in parts.items()}
    assert not strided["data"].is_contiguous()
    assert torch.equal(WeightHandle(handle.format, (9, 33), **strided).dequantize(), handle.dequantize())


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_product_and_its_gradient_are_those_of_the_dense_weight(rows):
    handle, _ = handle_of("w4a16 g32", 24, 64)
    x = torch.randn(rows, 64, dtype=torch.float64, requires_grad=True)
    dense = x.detach().clone().requires_grad_()
    y, expected = packed_linear(x, handle), F.linear(dense, handle.dequantize())
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(y, expected) and torch.allclose(x.grad, dense.grad, rtol=1e-12, atol=0)
    with torch.no_grad():
        assert torch.equal(packed_linear(x, handle), expected)


def test_backward_keeps_no_dense_weight():
    handle, _ = handle_of("w4a16 g32", 24, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        packed_linear(torch.randn(3, 64, requires_grad=True), handle).sum()
    assert not any(x.shape == (24, 64) for x in kept)


def test_autocast_decides_the_dtype():
    handle, _ = handle_of("fp8 channel", 24, 64)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(x, handle)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


# ---- packing while loading


@pytest.mark.parametrize("name", ["w4a16 g32", "w4a16 channel", "w8a16", "int8", "fp8 channel"])
@pytest.mark.parametrize("shape", [(8, 128), (1, 1), (9, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weight_is_the_nearest(name, shape, dtype):
    format, (rows, columns) = format_of(name), shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0] = 0
    held = pack_weight(weight, format, dtype)
    assert {part: (x.shape, x.dtype) for part, x in held.items()} == {
        part: (shapes[0], torch.int64 if part == "shape" else format.data_dtype if part == "packed" else dtype)
        for part, (shapes, _) in format.tensors(rows, columns).items()
    }
    handle = WeightHandle(format, shape, held["packed"], held["scale"])
    scale = handle._spread(held["scale"].double()).expand(shape)
    # Integers: half a step, and up to half a step more at the upper end, which has one number less; rounding of the
    # scale moves the ends by its eps. E4M3: half of its eps relative, half of its smallest step near zero.
    error = (handle.dequantize() - weight.double()).abs()
    if format.storage == "fp8":
        assert (error <= weight.double().abs() * (2**-4 + torch.finfo(dtype).eps) + scale * 2**-10).all()
    else:
        assert (error <= scale * (0.5 + 2 ** (format.bits - 1) * torch.finfo(dtype).eps)).all()


def test_zeros_stay_zeros_and_nan_is_not_hidden():
    format = format_of("w4a16 g32")
    held = pack_weight(torch.zeros(4, 64), format, torch.float32)
    assert not WeightHandle(format, (4, 64), held["packed"], held["scale"]).dequantize().any()
    assert pack_weight(torch.full((4, 64), torch.nan), format, torch.float32)["scale"].isnan().all()
    with pytest.raises(ValueError, match="nvfp4"):
        pack_weight(torch.zeros(4, 64), format_of("nvfp4"), torch.float32)
