"""NumPy reference of the storage formats: what low-precision training keeps of params and states.

Written from the contract alone, like `fused_adamw.reference`, whose rules see binary32 whatever the
format: a format only says how numbers are decoded before a rule and encoded after it. Decoding and
encoding take ``+ - * /``, the square root, comparisons and operations on bits.

- Rounding to bfloat16 is stochastic on request, which is unbiased: small steps act in expectation
  (Gupta et al., arXiv 1502.02551). Its random bits are a hash of the seed, the parameter, the step
  and the element's index.
- Beside a 16-bit param there may be an array that keeps what the param has no room for; `BESIDES`.
  Compensation is that of Kahan, Further remarks on reducing truncation errors, CACM 8(1), 1965.
- States may be codes of 8 bits in blocks with one scale each (Dettmers et al., arXiv 2110.02861);
  `encode` says how they are spaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fused_adamw.reference import Array, load, store

UInt32s = NDArray[np.uint32]
Floats = NDArray[np.float32]

# --- Random bits ---------------------------------------------------------------------------------


def _splitmix64(z: int) -> int:
    """The generator of Steele, Lea & Flood, OOPSLA 2014: its first number from state ``z``."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def key_of(seed: int, number: int) -> int:
    """The 64-bit key of a parameter's random bits.

    Args:
        seed: of the whole training; taken modulo 2^64.
        number: of the parameter, counted over all param groups.
    """
    return _splitmix64(_splitmix64(seed) + number)


def mix32(x: UInt32s) -> UInt32s:
    """A bijection in which each bit depends on every bit: lowbias32 of Chris Wellons."""
    x = x ^ x >> np.uint32(16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ x >> np.uint32(15)
    x = x * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def random_words(key: int, indices: Array, step: int) -> UInt32s:
    """Words of 32 bits, which neither chunks nor shards nor the other words decide.

    Args:
        key: see `key_of`.
        indices: integers, at least 0: of the words.
        step: number of steps taken before this one; taken modulo 2^32.

    Returns:
        Array of the shape of ``indices``, one dimension at least.
    """
    i = np.atleast_1d(indices).astype(np.uint64)
    low, high = i.astype(np.uint32), (i >> np.uint64(32)).astype(np.uint32)
    s0 = mix32(np.full(i.shape, (key + step) % 2**32, np.uint32))
    s0 = mix32(s0 + high)
    s1 = mix32(s0 ^ np.uint32(key >> 32))
    x = low ^ s0  # as in mix32, with s1 between the rounds
    x = x ^ x >> np.uint32(16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ x >> np.uint32(15)
    x = x + s1
    x = x * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


_STATE_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # odd; the primes of xxHash


def element_numbers(numel: int, offset: int = 0, run: int = 0, stride: int = 0) -> Array:
    """The numbers that a shard's elements have in the whole tensor: int64 [numel].

    ::

        offset + i / run * stride + i % run        with run 0: offset + i

    Args:
        numel: elements of the shard.
        offset: number of its first element.
        run: how many follow each other in the whole; 0: all.
        stride: from the first of a run to the first of the next.
    """
    i = np.arange(numel)
    return offset + (i // run * stride + i % run if run else i)


def random_halves(key: int, indices: Array, step: int, state: int | None = None) -> UInt32s:
    """16 bits for each element: half of the word that it shares with a neighbour.

    Args:
        key: see `key_of`.
        indices: of the elements in the whole tensor, in memory order.
        step: see `random_words`.
        state: the number, 0, 1 or 2, of the state that is rounded; None: the param is.
    """
    i = np.atleast_1d(indices).astype(np.uint64)
    words = random_words(key, i >> np.uint64(1), step)
    if state is not None:
        words = words * np.uint32(_STATE_FACTORS[state])
        words = words ^ words >> np.uint32(16)
    odd = (i & np.uint64(1)).astype(np.uint32)
    return words >> np.uint32(16) * odd & np.uint32(0xFFFF)


def random_bytes(key: int, indices: Array, step: int) -> UInt32s:
    """8 bits for each element: a quarter of the word of four neighbours; see `random_halves`."""
    i = np.atleast_1d(indices).astype(np.uint64)
    words = random_words(key, i >> np.uint64(2), step)
    return words >> np.uint32(8) * (i & np.uint64(3)).astype(np.uint32) & np.uint32(0xFF)


# --- Numbers -------------------------------------------------------------------------------------


def _rounded_up_from(values: Floats, addend: UInt32s | np.uint32) -> NDArray[np.uint16]:
    """bfloat16: the upper half of the bits after an addition to them; of a NaN the quiet NaN.

    The numbers of a sign are ordered as their bits are, so a carry out of the lower half leads to
    the next number away from zero, be it in the next binade or infinite.
    """
    rounded = ((values.view(np.uint32) + addend) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def store_stochastic(values: Floats, random: UInt32s) -> NDArray[np.uint16]:
    """Rounds to one of the two neighbours in bfloat16, to each with the probability 1 - distance.

    Args:
        values: array of float32.
        random: 16 random bits for each.

    Returns:
        New array of bit patterns; beyond the largest number is infinity.
    """
    return _rounded_up_from(values, random)


def store_away(values: Floats) -> NDArray[np.uint16]:
    """Rounds to the nearest bfloat16, of two to the one away from zero."""
    return _rounded_up_from(values, np.uint32(0x8000))


# --- Params --------------------------------------------------------------------------------------


def _load_master(param: Array, kept: Array) -> Floats:
    return np.asarray(kept.copy(), np.float32)


def _store_master(values: Floats, dtype: str, random: UInt32s | None) -> tuple[Array, Array]:
    # Ties as in a split value, so that both formats train the same model.
    param = store_away(values) if dtype == "bfloat16" else store(values, dtype)
    return param, values.copy()


def _load_remainder16(param: Array, kept: Array) -> Floats:
    upper = param.astype(np.uint32) << np.uint32(16)
    return (upper + kept.astype(np.int32).view(np.uint32)).view(np.float32)


def _store_remainder16(values: Floats, dtype: str, random: UInt32s | None) -> tuple[Array, Array]:
    remainder = values.view(np.uint32).astype(np.uint16).view(np.int16)
    return store_away(values), np.where(np.isnan(values), np.int16(0), remainder)


def _load_remainder8(param: Array, kept: Array) -> Floats:
    return _load_remainder16(param, kept.astype(np.int32) << np.int32(8))


def _store_remainder8(values: Floats, dtype: str, random: UInt32s | None) -> tuple[Array, Array]:
    assert random is not None
    rounded = values.view(np.uint32) + random
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded & ~np.uint32(0xFF))
    remainder = (rounded >> np.uint32(8)).astype(np.uint8).view(np.int8)
    return store_away(rounded.view(np.float32)), remainder


def _load_compensation(param: Array, kept: Array) -> Floats:
    with np.errstate(all="ignore"):
        return load(param, "bfloat16") + load(kept, "bfloat16")


def _store_compensation(values: Floats, dtype: str, random: UInt32s | None) -> tuple[Array, Array]:
    param = store(values, dtype)
    with np.errstate(all="ignore"):
        left = values - load(param, dtype)
    return param, store(np.where(np.isfinite(left), left, np.float32(0)), dtype)


class Beside(NamedTuple):
    """What is beside a param: its dtype, and what is done as `load_param` and `store_param` say."""

    dtype: str
    load: Callable[[Array, Array], Floats]
    store: Callable[[Floats, str, UInt32s | None], tuple[Array, Array]]


BESIDES = {
    "master": Beside("float32", _load_master, _store_master),
    "remainder16": Beside("int16", _load_remainder16, _store_remainder16),
    "remainder8": Beside("int8", _load_remainder8, _store_remainder8),
    "compensation": Beside("bfloat16", _load_compensation, _store_compensation),
}
"""What may be beside a param, by name:

- ``master``: the full value; the param is its copy in bfloat16 or float16.
- ``remainder16``: param and remainder are the full value, split: its bits are those of the param,
  followed by 16 zeros, plus the remainder, which has a sign: the param is the nearest bfloat16.
- ``remainder8``: likewise the bits 8 to 15; the lowest 8 are rounded stochastically.
- ``compensation``: the full value is the sum of the param and of what rounding left of it.
"""


def load_param(param: Array, dtype: str, beside: str = "", kept: Array | None = None) -> Floats:
    """The full value of a param, which a rule sees.

    Args:
        param: as it is stored.
        dtype: how: a key of ``reference.STORAGE_DTYPES``; with something beside it "bfloat16", or
            "float16" where that is a master.
        beside: a key of `BESIDES`, or empty.
        kept: what is beside it, of the param's shape; compensations are bit patterns.
    """
    if not beside:
        return load(param, dtype)
    assert kept is not None
    return BESIDES[beside].load(param, kept)


def store_param(
    values: Floats,
    dtype: str,
    beside: str = "",
    stochastic: bool = False,
    random: UInt32s | None = None,
) -> tuple[Array, Array | None]:
    """Stores the full value of a param.

    Args:
        values: array of float32.
        dtype: see `load_param`.
        beside: see `load_param`.
        stochastic: whether rounding is; to bfloat16, with nothing beside it.
        random: for each element `random_halves` if rounding is stochastic, `random_bytes` beside
            a remainder of 8 bits.

    Returns:
        The param and what is beside it, or None: new arrays.
    """
    if beside:
        return BESIDES[beside].store(values, dtype, random)
    if not stochastic:
        return store(values, dtype), None
    assert random is not None
    return store_stochastic(values, random), None


# --- States --------------------------------------------------------------------------------------

CODE_BLOCK = 64  # elements that share a scale, neighbours in memory order
_SMALLEST_NORMAL, _TOO_LARGE = np.float32(2.0**-126), np.float32(2.0**127)


class Coding(NamedTuple):
    """How the magnitudes of a kind of state are coded; see `encode`."""

    dtype: str
    bias: np.float32
    top: np.float32
    cut: np.uint32  # how many of a binary32's 23 bits of mantissa a code has not

    @property
    def first(self) -> np.uint32:
        """The leading bits of the bias, which is coded as 0."""
        return self.bias.view(np.uint32) >> self.cut

    @property
    def unit(self) -> np.float32:
        """The scale is multiplied by it to be the magnitude for t - bias = 1."""
        return np.float32(np.float32(1) / self.top)


CODINGS: dict[str, Coding] = {
    "signed": Coding("int8", np.float32(2.0**-4), np.float32(63 / 64 - 2.0**-4), np.uint32(18)),
    "square": Coding("uint8", np.float32(2.0**-16), np.float32(31 / 32 - 2.0**-16), np.uint32(19)),
    "magnitude": Coding("uint8", np.float32(2.0**-8), np.float32(63 / 64 - 2.0**-8), np.uint32(18)),
}
"""The kinds of states: of either sign; an average of squares; at least 0."""


def _by_element(of_blocks: Array, elements: int) -> Array:
    """What the blocks have, for each element."""
    return np.repeat(of_blocks, CODE_BLOCK)[:elements]


def encode(values: Floats, kind: str) -> tuple[Array, Floats]:
    """Codes a state in 8 bits, in blocks of 64 elements in C order.

    The scale of a block is its largest magnitude. A magnitude a becomes t = a / scale * top + bias,
    from bias to bias + top, and its code is the leading bits of t, rounded, as a number of
    binary32: of the exponent and 5 bits of the mantissa, counted from those of the bias. So there
    are 32 equal steps in a binade of t and they halve from one binade to the next below, which
    keeps precision where magnitudes are small, as the companding of speech does (ITU-T G.711).
    Squares have 16 steps in each of twice as many binades, which is as fine in their roots.

    What is above zero in a kind without signs is not coded as zero: a step may be divided by it. A
    block with an infinity or a NaN has the scale NaN, one of denormals only the scale 0, and both
    have codes 0.

    Args:
        values: array of float32.
        kind: a key of `CODINGS`; if not "signed", the values are at least 0 or NaN.

    Returns:
        The codes, of the shape of ``values``, and the scales, [ceil(elements / 64)].
    """
    coding = CODINGS[kind]
    x = values.reshape(-1)
    blocks = -(-x.size // CODE_BLOCK)
    with np.errstate(all="ignore"):
        a = np.abs(x)
        padded = np.pad(a, (0, blocks * CODE_BLOCK - x.size))
        largest = padded.reshape(blocks, CODE_BLOCK).max(axis=1)  # NaN where there is one
        scales = np.where(largest < _SMALLEST_NORMAL, np.float32(0), largest)
        scales = np.where(scales < _TOO_LARGE, scales, np.float32(np.nan))
        t = a * _by_element(coding.top / scales, x.size) + coding.bias
    half = np.uint32(1) << (coding.cut - np.uint32(1))
    codes = ((t.view(np.uint32) + half) >> coding.cut) - coding.first
    if kind != "signed":
        codes = np.where(a > 0, np.maximum(codes, np.uint32(1)), codes)
    codes = np.where(_by_element(scales, x.size) > 0, codes, np.uint32(0)).astype(coding.dtype)
    if kind == "signed":
        codes = np.where(x < 0, -codes, codes)
    return codes.reshape(values.shape), scales


def decode(codes: Array, scales: Floats, kind: str) -> Floats:
    """The state of which `encode` gave the codes and the scales, within half a step.

    Args:
        codes: array of ``CODINGS[kind].dtype``, any shape.
        scales: of its blocks; one that is NaN makes NaN of its block.
        kind: a key of `CODINGS`.
    """
    coding = CODINGS[kind]
    n = np.abs(codes.reshape(-1).astype(np.int32)).astype(np.uint32)
    t = ((n + coding.first) << coding.cut).view(np.float32)
    with np.errstate(all="ignore"):
        a = (t - coding.bias) * _by_element(scales * coding.unit, n.size)
    return np.where(codes.reshape(-1) < 0, -a, a).reshape(codes.shape)


def load_state(stored: Array, dtype: str, kind: str = "", scales: Floats | None = None) -> Floats:
    """The numbers of a state.

    Args:
        stored: as it is stored.
        dtype: how: a key of ``reference.STORAGE_DTYPES``, or "code8".
        kind: of a coded state: a key of `CODINGS`.
        scales: of a coded state, those of its blocks.
    """
    if dtype != "code8":
        return load(stored, dtype)
    assert scales is not None
    return decode(stored, scales, kind)


def store_state(
    values: Floats,
    dtype: str,
    kind: str = "",
    random: UInt32s | None = None,
) -> tuple[Array, Floats | None]:
    """Stores the numbers of a state.

    Args:
        values: array of float32.
        dtype: see `load_state`.
        kind: see `load_state`.
        random: 16 random bits for each, if rounding to bfloat16 is stochastic; see
            `random_halves`.

    Returns:
        The state, and the scales of a coded one or None: new arrays.
    """
    if dtype == "code8":
        return encode(values, kind)
    if dtype == "bfloat16" and random is not None:
        return store_stochastic(values, random), None
    return store(values, dtype), None
