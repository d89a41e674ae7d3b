"""
The routed experts of a prompt over packed weights, for inference.

A few tokens take the grouped kernels of a decode step, which read packed weights as they lie. Many tokens use a weight
many times: a chunk of experts is dequantised into a buffer, and the library multiplies by it.
"""

import torch
import torch.nn.functional as F

from ..decode.configs import GROUP, grouped_configs
from ..decode.dequantize import decode_dequantize
from ..decode.packed_grouped import decode_packed_grouped_experts
from ..decode.routing import decode_group, most_blocks
from ..gpu.availability import fused_path_serves
from ..gpu.classes import gpu_of
from ..gpu.launching import launches_beside_first_argument
from ..weights.tiles import PackedStack, tile_format
from .expert_rows import combine_rows_fwd, scatter_rows_fwd, silu_mul_fwd
from .grouped_experts import expert_order

# Most tokens of the grouped kernels: from there on most experts are used many times.
_FEW_TOKENS = 512
# Experts that are dequantised at a time: 288 MiB at the released widths.
_CHUNK = 32


def quantised_experts_serve(x: torch.Tensor, gate_up: PackedStack, down: PackedStack) -> bool:
    """Whether `quantised_experts` takes these: bf16, formats that have tiles, rows of 16 bytes, no gradients."""
    D, width = x.shape[1], gate_up.data.shape[1] // 2
    fits = D % 8 == width % 8 == 0 and down.data.shape[1] == D and x.dtype == torch.bfloat16
    read = all(tile_format(stack.format) is not None and stack.data.is_contiguous() for stack in (gate_up, down))
    scales = [stack.scale for stack in (gate_up, down)]
    return fits and read and all(s.is_contiguous() for s in scales) and fused_path_serves(x, *scales)


@launches_beside_first_argument
def quantised_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: PackedStack,
    down: PackedStack,
    shared: torch.Tensor | None,
) -> torch.Tensor:
    """As `grouped_experts`, with stacks of packed weights.

    Args:
        x: [M, D] bf16.
        experts: [M, k] int64, each in [0, E).
        weights: [M, k] fp32.
        gate_up, down: of E experts, [2 I, D] and [D, I] each.
        shared: [M, D] to add, or None.

    Returns:
        [M, D] bf16. More than 512 tokens read back how many rows each expert has.
    """
    if x.shape[0] <= _FEW_TOKENS:
        return _by_grouped_kernels(x, experts, weights, gate_up, down, shared)
    return _by_chunks(x, experts, weights, gate_up, down, shared)


def _by_grouped_kernels(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: PackedStack,
    down: PackedStack,
    shared: torch.Tensor | None,
) -> torch.Tensor:
    (M, D), k, (E, I) = x.shape, experts.shape[1], (down.data.shape[0], gate_up.data.shape[1] // 2)
    y = torch.zeros_like(x) if shared is None else shared.clone(memory_format=torch.contiguous_format)
    if M == 0:
        return y
    gpu, blocks = gpu_of(x.device), most_blocks(M, k, E, GROUP)
    numbers = {"dtype": torch.int32, "device": x.device}
    groups = torch.empty(blocks * GROUP, **numbers), torch.empty(blocks, **numbers), torch.empty(1, **numbers)
    decode_group(experts.to(torch.int32).contiguous(), *groups, E)
    h, z = x.new_empty(M * k, I), x.new_empty(M * k, D)
    decode_packed_grouped_experts(
        x, weights.contiguous(), y, groups=groups, gate_up=gate_up, down=down, shared=None, h=h, z=z,
        configs=grouped_configs(D, I, x.element_size(), gpu), upcast=x.device.type == "cpu", gpu=gpu,
    )  # fmt: skip
    return y


def _by_chunks(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: PackedStack,
    down: PackedStack,
    shared: torch.Tensor | None,
) -> torch.Tensor:
    D, (E, I), gpu = x.shape[1], (down.data.shape[0], gate_up.data.shape[1] // 2), gpu_of(x.device)
    position, offsets = expert_order(experts, E)
    rows = scatter_rows_fwd(x, position)  # [M k, D]
    buffer = x.new_empty(min(_CHUNK, E) * 2 * I * D)
    outputs, begin = torch.empty_like(rows), 0
    for first, end in zip(range(0, E, _CHUNK), [*offsets[_CHUNK - 1 :: _CHUNK].tolist(), rows.shape[0]]):
        count, ends = min(_CHUNK, E - first), offsets[first : first + _CHUNK] - begin
        if end > begin:
            dense = buffer[: count * 2 * I * D].view(2 * count, I, D)
            decode_dequantize(gate_up, dense, 2 * first, gpu)
            hidden = F.grouped_mm(rows[begin:end], dense.view(count, 2 * I, D).transpose(1, 2), offs=ends)
            activated = silu_mul_fwd(*hidden.chunk(2, dim=-1))
            dense = buffer[: count * D * I].view(count, D, I)
            decode_dequantize(down, dense, first, gpu)
            outputs[begin:end] = F.grouped_mm(activated, dense.transpose(1, 2), offs=ends)
        begin = end
    return combine_rows_fwd(outputs, position, weights, shared)


__all__ = ["quantised_experts", "quantised_experts_serve"]
