"""RMS norms: the plain one of the residual stream and the gated one after KDA."""

import torch
from torch import nn

from ...kernels.gpu.availability import fused_path_serves
from ...kernels.prompt.norms import add_rms_norm_fwd, gated_rms_norm_fwd, rms_norm_fwd
from ..plain_modules import Noticing, reads_weights


@reads_weights
class KimiRMSNorm(Noticing):
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x.dtype, then times the weight (the released order of rounding)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Norm of `hidden_states`, or of `residual + hidden_states`.

        Args:
            hidden_states: [..., hidden_size].
            residual: the same shape and dtype, or None.

        Returns:
            The norm, in the same shape and dtype; with `residual`, (the norm, the sum it was taken of).
        """
        if self._takes_fused(hidden_states, residual):
            if residual is None:
                return rms_norm_fwd(hidden_states, self.weight, self.variance_epsilon)
            return add_rms_norm_fwd(hidden_states, residual, self.weight, self.variance_epsilon)
        if residual is not None:
            hidden_states = residual + hidden_states
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        normed = self.weight * x.to(hidden_states.dtype)
        return normed if residual is None else (normed, hidden_states)

    def _takes_fused(self, hidden_states: torch.Tensor, other: torch.Tensor | None) -> bool:
        same_dtype = all(x.dtype == hidden_states.dtype for x in (self.weight, other) if x is not None)
        return same_dtype and fused_path_serves(hidden_states, other, self.weight, differentiable=True)

    def extra_repr(self) -> str:
        """Shape and epsilon for print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


@reads_weights
class KimiRMSNormGated(KimiRMSNorm):
    """RMSNorm(x) * weight * sigmoid(gate), all in fp32 with one rounding at the end (arXiv 2510.26692, eq. 10)."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] and a gate of the same shape -> the same shape and dtype."""
        if self._takes_fused(hidden_states, gate):
            return gated_rms_norm_fwd(hidden_states, gate, self.weight, self.variance_epsilon)
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * x * gate.float().sigmoid()).to(hidden_states.dtype)


__all__ = ["KimiRMSNorm", "KimiRMSNormGated"]
