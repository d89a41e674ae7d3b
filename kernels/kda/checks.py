"""Input checks shared by every KDA backend: ValueErrors that say what was seen and what was wanted."""

import torch


def check_kda_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit `q` [B, T, H, K].

    The values of `cu_seqlens` are checked if it is on the CPU; reading them back from a GPU would wait for it.
    """
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q must be a floating-point [B, T, H, K], got {q.dtype} {list(q.shape)}")
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[-1] if v.ndim == 4 else "V"
    wanted = {
        "k": (k, [batch, length, heads, key_dim]),
        "v": (v, [batch, length, heads, value_dim]),
        "g": (g, [batch, length, heads, key_dim]),
        "beta": (beta, [batch, length, heads]),
    }
    for name, (x, shape) in wanted.items():
        if list(x.shape) != shape:
            raise ValueError(f"{name} must be {shape} beside q {list(q.shape)}, got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} as q is, got {x.dtype}")
    if A_log.numel() != heads:
        raise ValueError(f"A_log must have one element for each of {heads} heads, got shape {list(A_log.shape)}")
    if dt_bias.numel() != heads * key_dim:
        raise ValueError(f"dt_bias must have H * K = {heads * key_dim} elements, got shape {list(dt_bias.shape)}")
    rows = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        rows = cu_seqlens.shape[0] - 1
    beside_q = {"k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    if initial_state is not None:
        shape = [rows, heads, key_dim, value_dim]
        if list(initial_state.shape) != shape:
            raise ValueError(f"initial_state must be [N, H, K, V] = {shape}, got {list(initial_state.shape)}")
        beside_q["initial_state"] = initial_state
    for name, x in beside_q.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {x.device}")


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, length: int, name: str = "cu_seqlens") -> None:
    """Raise ValueError unless `cu_seqlens` [N + 1] fits an input of `batch` rows of `length` tokens; values: on CPU.

    `name` is what the caller calls it.
    """
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        seen = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise ValueError(f"{name} must be an integer tensor (int32 or int64) [N + 1], got {seen}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{name} must be [N + 1] and rise from 0 to the number of tokens {length}, got {cu_seqlens.tolist()}"
        )
    if batch != 1:
        raise ValueError(f"packed sequences ({name}) need a batch of one row, got {batch} rows; lay them end to end")
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ValueError(f"{name} must rise from 0 to the number of tokens {length}, got {ends}")


__all__ = ["check_cu_seqlens", "check_kda_inputs"]
