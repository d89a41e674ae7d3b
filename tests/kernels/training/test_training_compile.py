"""The kernels of the backwards, compiled offline for the GPU classes they claim, at the released shapes."""

import pytest
import torch

pytest.importorskip("triton")

from offline_compile import TARGETS, check_compiles_without_spills, check_launches_are_guarded

from kimi_linear.kernels.gpu import launching as gpu_launching
from kimi_linear.kernels.training import expert_rows as training_expert_rows
from kimi_linear.kernels.training import linear_cross_entropy as training_linear_cross_entropy
from kimi_linear.kernels.training import norms as training_norms
from kimi_linear.kernels.training import routing as training_routing
from kimi_linear.kernels.training import short_convolution as training_short_convolution
from kimi_linear.kernels.training import silu_mul as training_silu_mul

KERNELS = [
    training_norms.rms_norm_bwd_kernel, training_norms.gated_rms_norm_bwd_kernel,
    training_silu_mul.silu_mul_bwd_kernel, training_linear_cross_entropy.cross_entropy_kernel,
    training_short_convolution.short_conv_bwd_kernel, training_routing.route_bwd_kernel,
    training_expert_rows.combine_rows_bwd_kernel,
]  # fmt: skip


def launch_all(dtype):
    """One launch of every kernel as the released shape makes it."""
    N, H = 8, 2304
    x, weight, latents = (torch.empty(*shape, dtype=dtype) for shape in ((N, H), (H,), (N, 576)))
    training_norms.rms_norm_bwd(x, x, x, weight, 1e-5)
    training_norms.rms_norm_bwd(latents[:, :512], latents[:, :512], None, weight[:512], 1e-6)
    heads = torch.empty(1, N, 32, 128, dtype=dtype)
    training_norms.gated_rms_norm_bwd(heads, heads, heads, weight[:128], 1e-5)
    hidden = torch.empty(N, 2048, dtype=dtype)
    training_silu_mul.silu_mul_bwd(*hidden.chunk(2, dim=1), hidden[:, :1024])
    training_silu_mul.weighted_silu_mul_bwd(hidden, hidden[:, :1024], torch.empty(N))
    inputs, taps = torch.empty(1, N, 4096, dtype=dtype), torch.empty(4096, 1, 4, dtype=dtype)
    training_short_convolution.short_conv_bwd(inputs, inputs, taps, None)
    training_short_convolution.short_conv_bwd(inputs, inputs, taps, torch.zeros(N, dtype=torch.int32))
    rows, position = torch.empty(N * 8, H, dtype=dtype), torch.zeros(N, 8, dtype=torch.int32)
    training_expert_rows.combine_rows_bwd(x, rows, position, torch.empty(N, 8))
    training_silu_mul.stacked_silu_mul_bwd(hidden, hidden[:, :1024])
    chosen = torch.zeros(N, 8, dtype=torch.int64)
    training_routing.route_bwd(
        torch.empty(N, 8), torch.empty(N, 256), torch.empty(256, dtype=dtype), chosen, True, 2.446, False
    )
    logits = torch.empty(N, 163840, dtype=dtype)
    training_linear_cross_entropy.cross_entropy_in_place(logits, torch.zeros(N, dtype=torch.int64), -100)


@pytest.mark.parametrize(("gpu", "dtype"), [*((gpu, torch.bfloat16) for gpu in TARGETS), ("sm_90", torch.float32)])
def test_compiles_without_spills(gpu, dtype, monkeypatch):
    check_compiles_without_spills(KERNELS, launch_all, gpu, dtype, monkeypatch)


def test_every_operator_launches_on_the_gpu_of_its_tensors(monkeypatch):
    check_launches_are_guarded(KERNELS, launch_all, [gpu_launching], monkeypatch)
