"""The kernels of packed prompts, compiled offline for the GPUs that take them, at the released shapes."""

import pytest
import torch

pytest.importorskip("triton")

from offline_compile import DESKTOP_SHARED, SHARED_LIMIT, TARGETS, compiling, resources

from kimi_linear.kernels.decode.configs import latent_config
from kimi_linear.kernels.kda import inter as kda_inter
from kimi_linear.kernels.kda.configs import inter_config
from kimi_linear.kernels.kda.index import Segment
from kimi_linear.kernels.prompt import packed_attention, packed_experts, packed_kda, packed_latent, packed_routing

KERNELS = [
    packed_kda.packed_conv_fwd_kernel, packed_kda.packed_window_fwd_kernel, packed_kda.packed_gated_norm_fwd_kernel,
    packed_latent.packed_row_fwd_kernel, packed_latent.packed_attend_fwd_kernel, packed_latent.packed_join_fwd_kernel,
    packed_attention.packed_gather_fwd_kernel, packed_attention.packed_attention_fwd_kernel,
    packed_routing.packed_route_fwd_kernel, packed_experts.packed_route_rank_fwd_kernel,
    packed_experts.packed_ends_fwd_kernel, packed_experts.packed_scatter_fwd_kernel,
    packed_experts.packed_combine_fwd_kernel, kda_inter.kda_inter_fwd_kernel,
]  # fmt: skip


def launch_all(gpu):
    """One launch of every kernel, as a plan makes it."""
    T, N, H, R, S = 64, 2, 32, 512, 64

    def half(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16)

    def number(*shape):
        return torch.zeros(*shape, dtype=torch.int32)

    table, rows, ends = torch.zeros(4, dtype=torch.int64), number(T), number(N + 1)
    x, gates, o = half(T, 12576), half(T, 8192), half(T, H, 128)
    packed_kda.packed_conv_fwd(x, tuple(half(4096, 1, 4) for _ in "qkv"), table, rows, ends, half(T, 12288))
    packed_kda.packed_window_fwd(x, table, ends, 12288, 4)
    packed_kda.packed_gated_norm_fwd(o, gates[:, 4096:], half(128), o, rows, 1e-5)
    tiles = [half(4, H, 32, 128) for _ in range(3)] + [torch.empty(4, H, 128)] + [half(4, H, 32, 32) for _ in "AM"]
    v, config = half(1, T, 3 * H, 128)[:, :, :H], inter_config(gpu, 128, 128, "bfloat16")
    index = (ends, number(N), number(4))
    kda_inter.kda_inter_fwd(
        v, o[None], state_in=table, state_out=None, segment=Segment(0, 4, index=index), tiles=tuple(tiles),
        config=config, upcast=False,
    )  # fmt: skip
    p = half(T, 6720)
    packed_latent.packed_row_fwd(p[:, 6144:], half(R), 1e-6, table, rows, rows)
    for splits in (1, 4):
        partial, lse = torch.empty(T, splits, H, R if splits > 1 else 0), torch.empty(T, splits, H)
        packed_latent.packed_attend_fwd(
            half(T, H, R + S), half(T, H, R), partial, lse, table=table, rows=rows, positions=rows, starts=number(N),
            index=index, scale=0.1, config=latent_config(T, H, R, 2, gpu), upcast=False,
        )  # fmt: skip
    keys = half(T, R + S)
    packed_attention.packed_gather_fwd(table, rows, rows, keys)
    for masked in (False, True):
        packed_attention.packed_attention_fwd(
            p, half(T, 8192), keys, o, table=table, positions=rows, key_offsets=ends, starts=number(N), index=index,
            latent=R, masked=masked, scale=0.1, config=packed_attention.packed_attention_config(2, gpu), upcast=False,
        )  # fmt: skip
    logits, bias, weights = torch.empty(T, 256), torch.empty(256), torch.empty(T, 8)
    rule = {"factor": 2.446, "biased": False, "renormalize": True}
    packed_routing.packed_route_fwd(logits, bias, rows, number(T, 8), weights, **rule)
    packed_experts.packed_route_rank_fwd(logits, bias, rows, number(T, 8), weights, number(T, 8), number(256), **rule)
    packed_experts.packed_ends_fwd(number(256), number(256))
    placed = half(T * 8, 2304)
    packed_experts.packed_scatter_fwd(
        half(T, 2304), rows, number(T, 8), number(T, 8), number(256), placed, number(T, 8)
    )
    packed_experts.packed_combine_fwd(placed, rows, number(T, 8), weights, half(T, 2304))


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_compiles_and_fits(gpu, monkeypatch):
    with compiling(KERNELS, TARGETS[gpu], monkeypatch) as compiled:
        launch_all(gpu)
    assert {name for name, _ in compiled} == {kernel.__name__ for kernel in KERNELS}
    for name, kernel in compiled:
        registers, spilled = resources(kernel, "cuda")
        print(f"{gpu:7} {name:30} registers {registers:3} spilled {spilled:5} shared {kernel.metadata.shared}")
        # The sums of 64 queries over latents of 512 take half of all registers.
        assert spilled <= (512 if "attend" in name else 0), (name, spilled)
        # Attention over latents and KDA's second stage have sm_80's own limit, as in decoding.
        shares = "attend" in name or "inter" in name or gpu != "sm_80"
        assert kernel.metadata.shared <= (SHARED_LIMIT[gpu] if shares else DESKTOP_SHARED)
