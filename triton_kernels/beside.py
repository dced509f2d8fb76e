"""What keeps a 16-bit parameter's lower bits beside it, so that small steps are not rounded away.

A rule sees the full value. BESIDE says how it is kept:

    ""            not at all: the stored parameter is the value
    master        a float32 copy
    remainder16   parameter and remainder make one float32: nothing is lost
    remainder8    the same with the lowest 8 bits rounded stochastically
    compensation  value = parameter + what rounding left of it, in bfloat16 (Kahan, CACM 1965)

A remainder is signed, so that the parameter is the nearest bfloat16 and not the one below: of two,
the one away from zero.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from .random import BFLOAT16_NAN, add
from .storage import narrow, widen

DTYPES = {
    "master": tl.float32,
    "remainder16": tl.int16,
    "remainder8": tl.int8,
    "compensation": tl.bfloat16,
}


@triton.jit
def upper_half(bits, is_nan):
    """The nearest bfloat16 of a float32's bits, away from zero if there are two."""
    rounded = tl.where(is_nan, BFLOAT16_NAN, add(bits, 0x8000) >> 16)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def join(param, beside, BESIDE: tl.constexpr):
    """float32: the full value of a stored parameter and what is beside it."""
    if BESIDE == "":
        return widen(param)
    elif BESIDE == "master":  # noqa: RET505 (Triton compiles what follows a return)
        return beside
    elif BESIDE == "compensation":
        return widen(param) + widen(beside)
    else:
        SHIFT: tl.constexpr = 0 if BESIDE == "remainder16" else 8
        upper = param.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        lower = beside.to(tl.int32).to(tl.uint32, bitcast=True) << SHIFT
        return add(upper, lower).to(tl.float32, bitcast=True)


@triton.jit
def split(x, random, DTYPE: tl.constexpr, BESIDE: tl.constexpr):
    """A value as a parameter of DTYPE and what is beside it.

    `random` has 8 bits for each element where BESIDE is "remainder8", and is not used elsewhere.
    """
    bits = x.to(tl.uint32, bitcast=True)
    is_nan = x != x
    if BESIDE == "master":
        return (upper_half(bits, is_nan) if DTYPE.is_bf16() else narrow(x, DTYPE)), x
    elif BESIDE == "remainder16":  # noqa: RET505 (Triton compiles what follows a return)
        return upper_half(bits, is_nan), tl.where(is_nan, 0, bits).to(tl.int16)
    elif BESIDE == "remainder8":
        # The lowest 8 bits are dropped, and change nothing in the upper half.
        bits = add(bits, random)
        return upper_half(bits, is_nan), tl.where(is_nan, 0, bits >> 8).to(tl.int8)
    else:
        param = narrow(x, DTYPE)
        left = x - widen(param)
        return param, narrow(tl.where(left - left == 0, left, 0.0), tl.bfloat16)
