"""The fused inference kernels: the interpreter's tests, fake implementations, the rule that chooses them, imports."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kimi_linear.kernels.gpu import availability as gpu_availability
from kimi_linear.kernels.gpu.availability import fused_path_serves
from kimi_linear.kernels.prompt.attention_lse import attention_with_lse
from kimi_linear.kernels.prompt.expert_rows import combine_rows_fwd, route_fwd, scatter_rows_fwd, silu_mul_fwd
from kimi_linear.kernels.prompt.grouped_experts import grouped_experts_serve
from kimi_linear.kernels.prompt.merge_attention import merge_attention_fwd
from kimi_linear.kernels.prompt.mla_keys import mla_keys_fwd
from kimi_linear.kernels.prompt.norms import add_rms_norm_fwd, gated_rms_norm_fwd, rms_norm_fwd
from kimi_linear.kernels.prompt.short_convolution_kernel import short_conv_fwd


def test_fake_outputs():
    """torch.compile and export see shapes and dtypes without a launch."""
    with FakeTensorMode():
        x, weight = torch.empty(2, 5, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
        normed, total = add_rms_norm_fwd(x, x, weight, 1e-5)
        y, window = short_conv_fwd(x, torch.empty(16, 1, 4, dtype=torch.bfloat16), None, None, None)
        packed = short_conv_fwd(x[:1], torch.empty(16, 1, 4), None, None, torch.zeros(4, dtype=torch.int32))
        weights, experts = route_fwd(torch.empty(7, 8), torch.empty(8), 3, True, 1.0, False)
        rows = scatter_rows_fwd(x[0], torch.empty(5, 3, dtype=torch.int32))
        combined = combine_rows_fwd(rows, torch.empty(5, 3, dtype=torch.int32), torch.empty(5, 3), None)
        same = [rms_norm_fwd(x, weight, 1e-5), gated_rms_norm_fwd(x, x, weight, 1e-5), silu_mul_fwd(x, x)]
        assert mla_keys_fwd(torch.empty(2, 5, 3, 12), torch.empty(2, 5, 4), 8).shape == (2, 5, 3, 12)
        o, lse = torch.empty(2, 5, 3, 16), torch.empty(2, 3, 5)
        assert merge_attention_fwd(o, lse, o, lse) is None
    for tensor in (normed, total, y, *same):
        assert (tensor.shape, tensor.dtype) == (x.shape, x.dtype)
    assert (window.shape, packed[1].shape) == ((2, 16, 3), (3, 16, 3))
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int64)
    assert (weights.shape, experts.shape, rows.shape, combined.shape) == ((7, 3), (7, 3), (15, 16), (5, 16))


def test_the_rule(monkeypatch):
    x = torch.zeros(2, 8)
    assert not fused_path_serves(x)  # on a CPU
    monkeypatch.setattr(gpu_availability, "device_serves", lambda device: True)
    assert fused_path_serves(x, None, torch.nn.Parameter(x).requires_grad_(False))
    assert not fused_path_serves(x.double())
    assert not fused_path_serves(x, x.to("meta"))
    wanted = x.clone().requires_grad_()
    assert not fused_path_serves(x, wanted)
    with torch.no_grad():
        assert fused_path_serves(x, wanted)

    class Sharded(torch.Tensor):
        pass

    assert not fused_path_serves(x, x.as_subclass(Sharded))
    gate_up, down = torch.zeros(4, 16, 8, dtype=torch.bfloat16), torch.zeros(4, 8, 8, dtype=torch.bfloat16)
    assert grouped_experts_serve(x.bfloat16(), gate_up, down)
    assert not grouped_experts_serve(x, gate_up, down)
    assert not grouped_experts_serve(x.bfloat16(), gate_up[:, :8], down)
    assert not grouped_experts_serve(x.bfloat16(), gate_up, down.transpose(1, 2))


def test_causal_attention_wants_as_many_keys():
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="got 3 and 2"):
        attention_with_lse(x[:, :, :2], x, x, causal=True, scale=1.0)


def test_written_out_attention_takes_few_queries_at_a_time(monkeypatch):
    q, k, v = (torch.randn(1, 2, 50, n, generator=torch.Generator().manual_seed(n)) for n in (8, 8, 6))
    whole = attention_with_lse(q, k, v, causal=True, scale=0.5)
    monkeypatch.setattr("kimi_linear.kernels.prompt.attention_lse._SCORE_BYTES", 4 * 2 * 50 * 7)
    parts = attention_with_lse(q, k, v, causal=True, scale=0.5)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    for got in (whole[0], parts[0]):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[1], parts[1])
