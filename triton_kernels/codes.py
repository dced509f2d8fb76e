"""States as codes of 8 bits in blocks with one scale each (Dettmers et al., arXiv 2110.02861).

The largest magnitude of a block is its scale. A magnitude a becomes t = a / scale * top + bias,
and a code is the leading bits of t as a float32: its exponent, counted from that of the bias, and 5
bits of its mantissa. KIND says what is coded:

    signed     bias 1/16, and a sign: first moments
    square     bias 1/256, of the root: second moments; what is above zero never becomes zero
    magnitude  bias 1/256, of a number that is not negative

A block with an infinity or a NaN becomes NaN; one whose scale is denormal becomes zero.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from .random import add

DTYPES = {"signed": tl.int8, "square": tl.uint8, "magnitude": tl.uint8}

BLOCK = tl.constexpr(64)  # neighbours in memory order
SHIFT = tl.constexpr(18)  # of a float32's 23 bits of mantissa 5 stay
HALF = tl.constexpr(1 << 17)
SIGNED_BIAS = tl.constexpr(1 / 16)
BIAS = tl.constexpr(1 / 256)
LAST = tl.constexpr(63 / 64)  # what the last code stands for
SIGNED_FIRST = tl.constexpr(0x3D800000 >> 18)  # the leading bits of the biases
FIRST = tl.constexpr(0x3B800000 >> 18)
INFINITY = tl.constexpr(0x7F800000)
SMALLEST_NORMAL = tl.constexpr(0x00800000)


@triton.jit
def decode(codes, scales, KIND: tl.constexpr):
    """float32 [blocks, BLOCK]: the numbers.

    Args:
        codes: int8 or uint8 [blocks, BLOCK].
        scales: float32 [blocks].
        KIND: what they are.
    """
    bias: tl.constexpr = SIGNED_BIAS if KIND == "signed" else BIAS
    first: tl.constexpr = SIGNED_FIRST if KIND == "signed" else FIRST
    unit = (scales * (1 / (LAST - bias)))[:, None]

    code = codes.to(tl.int32)
    magnitude = tl.abs(code) if KIND == "signed" else code
    t = ((magnitude + first) << SHIFT).to(tl.float32, bitcast=True)
    a = (t - bias) * unit
    if KIND == "signed":
        return tl.where(code < 0, -a, a)
    elif KIND == "square":  # noqa: RET505 (Triton compiles what follows a return)
        return a * a
    else:
        return a


@triton.jit
def encode(x, inside, KIND: tl.constexpr):
    """The codes and scales of numbers.

    Args:
        x: float32 [blocks, BLOCK].
        inside: which of them there are.
        KIND: what they are.

    Returns:
        int8 or uint8 [blocks, BLOCK], float32 [blocks].
    """
    bias: tl.constexpr = SIGNED_BIAS if KIND == "signed" else BIAS
    first: tl.constexpr = SIGNED_FIRST if KIND == "signed" else FIRST
    top: tl.constexpr = LAST - bias

    # As bits magnitudes keep their order, with a NaN above all.
    a = tl.sqrt_rn(x) if KIND == "square" else x
    magnitude = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.where(inside, magnitude, 0), 1)
    is_coded = (largest >= SMALLEST_NORMAL) & (largest < INFINITY)
    scale_bits = tl.where(largest < SMALLEST_NORMAL, 0, 0x7FC00000)
    scales = tl.where(is_coded, largest, scale_bits).to(tl.float32, bitcast=True)
    factor = tl.div_rn(tl.full(scales.shape, top, tl.float32), scales)

    t = magnitude.to(tl.float32, bitcast=True) * factor[:, None] + bias
    code = (add(t.to(tl.int32, bitcast=True), HALF) >> SHIFT) - first
    if KIND == "signed":
        code = tl.where(x < 0, -code, code)
    else:
        code = tl.where((code == 0) & (magnitude != 0), 1, code)
    code = tl.where(is_coded[:, None], code, 0)
    return code.to(tl.int8 if KIND == "signed" else tl.uint8), scales
