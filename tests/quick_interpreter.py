"""
Triton's interpreter without the work that it repeats: what it computes stays, bit for bit.

Of the interpreter's time a third went to three repetitions. Each call of a device function replaces the functions of
triton.language by interpreted ones, though the launch around it has done so; each value looks its NumPy type up in a
table that is built for the question; and each value wraps its shape anew.
"""

import functools
import math

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# The version whose private functions these are. Another one runs as it is.
WRITTEN_FOR = "3.9"


def quicken() -> None:
    """Do each of the three once: the replacing per module of device functions, the others per type and per shape."""
    if not triton.__version__.startswith(WRITTEN_FOR):
        return
    look_up, replaced = functools.cache(interpreter._get_np_dtype), set()

    def numpy_type(triton_type):
        # A block's is that of its elements; blocks and pointers can't be looked up in a dictionary.
        element = triton_type.scalar
        return np.dtype(np.uint64) if element.is_ptr() else look_up(element)

    @functools.cache
    def wrapped(shape):
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])

    def tensor(self, handle, triton_type):
        self.handle, self.type, self.dtype = handle, triton_type, triton_type.scalar
        self.numel, self.shape = wrapped(triton_type.shape if triton_type.is_block() else ())

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module not in replaced:
            # Once, for modules that call triton.language.core: a launch replaces the functions of triton.language only,
            # and what a device function replaces stays.
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._get_np_dtype = numpy_type
    tl.tensor.__init__ = tensor
    interpreter.InterpretedFunction.__call__ = call
