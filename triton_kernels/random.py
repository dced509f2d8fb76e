"""Random bits for stochastic rounding: a function of key, step and element, the same on any engine.

A counter is mixed by two rounds of multiply and xor-shift (the constants of lowbias32, Chris
Wellons), with a second word of the key between them. All arithmetic is modulo 2^32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

BFLOAT16_NAN = tl.constexpr(0x7FC0)


@triton.jit
def add(x, y):
    """The sum modulo 2^32."""
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def multiply(x, y):
    """The product modulo 2^32."""
    return tl.mul(x, y, sanitize_overflow=False)


@triton.jit
def mix(x):
    """Every bit of the result depends on all bits of x."""
    x = multiply(x ^ (x >> 16), 0x7FEB352D)
    x = multiply(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


@triton.jit
def stream(seed, upper, key_upper):
    """The two words of the elements whose global indices have these upper 32 bits."""
    first = mix(add(seed, upper))
    return first, mix(first ^ key_upper)


@triton.jit
def scramble(lower, first, second):
    """The words whose indices have these lower 32 bits, of a `stream`."""
    x = lower ^ first
    x = multiply(x ^ (x >> 16), 0x7FEB352D)
    x = add(x ^ (x >> 15), second)
    x = multiply(x, 0x846CA68B)
    return x ^ (x >> 16)


@triton.jit
def draw(key, step, begin, position):
    """uint32: random words.

    Args:
        key: int64, of the tensor; all of its bits count.
        step: uint32, steps taken before this one.
        begin: int64, the global index of a word.
        position: int32, of the words from there.
    """
    begin_lower = begin.to(tl.uint32)
    lower = add(begin_lower, position.to(tl.uint32))

    # A block may pass one multiple of 2^32. Scalars cost nearly nothing, so there are two streams.
    seed = mix(add(key.to(tl.uint32), step))
    upper = (begin >> 32).to(tl.uint32)
    key_upper = (key >> 32).to(tl.uint32)
    first, second = stream(seed, upper, key_upper)
    next_first, next_second = stream(seed, add(upper, 1), key_upper)
    passed = lower < begin_lower
    first, second = tl.where(passed, next_first, first), tl.where(passed, next_second, second)
    return scramble(lower, first, second)


@triton.jit
def draw_at(key, step, index):
    """As `draw`, of words whose global indices, int64, need not follow one another."""
    seed = mix(add(key.to(tl.uint32), step))
    first, second = stream(seed, (index >> 32).to(tl.uint32), (key >> 32).to(tl.uint32))
    return scramble(index.to(tl.uint32), first, second)


@triton.jit
def draw_shared(key, step, begin, position, BITS: tl.constexpr):
    """The word of each element, which 32 / BITS neighbours share, and the place of its bits there.

    Args:
        key: see `draw`.
        step: see `draw`.
        begin: int64, the global index of an element.
        position: int32, of the elements from there.
        BITS: 8 or 16, for each element.
    """
    SHARE: tl.constexpr = 32 // BITS
    POWER: tl.constexpr = 1 if BITS == 16 else 2
    place = (begin & (SHARE - 1)).to(tl.int32) + position
    word = draw(key, step, begin >> POWER, place >> POWER)
    return word, ((place & (SHARE - 1)) * BITS).to(tl.uint32)


@triton.jit
def draw_shared_at(key, step, number, BITS: tl.constexpr):
    """As `draw_shared`, of elements whose global indices, int64, need not follow one another."""
    SHARE: tl.constexpr = 32 // BITS
    POWER: tl.constexpr = 1 if BITS == 16 else 2
    word = draw_at(key, step, number >> POWER)
    return word, ((number & (SHARE - 1)) * BITS).to(tl.uint32)


@triton.jit
def word_of_state(word, K: tl.constexpr):
    """What rounds state K where `word` rounds the parameter."""
    odd: tl.constexpr = 0x9E3779B1 if K == 0 else (0x85EBCA77 if K == 1 else 0xC2B2AE3D)
    product = multiply(word, odd)
    return product ^ (product >> 16)  # whose lower half alone would follow from the word's


@triton.jit
def narrow_randomly(x, random):
    """float32 as bfloat16: up with the probability of what is cut off; `random` has 16 bits."""
    bits = add(x.to(tl.uint32, bitcast=True), random) >> 16
    bits = tl.where(x != x, BFLOAT16_NAN, bits)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
