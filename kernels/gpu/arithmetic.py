"""Device functions that several kernels share: the logistic function, and matrix products in a stated precision."""

try:
    import triton
    import triton.language as tl
except ImportError:
    from .optional_triton import tl, triton


@triton.jit
def sigmoid(b_x):
    """Logistic function in fp32; 0 at -inf."""
    return 1.0 / (1.0 + tl.exp2(b_x * -1.4426950408889634))


@triton.jit
def rounded_dot(b_x, b_y, b_acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
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


@triton.jit
def rounded_operand(b_x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """
    `b_x` as a product with operands of DTYPE and PRECISION sees it.

    What is multiplied both in a product and outside of it goes through here first: sums that cancel between the two
    then cancel to fp32.
    """
    if tl.float32 == DTYPE and PRECISION == "tf32":
        b_bits = b_x.to(tl.int32, bitcast=True)
        return ((b_bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_x.to(DTYPE)
