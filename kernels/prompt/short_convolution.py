"""The short convolution before KDA: depthwise, causal, with SiLU (arXiv 2510.26692, section 4; docs/checkpoint.md)."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..gpu.availability import fused_path_serves
from ..kda.checks import check_cu_seqlens
from .short_convolution_kernel import MAX_WIDTH, short_conv_fwd

# Elements of x whose fp32 copies exist at the same time: 2048 tokens of 32 heads of 128.
_PIECE_ELEMENTS = 2048 * 32 * 128


def causal_short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    window: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = silu(sum_i weight[W - 1 - i] * x_{t - i}), accumulated in fp32 (float64 for float64 x) and rounded once.

    Args:
        x: [B, T, D], any strides, T >= 0.
        weight: [D, 1, W]; tap W - 1 meets the current token.
        window: [B, D, W - 1], the inputs before x, oldest first; None for zeros. With `cu_seqlens`, one per
            sequence: [N, D, W - 1].
        lengths: [B], valid tokens at the front of each row, 0 to T; what is after them does not enter the new window.
        cu_seqlens: [N + 1] boundaries of packed sequences (B must be 1), which may be empty; excludes `lengths`. Where
            the fused kernel serves, they are read on the device and their values are not checked.

    Returns:
        y [B, T, D] in x's dtype, and the window after the (valid) tokens in x's dtype, a fresh tensor.

    Raises:
        ValueError: if shapes, dtypes, devices or boundaries don't fit.
    """
    fused = _fused_serves(x, weight, window)
    if cu_seqlens is not None and not fused:
        cu_seqlens = cu_seqlens.cpu()
    _check_inputs(x, weight, window, lengths, cu_seqlens)
    if fused:
        return short_conv_fwd(x, weight, None if window is None else window.to(x.dtype), lengths, cu_seqlens)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if window is None:
        window = x.new_zeros(rows, x.shape[2], weight.shape[2] - 1)
    window = window.to(x.dtype).transpose(1, 2)  # [N, W - 1, D]
    if cu_seqlens is None:
        y, new_window = _convolve(x, weight, window)
        if lengths is not None:
            new_window = _window_after(x, window, lengths)
    else:
        windows, outputs = list(window.split(1)), [x[:, :0]]
        for n, part in enumerate(x.split(cu_seqlens.diff().tolist(), dim=1)):
            y, windows[n] = _convolve(part, weight, windows[n])
            outputs.append(y)
        y, new_window = torch.cat(outputs, dim=1), torch.cat([window[:0], *windows])
    return y, new_window.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _fused_serves(x: torch.Tensor, weight: torch.Tensor, window: torch.Tensor | None) -> bool:
    fits = x.ndim == 3 and weight.ndim == 3 and weight.shape[2] <= MAX_WIDTH
    return fits and fused_path_serves(x, weight, window, differentiable=window is None)


def _convolve(x: torch.Tensor, weight: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [B, T, D], the last W - 1 inputs [B, W - 1, D]), piece by piece."""
    tokens = max(_PIECE_ELEMENTS // max(x.shape[0] * x.shape[2], 1), 1)
    if x.shape[1] <= tokens:
        return _convolve_piece(x, weight, window)
    # Autograd would keep W fp32 copies of x for the gradient of the taps.
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or window.requires_grad)
    outputs = []
    for part in x.split(tokens, dim=1):
        if needs_grad:
            y, window = checkpoint(_convolve_piece, part, weight, window, use_reentrant=False, preserve_rng_state=False)
        else:
            y, window = _convolve_piece(part, weight, window)
        outputs.append(y)
    return torch.cat(outputs, dim=1), window


def _convolve_piece(x: torch.Tensor, weight: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length, width = x.shape[1], window.shape[1]
    padded = torch.cat([window, x], dim=1)  # [B, W - 1 + T, D]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight[:, 0].to(dtype)  # [D, W]
    y = padded[:, width:].to(dtype) * taps[:, width]
    for i in range(width):
        y = torch.addcmul(y, padded[:, i : i + length].to(dtype), taps[:, i])
    return F.silu(y).to(x.dtype), padded[:, length:]


def _window_after(x: torch.Tensor, window: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The W - 1 inputs before position `lengths` [B] of each row, [B, W - 1, D]; before x, those of the window."""
    width = window.shape[1]
    if x.shape[1] == 0:
        return window
    position = (lengths.to(torch.int64)[:, None] - width + torch.arange(width, device=x.device))[..., None]
    from_x = x.take_along_dim(position.clamp(min=0), dim=1)
    from_window = window.take_along_dim((position + width).clamp(max=width - 1), dim=1)
    return torch.where(position >= 0, from_x, from_window)


def _check_inputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    window: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point [B, T, D], got {x.dtype} {list(x.shape)}")
    batch, length, channels = x.shape
    if weight.ndim != 3 or weight.shape[0] != channels or weight.shape[1] != 1 or weight.shape[2] < 1:
        raise ValueError(
            f"weight must be [D, 1, W] = [{channels}, 1, W] beside x {list(x.shape)}, got {list(weight.shape)}"
        )
    rows = batch
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths and cu_seqlens exclude each other, got both")
        check_cu_seqlens(cu_seqlens, batch, length)
        rows = cu_seqlens.shape[0] - 1
    wanted = [rows, channels, weight.shape[2] - 1]
    if window is not None and list(window.shape) != wanted:
        raise ValueError(f"window must be [N, D, W - 1] = {wanted}, got {list(window.shape)}")
    if lengths is not None and (list(lengths.shape) != [batch] or lengths.is_floating_point()):
        raise ValueError(f"lengths must be integers [B] = [{batch}], got {lengths.dtype} {list(lengths.shape)}")
    for name, tensor in {"weight": weight, "window": window, "lengths": lengths}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {tensor.device}")


__all__ = ["causal_short_conv"]
