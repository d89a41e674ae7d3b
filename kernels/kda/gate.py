"""
The gate of KDA, for the kernels.

    g_log2 = -exp(A_log) * softplus(logit + dt_bias) / ln 2      <= 0, exactly 0 at a logit of -inf (padding)
    beta   = sigmoid(logit)                                      exactly 0 at a logit of -inf

Decays live in base 2 because the hardware's exponential is exp2. Names used by all kernels of this folder:
B batch, T tokens, H heads, K and V head sizes, N packed sequences, C tokens per chunk; BK, BV their padded blocks.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    from ..gpu.optional_triton import tl, triton


@triton.jit
def kda_gate_log2(b_x, A):
    """Log2 decay of one step from the biased logit `b_x` (fp32) and A = exp(A_log); within [-48, 0]."""
    return kda_gate_log2_scaled(b_x * 1.4426950408889634, A)


@triton.jit
def kda_gate_log2_scaled(b_y, A):
    """
    The same from b_y = b_x / ln 2.

    softplus(x) / ln 2 = max(y, 0) + log2(1 + u), y = x / ln 2, u = 2^-|y|: relatively exact at both ends, where
    log2(1 + e^x) loses small e^x and overflows at large. log2(1 + u) / u on [0, 1] is a polynomial (minimax, 3e-8),
    half the cost of the library's log2.
    """
    b_u = tl.exp2(-tl.abs(b_y))
    b_p = 0.007550354581326246 * b_u - 0.04257207736372948
    b_p = b_p * b_u + 0.11286503821611404
    b_p = b_p * b_u - 0.19712725281715393
    b_p = b_p * b_u + 0.2756458520889282
    b_p = b_p * b_u - 0.3584098219871521
    b_p = b_p * b_u + 0.48069316148757935
    b_p = b_p * b_u - 0.7213402390480042
    b_p = b_p * b_u + 1.4426950216293335
    b_g_log2 = -A * (tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL) + b_u * b_p)
    # 2^-48 = 4e-15 of what was there is below every rounding around it. The bound keeps sums over steps precise, and
    # lets chunks with a few wild tokens take the fast path. NaN passes.
    return tl.where(b_g_log2 < -48.0, -48.0, b_g_log2)
