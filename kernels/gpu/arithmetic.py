"""Device functions that several kernels share: the logistic function, and a matrix product in a stated precision."""

try:
    import triton
    import triton.language as tl
except ImportError:
    from .optional_triton import tl, triton


@triton.jit
def kda_sigmoid(b_x):
    """Logistic function in fp32; 0 at -inf."""
    return 1.0 / (1.0 + tl.exp2(b_x * -1.4426950408889634))


@triton.jit
def kda_dot(b_x, b_y, b_acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """
    `b_acc + b_x @ b_y` with operands rounded to DTYPE and an fp32 sum.

    PRECISION matters for fp32 operands only. UPCAST serves Triton's interpreter, whose bf16 product is wrong: the
    operands keep their bf16 values and are multiplied in fp32.
    """
    b_x = b_x.to(DTYPE)
    b_y = b_y.to(DTYPE)
    if UPCAST:
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, acc=b_acc, input_precision=PRECISION)
