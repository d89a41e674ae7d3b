"""Weights before training, of the layers that transformers doesn't know."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .kda_attention import KimiDeltaAttention, ShortConvolution
from .moe import KimiExperts, KimiTopkRouter


def initialise(module: nn.Module, std: float) -> None:
    """Fill the parameters that `module` itself holds, if it is of one of our classes.

    Args:
        module: of any class; others are left as they are.
        std: of the normal distribution that matrices are drawn from.
    """
    if isinstance(module, KimiDeltaAttention):
        # As fla: decay rates uniform in [1, 16], time steps log-uniform in [1e-3, 1e-1] after softplus.
        init.copy_(module.A_log, init.uniform_(module.A_log, a=1.0, b=16.0).log())
        init.uniform_(module.dt_bias, a=math.log(1e-3), b=math.log(1e-1))
        dt = module.dt_bias.exp().clamp_min(1e-4)
        init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    elif isinstance(module, ShortConvolution):
        bound = module.weight.shape[-1] ** -0.5  # nn.Conv1d's own, which fla keeps
        init.uniform_(module.weight, a=-bound, b=bound)
    elif isinstance(module, KimiExperts):
        init.normal_(module.gate_up_proj, mean=0.0, std=std)
        init.normal_(module.down_proj, mean=0.0, std=std)
    elif isinstance(module, KimiTopkRouter):
        init.normal_(module.weight, mean=0.0, std=std)
        init.zeros_(module.e_score_correction_bias)


__all__ = ["initialise"]
