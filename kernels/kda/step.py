"""
KDA decode step: a few tokens (usually one) from cached state, everything between the projections and o_proj in one
launch.

For each row b, head h and token t = 0 .. lengths[b] - 1, with raw projections x, logits f, beta, gate:

    q, k, v = silu(sum_i w[:, W-1-i] x_{t-i})     depthwise causal convolution, earlier inputs from the window
    q, k    = q / sqrt(|q|^2 + 1e-6) scale, k / sqrt(|k|^2 + 1e-6)
    S       = diag(exp2(g_log2)) S                g_log2 = -exp(A_log) softplus(f + dt_bias) / ln 2
    S       = S + k (sigmoid(beta) (v - S^T k))^T
    o       = S^T q
    y_t     = o / sqrt(mean(o^2) + eps) weight sigmoid(gate)

State S [B, H, K, V] fp32 and windows [B, channels, W-1] (oldest first) are updated in place. Nothing is rounded between
the inputs and y. Kimi Linear, arXiv 2510.26692, eqs. 1 and 10. Rows with lengths[b] = 0 keep state and windows; outputs
after lengths[b] are 0.

One program per row and head keeps the head's state in registers: the windows and the norm over V need the whole head.

The decode path's captured graph gives a table [4] int64 in device memory in place of state and windows: the addresses
of a cache's state, of its one window tensor [B, H (2 K + V), W-1] (q, k and v in this order), and of a recording
[B, >= T, H (3 K + V) + H] that takes the raw inputs q, k, v, f, beta of each token, or 0; and the elements between
the recording's sequences.
"""

import torch

from ..gpu.arithmetic import sigmoid
from ..gpu.launching import launch_options, overlap_options
from ..gpu.sizes import power_of_two
from .configs import KdaStepConfig
from .gate import kda_gate_log2

# New tokens of a row over a cached state that are stepped through one after the other, in the layers and in captured
# steps; the chunked form begins to win about here. A recording keeps a checkpoint as often.
MAX_NEW_TOKENS = 16

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def kda_tap(p_x, p_window, i_x, stride_xt, m_d, W: tl.constexpr):
    """Convolution input at time `i_x` of this call, fp32 [channels]; negative times are in the window."""
    b_i = i_x + m_d.to(tl.int32) * 0  # as a vector: the interpreter's "and" of a mask and a scalar is no mask
    b_new = tl.load(p_x + i_x * stride_xt, mask=m_d & (b_i >= 0), other=0.0).to(tl.float32)
    b_old = tl.load(p_window + (W - 1 + i_x), mask=m_d & (b_i < 0), other=0.0).to(tl.float32)
    return b_new + b_old


@triton.jit
def kda_conv(p_x, p_window, p_weight, i_t, stride_xt, m_d, W: tl.constexpr):
    """silu of the convolution at token `i_t`, fp32 [channels]."""
    b_y = tl.zeros(m_d.shape, tl.float32)
    for i in tl.static_range(0, W):
        b_w = tl.load(p_weight + (W - 1 - i), mask=m_d, other=0.0).to(tl.float32)
        b_y += b_w * kda_tap(p_x, p_window, i_t - i, stride_xt, m_d, W)
    return b_y * sigmoid(b_y)


@triton.jit
def kda_token(
    p_q, p_k, p_v, p_wq, p_wk, p_wv, p_weight_q, p_weight_k, p_weight_v, p_f, p_beta, p_gate,
    i_t, stride_qt, stride_kt, stride_vt, stride_ft, stride_bt, stride_gt, m_k, m_v, W: tl.constexpr,
):  # fmt: skip
    """What token `i_t` brings: q, k, v after their convolutions, and the logits f, beta, gate; fp32."""
    return (
        kda_conv(p_q, p_wq, p_weight_q, i_t, stride_qt, m_k, W),
        kda_conv(p_k, p_wk, p_weight_k, i_t, stride_kt, m_k, W),
        kda_conv(p_v, p_wv, p_weight_v, i_t, stride_vt, m_v, W),
        tl.load(p_f + i_t * stride_ft, mask=m_k, other=0.0).to(tl.float32),
        tl.load(p_beta + i_t * stride_bt).to(tl.float32),
        tl.load(p_gate + i_t * stride_gt, mask=m_v, other=0.0).to(tl.float32),
    )


@triton.jit
def kda_window_after(p_x, p_window, n_t, stride_xt, m_d, W: tl.constexpr, BW: tl.constexpr):
    """The window after `n_t` > 0 tokens [channels, BW]: slot i takes what is n_t later, of inputs or window."""
    i_x = (n_t - (W - 1) + tl.arange(0, BW))[None, :]
    m_x = m_d[:, None] & (i_x < n_t)
    b_new = tl.load(p_x[:, None] + i_x * stride_xt, mask=m_x & (i_x >= 0), other=0.0)
    b_old = tl.load(p_window[:, None] + (W - 1 + i_x), mask=m_x & (i_x < 0), other=0.0)
    return tl.where(i_x >= 0, b_new.to(b_old.dtype), b_old)


@triton.jit
def kda_store_window(p_window, b_window, m_d, W: tl.constexpr, BW: tl.constexpr):
    """The counterpart of kda_window_after."""
    o_i = tl.arange(0, BW)[None, :]
    tl.store(p_window[:, None] + o_i, b_window, mask=m_d[:, None] & (o_i < W - 1))


@triton.jit
def kda_record(p_record, p_x, o_d, m_d):
    """Copy a head's channels as they are."""
    tl.store(p_record + o_d, tl.load(p_x, mask=m_d, other=0.0), mask=m_d)


# Strides between batch rows may depend on T: no version is compiled for a kind of them.
@triton.jit(
    do_not_specialize=[
        "T", "stride_qb", "stride_kb", "stride_vb", "stride_fb", "stride_bb", "stride_gb",
        "stride_wqb", "stride_wkb", "stride_wvb",
    ]
)  # fmt: skip
def kda_step_fwd_kernel(
    q, k, v, f, beta, gate, o,
    weight_q, weight_k, weight_v, window_q, window_k, window_v,
    A_log, dt_bias, norm_weight, state, lengths,
    scale, eps, T,
    stride_qb: tl.int64, stride_qt, stride_kb: tl.int64, stride_kt, stride_vb: tl.int64, stride_vt,
    stride_fb: tl.int64, stride_ft, stride_bb: tl.int64, stride_bt, stride_gb: tl.int64, stride_gt,
    stride_wqb: tl.int64, stride_wkb: tl.int64, stride_wvb: tl.int64,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_TABLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """
    See the module docstring. q, k, v, f, gate are [B, T, H * size], beta [B, T, H], last dimension dense; o
    contiguous.
    """
    i_b, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    record, record_stride = i_b * 0, i_b * 0
    if HAS_TABLE:
        record, record_stride = tl.load(state + 2), tl.load(state + 3)
        window_q = tl.load(state + 1).to(tl.pointer_type(q.dtype.element_ty))
        window_k = window_q + H * K * (W - 1)
        window_v = window_k + H * K * (W - 1)
        state = tl.multiple_of(tl.load(state).to(tl.pointer_type(tl.float32)), 16)
    # What no launch of the same step writes is loaded ahead (PDL, see decode_linear).
    p_s = state + (i_b * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
    if PDL:
        b_s = tl.load(p_s, mask=m_k[:, None] & m_v[None, :], other=0.0)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_t = T
    if HAS_LENGTHS:
        n_t = tl.minimum(tl.load(lengths + i_b).to(tl.int32), T)
    o += i_b * T * (H * V) + i_h * V
    for i_t in range(n_t, T):
        tl.store(o + i_t * (H * V) + o_v, tl.zeros([BV], o.dtype.element_ty), mask=m_v)
    if n_t <= 0:
        return

    o_dk, o_dv = i_h * K + o_k, i_h * V + o_v
    p_q, p_wq = q + i_b * stride_qb + o_dk, window_q + i_b * stride_wqb + o_dk * (W - 1)
    p_k, p_wk = k + i_b * stride_kb + o_dk, window_k + i_b * stride_wkb + o_dk * (W - 1)
    p_v, p_wv = v + i_b * stride_vb + o_dv, window_v + i_b * stride_wvb + o_dv * (W - 1)
    f += i_b * stride_fb
    beta += i_b * stride_bb + i_h
    gate += i_b * stride_gb
    a_head = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    b_bias = tl.load(dt_bias + o_dk, mask=m_k, other=0.0).to(tl.float32)
    b_norm = tl.load(norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32)

    b_q, b_k, b_v, b_f, b_beta, b_gate = kda_token(
        p_q, p_k, p_v, p_wq, p_wk, p_wv, weight_q + o_dk * W, weight_k + o_dk * W, weight_v + o_dv * W,
        f + o_dk, beta, gate + o_dv, 0,
        stride_qt, stride_kt, stride_vt, stride_ft, stride_bt, stride_gt, m_k, m_v, W,
    )  # fmt: skip
    if not PDL:
        # After the loads of the first token: its convolutions then run while the state is being loaded.
        b_s = tl.load(p_s, mask=m_k[:, None] & m_v[None, :], other=0.0)
    b_wq = kda_window_after(p_q, p_wq, n_t, stride_qt, m_k, W, BW)
    b_wk = kda_window_after(p_k, p_wk, n_t, stride_kt, m_k, W, BW)
    b_wv = kda_window_after(p_v, p_wv, n_t, stride_vt, m_v, W, BW)
    for i_t in range(0, n_t):
        b_beta = sigmoid(b_beta)
        b_q *= tl.rsqrt(tl.sum(b_q * b_q, axis=0) + 1e-6) * scale
        b_k *= tl.rsqrt(tl.sum(b_k * b_k, axis=0) + 1e-6)
        b_qk = tl.sum(b_q * b_k, axis=0)
        b_s *= tl.exp2(kda_gate_log2(b_f + b_bias, a_head))[:, None]
        # One pass over the decayed state for prediction and output: S^T q of the new state is S^T q + (q.k) u of the
        # old.
        b_u = b_beta * (b_v - tl.sum(b_s * b_k[:, None], axis=0))
        b_o = tl.sum(b_s * b_q[:, None], axis=0) + b_qk * b_u
        b_s += b_k[:, None] * b_u[None, :]
        if i_t + 1 == n_t:  # on its way while the output is summed up
            tl.store(p_s, b_s, mask=m_k[:, None] & m_v[None, :])
        b_o *= tl.rsqrt(tl.sum(b_o * b_o, axis=0) / V + eps)
        b_o *= b_norm * sigmoid(b_gate)
        tl.store(o + i_t * (H * V) + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
        if i_t + 1 < n_t:
            b_q, b_k, b_v, b_f, b_beta, b_gate = kda_token(
                p_q, p_k, p_v, p_wq, p_wk, p_wv, weight_q + o_dk * W, weight_k + o_dk * W, weight_v + o_dv * W,
                f + o_dk, beta, gate + o_dv, i_t + 1,
                stride_qt, stride_kt, stride_vt, stride_ft, stride_bt, stride_gt, m_k, m_v, W,
            )  # fmt: skip

    if record != 0:  # after the output: its loads are in the L1 by now
        p_record = record.to(tl.pointer_type(q.dtype.element_ty)) + i_b * record_stride
        for i_t in range(0, n_t):
            kda_record(p_record, p_q + i_t * stride_qt, o_dk, m_k)
            kda_record(p_record + H * K, p_k + i_t * stride_kt, o_dk, m_k)
            kda_record(p_record + 2 * H * K, p_v + i_t * stride_vt, o_dv, m_v)
            kda_record(p_record + H * (2 * K + V), f + i_t * stride_ft + o_dk, o_dk, m_k)
            tl.store(p_record + H * (3 * K + V) + i_h, tl.load(beta + i_t * stride_bt))
            p_record += H * (3 * K + V) + H

    tl.debug_barrier()  # all read before any is written: other threads may read what this one writes
    kda_store_window(p_wq, b_wq, m_k, W, BW)
    kda_store_window(p_wk, b_wk, m_k, W, BW)
    kda_store_window(p_wv, b_wv, m_v, W, BW)


def kda_step_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    f: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    o: torch.Tensor,
    *,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    windows: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    state: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    eps: float,
    config: KdaStepConfig,
    pdl: bool = False,
) -> None:
    """
    Launch; shapes as in the module docstring, o [B, T, H, V] contiguous, state and windows written in place.

    Windows are dense in their last two dimensions. With `windows` None, `state` is the table of the module docstring.
    pdl: launch programmatically dependent (see decode_linear).
    """
    (B, T, H, V), K = o.shape, q.shape[2] // o.shape[2]
    W = weights[0].shape[-1]
    strides = [H * (2 * K + V) * (W - 1)] * 3 if windows is None else [window.stride(0) for window in windows]
    kda_step_fwd_kernel[(B * H,)](
        q, k, v, f, beta, gate, o,
        *weights, *(windows or [None] * 3),
        A_log, dt_bias, norm_weight, state, lengths,
        scale, eps, T,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *f.stride()[:2], *beta.stride()[:2], *gate.stride()[:2],
        *strides,
        H=H, K=K, V=V, W=W, BW=power_of_two(W - 1),
        BK=config.BK, BV=config.BV, HAS_LENGTHS=lengths is not None, HAS_TABLE=windows is None,
        PDL=pdl, **launch_options(config), **overlap_options(pdl),
    )  # fmt: skip
