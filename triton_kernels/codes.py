"""States as codes of 8 bits in blocks with one scale each (Dettmers et al., arXiv 2110.02861).

The largest magnitude of a block is its scale. A magnitude a becomes t = a / scale * top + bias,
and a code is the leading bits of t as a float32: its exponent, counted from that of the bias, and
some bits of its mantissa. KIND says what is coded:

    signed     bias 2^-4,   4 binades of 32 steps, and a sign: first moments
    square     bias 2^-16, 16 binades of 16 steps: second moments; what is above zero never becomes
               zero
    magnitude  bias 2^-8,   8 binades of 32 steps: what is not negative

A block with a NaN, an infinity or 2^127 becomes NaN; one whose scale is denormal becomes zero.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from .random import add

DTYPES = {"signed": tl.int8, "square": tl.uint8, "magnitude": tl.uint8}

BLOCK = tl.constexpr(64)  # neighbours in memory order
# Of each kind the bits of a float32's mantissa that a code lacks, the bias, its leading bits, and
# what the last code stands for.
SIGNED = tl.constexpr((18, 2.0**-4, 0x3D800000 >> 18, 63 / 64))
SQUARE = tl.constexpr((19, 2.0**-16, 0x37800000 >> 19, 31 / 32))
MAGNITUDE = tl.constexpr((18, 2.0**-8, 0x3B800000 >> 18, 63 / 64))
TOO_LARGE = tl.constexpr(0x7F000000)  # 2^127
SMALLEST_NORMAL = tl.constexpr(0x00800000)


@triton.jit
def decode(codes, scales, KIND: tl.constexpr):
    """float32 [blocks, BLOCK]: the numbers.

    Args:
        codes: int8 or uint8 [blocks, BLOCK].
        scales: float32 [blocks].
        KIND: what they are.
    """
    CODE: tl.constexpr = SIGNED if KIND == "signed" else SQUARE if KIND == "square" else MAGNITUDE
    shift: tl.constexpr = CODE[0]
    bias: tl.constexpr = CODE[1]
    first: tl.constexpr = CODE[2]
    top: tl.constexpr = CODE[3] - CODE[1]
    unit = (scales * (1 / top))[:, None]

    code = codes.to(tl.int32)
    magnitude = tl.abs(code) if KIND == "signed" else code
    t = ((magnitude + first) << shift).to(tl.float32, bitcast=True)
    a = (t - bias) * unit
    return tl.where(code < 0, -a, a) if KIND == "signed" else a


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
    CODE: tl.constexpr = SIGNED if KIND == "signed" else SQUARE if KIND == "square" else MAGNITUDE
    shift: tl.constexpr = CODE[0]
    bias: tl.constexpr = CODE[1]
    first: tl.constexpr = CODE[2]
    top: tl.constexpr = CODE[3] - CODE[1]

    # As bits magnitudes keep their order, with a NaN above all.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.where(inside, magnitude, 0), 1)
    is_coded = (largest >= SMALLEST_NORMAL) & (largest < TOO_LARGE)
    scale_bits = tl.where(largest < SMALLEST_NORMAL, 0, 0x7FC00000)
    scales = tl.where(is_coded, largest, scale_bits).to(tl.float32, bitcast=True)
    factor = tl.div_rn(tl.full(scales.shape, top, tl.float32), scales)

    t = magnitude.to(tl.float32, bitcast=True) * factor[:, None] + bias
    code = (add(t.to(tl.int32, bitcast=True), 1 << (shift - 1)) >> shift) - first
    if KIND == "signed":
        code = tl.where(x < 0, -code, code)
    else:
        code = tl.where((code == 0) & (magnitude != 0), 1, code)
    code = tl.where(is_coded[:, None], code, 0)
    return code.to(tl.int8 if KIND == "signed" else tl.uint8), scales
