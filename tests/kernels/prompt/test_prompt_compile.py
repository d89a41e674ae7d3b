"""The fused inference kernels, compiled offline for the GPU classes they claim, at the released shapes."""

import pytest
import torch

pytest.importorskip("triton")

from offline_compile import TARGETS, check_compiles_without_spills, check_launches_are_guarded

from kimi_linear.kernels.gpu import launching as gpu_launching
from kimi_linear.kernels.prompt import expert_rows as prompt_expert_rows
from kimi_linear.kernels.prompt import merge_attention as prompt_merge_attention
from kimi_linear.kernels.prompt import mla_keys as prompt_mla_keys
from kimi_linear.kernels.prompt import norms as prompt_norms
from kimi_linear.kernels.prompt import short_convolution_kernel as prompt_short_convolution_kernel

KERNELS = [
    prompt_norms.rms_norm_fwd_kernel,
    prompt_norms.gated_rms_norm_fwd_kernel,
    prompt_short_convolution_kernel.short_conv_fwd_kernel,
    prompt_short_convolution_kernel.short_conv_edges_fwd_kernel,
    prompt_expert_rows.route_fwd_kernel,
    prompt_expert_rows.scatter_rows_fwd_kernel,
    prompt_expert_rows.silu_mul_fwd_kernel,
    prompt_expert_rows.combine_rows_fwd_kernel,
    prompt_mla_keys.mla_keys_fwd_kernel,
    prompt_merge_attention.merge_attention_fwd_kernel,
]


def launch_all(dtype):
    """One launch of every kernel as the released shape makes it."""
    M, D = 8, 2304
    x, weight, latents = (torch.empty(*shape, dtype=dtype) for shape in ((M, D), (D,), (M, 576)))
    prompt_norms.rms_norm_fwd(x, weight, 1e-5)
    prompt_norms.rms_norm_fwd(latents[:, :512], weight[:512], 1e-6)
    prompt_norms.add_rms_norm_fwd(x, x, weight, 1e-5)
    heads = torch.empty(1, M, 32, 128, dtype=dtype)
    prompt_norms.gated_rms_norm_fwd(heads, heads, weight[:128], 1e-5)
    inputs, taps = torch.empty(1, M, 4096, dtype=dtype), torch.empty(4096, 1, 4, dtype=dtype)
    window = torch.empty(1, 4096, 3, dtype=dtype)
    prompt_short_convolution_kernel.short_conv_fwd(inputs, taps, window, None, None)
    prompt_short_convolution_kernel.short_conv_fwd(inputs, taps, None, torch.tensor([3]), None)
    prompt_short_convolution_kernel.short_conv_fwd(inputs, taps, None, None, torch.tensor([0, 3, M], dtype=torch.int32))
    prompt_expert_rows.route_fwd(torch.empty(M, 256), torch.empty(256, dtype=dtype), 8, True, 2.446, False)
    position = torch.zeros(M, 8, dtype=torch.int32)
    rows = prompt_expert_rows.scatter_rows_fwd(x, position)
    prompt_expert_rows.silu_mul_fwd(*torch.empty(M, 2048, dtype=dtype).chunk(2, dim=1))
    prompt_expert_rows.combine_rows_fwd(rows, position, torch.empty(M, 8), x)
    prompt_mla_keys.mla_keys_fwd(torch.empty(1, M, 32, 256, dtype=dtype), latents[None, :, 512:], 128)
    o, lse = torch.empty(1, M, 32, 128), torch.empty(1, 32, M)
    prompt_merge_attention.merge_attention_fwd(o, lse, heads, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gpu", list(TARGETS))
def test_compiles_without_spills(gpu, dtype, monkeypatch):
    check_compiles_without_spills(KERNELS, launch_all, gpu, dtype, monkeypatch)


def test_every_operator_launches_on_the_gpu_of_its_tensors(monkeypatch):
    check_launches_are_guarded(KERNELS, launch_all, [gpu_launching], monkeypatch)
