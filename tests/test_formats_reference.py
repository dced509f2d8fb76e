"""The NumPy reference of the storage formats against first principles: expectations, bounds, bits.

Where rounding is stochastic, expectations are exact over all random bits there are; that the bits
are as good as random is tested apart, with fixed seeds and six standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fused_adamw import reference
from fused_adamw import reference_formats as formats
from fused_adamw.engines import reference as engine

UNIT = 2.0**-24  # unit roundoff of float32
SIGMAS = 6.0
QUIET_NAN = 0x7FC0  # of bfloat16

patterns = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**32 - 1)
keys = st.integers(0, 2**64 - 1)

# Zero, denormals, every binade, infinity and NaN; on and next to each boundary of what is cut off.
LOWER_BITS = (0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
UPPER_BITS = (0, 1, 2, 0x3F, 0x40, 0x7E, 0x7F)
INTERESTING = np.array(
    [
        sign << 31 | exponent << 23 | upper << 16 | lower
        for sign, exponent, upper, lower in product(range(2), range(256), UPPER_BITS, LOWER_BITS)
    ],
    np.uint32,
).view(np.float32)


def from_bits(*bits: int) -> NDArray[np.float32]:
    return np.array(bits, np.uint32).view(np.float32)


def same_bits(x: NDArray[Any], y: NDArray[Any]) -> bool:
    assert x.dtype == y.dtype
    return x.tobytes() == y.tobytes()


def wide(stored: NDArray[Any], dtype: str = "bfloat16") -> NDArray[np.float64]:
    """As float64, infinity as the power of two it begins at."""
    return np.clip(reference.load(stored, dtype).astype(np.float64), -(2.0**128), 2.0**128)


# --- Random bits: which they are -----------------------------------------------------------------


def hash_of(key: int, index: int, step: int) -> int:
    """The contract in whole numbers, one element at a time."""

    def mixed(x: int, added: int = 0) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = (x + added) * 0x846CA68B % 2**32
        return x ^ x >> 16

    s0 = mixed((key % 2**32 + step) % 2**32)
    s0 = mixed((s0 + index // 2**32) % 2**32)
    s1 = mixed(s0 ^ key // 2**32)
    return mixed(index % 2**32 ^ s0, s1)


def half_of(key: int, index: int, step: int, state: int | None = None) -> int:
    word = hash_of(key, index // 2, step)
    if state is not None:
        word = word * (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)[state] % 2**32
        word ^= word >> 16
    return word // 2 ** (16 * (index % 2)) % 2**16


def byte_of(key: int, index: int, step: int) -> int:
    return hash_of(key, index // 4, step) // 2 ** (8 * (index % 4)) % 2**8


@given(keys, st.integers(0, 2**63 - 1), seeds)
def test_random_bits_are_those_of_the_contract(key: int, index: int, step: int) -> None:
    i = np.array(index)
    assert formats.random_words(key, i, step) == hash_of(key, index, step)
    assert formats.random_bytes(key, i, step) == byte_of(key, index, step)
    for state in (None, 0, 1, 2):
        assert formats.random_halves(key, i, step, state) == half_of(key, index, step, state)


@given(keys, st.integers(-300, 0), seeds, st.lists(st.integers(0, 300), max_size=4))
def test_cuts_do_not_change_random_bits(key: int, at: int, step: int, cuts: list[int]) -> None:
    """Within a word too; nor does the carry into the upper half of its index."""
    for draw, of_one, elements in (
        (formats.random_words, hash_of, 1),
        (formats.random_halves, half_of, 2),
        (formats.random_bytes, byte_of, 4),
    ):
        indices = elements * 2**32 + at + np.arange(300)
        whole = draw(key, indices, step)  # type: ignore[operator]
        parts = [draw(key, part, step) for part in np.split(indices, sorted(cuts))]  # type: ignore[operator]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        np.testing.assert_array_equal(whole, [of_one(key, int(i), step) for i in indices])  # type: ignore[operator]


def test_numbers_of_a_shards_elements() -> None:
    """Of rows 1 to 3, columns 2 and 3, of a tensor with 5 columns; and of a shard of rows."""
    whole = np.arange(20).reshape(4, 5)
    columns = formats.element_numbers(6, offset=7, run=2, stride=5)
    np.testing.assert_array_equal(columns, whole[1:, 2:4].reshape(-1))
    np.testing.assert_array_equal(formats.element_numbers(10, offset=5), whole[1:3].reshape(-1))


def test_keys_are_numbers_of_splitmix64() -> None:
    """From state 0: its published first numbers, by way of seeds that are states."""
    first, second, third = 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F
    gamma = 0x9E3779B97F4A7C15
    assert formats.key_of(0, -first) == first  # the key of a number is that of the state below
    assert formats.key_of(0, gamma - first) == second
    assert formats.key_of(gamma, 2 * gamma - second) == third
    assert formats.key_of(0, 7) == formats.key_of(2**64, 7)


def test_no_two_parameters_share_a_key() -> None:
    drawn = {formats.key_of(seed, number) for seed in range(200) for number in range(200)}
    assert len(drawn) == 200 * 200


# --- Random bits: how random they are ------------------------------------------------------------

DRAWS = 2**18


def signs(bits: NDArray[np.uint32], count: int = 32) -> NDArray[np.float32]:
    """1 for each bit that is set and -1 for each that is not: [draws, count]."""
    found = bits[:, None] >> np.arange(count, dtype=np.uint32) & np.uint32(1)
    return 2 * found.astype(np.float32) - 1


class Slot(NamedTuple):
    """What is drawn for an element: how many bits, and by what."""

    bits: int
    draw: Callable[..., NDArray[np.uint32]]


SLOTS = {
    "word": Slot(32, formats.random_words),
    "param": Slot(16, formats.random_halves),
    **{f"state {k}": Slot(16, partial(formats.random_halves, state=k)) for k in range(3)},
    "byte": Slot(8, formats.random_bytes),
}
every_slot = pytest.mark.parametrize("slot", SLOTS)


def over_elements(
    slot: str, seed: int = 0, number: int = 0, step: int = 0, first: int = 0
) -> NDArray[np.uint32]:
    return SLOTS[slot].draw(formats.key_of(seed, number), first + np.arange(DRAWS), step)


@cache
def over_steps(slot: str) -> NDArray[np.uint32]:
    """Of 16 elements, one step after the other."""
    key = formats.key_of(3, 4)
    draws = [SLOTS[slot].draw(key, np.arange(16), step) for step in range(2**12)]
    return np.concatenate(draws)


def over_parameters(slot: str) -> NDArray[np.uint32]:
    draws = [
        SLOTS[slot].draw(formats.key_of(0, number), np.arange(4), 0) for number in range(2**12)
    ]
    return np.concatenate(draws)


@every_slot
@pytest.mark.parametrize("draw", [over_elements, over_steps, over_parameters])
def test_each_bit_is_set_half_of_the_time(draw: Any, slot: str) -> None:
    found = signs(draw(slot), SLOTS[slot].bits)
    assert np.abs(found.sum(axis=0)).max() <= SIGMAS * math.sqrt(len(found))


@pytest.mark.parametrize("slot", [name for name in SLOTS if name != "word"])
def test_bits_are_uniform(slot: str) -> None:
    """Chi-squared over all patterns, whose spread is that of a normal."""
    patterns = 2 ** SLOTS[slot].bits
    expected = DRAWS / patterns
    found = np.bincount(over_elements(slot, seed=1), minlength=patterns)
    chi_squared = ((found - expected) ** 2 / expected).sum()
    assert abs(chi_squared - (patterns - 1)) <= SIGMAS * math.sqrt(2 * (patterns - 1))


STREAMS: dict[str, dict[str, int]] = {
    "next step": {"step": 1},
    "far step": {"step": 2**31},
    "next parameter": {"number": 1},
    "next seed": {"seed": 1},
    "next element": {"first": 1},
    "the one after": {"first": 2},
    "next word": {"first": 4},
    "next row": {"first": 1000},
    "upper half of the index": {"first": 2**34},
}


@every_slot
@pytest.mark.parametrize("other", STREAMS)
def test_streams_are_independent(other: str, slot: str) -> None:
    """No two bits of theirs, the numbers they make, nor more equal ones than chance has."""
    x, y = over_elements(slot), over_elements(slot, **STREAMS[other])
    bits = SLOTS[slot].bits
    agreements = signs(x, bits).T @ signs(y, bits)
    assert np.abs(agreements).max() <= SIGMAS * math.sqrt(DRAWS)
    numbers = x.astype(np.float64), y.astype(np.float64)
    assert abs(np.corrcoef(*numbers)[0, 1]) <= SIGMAS / math.sqrt(DRAWS)
    expected = DRAWS / 2**bits
    assert np.count_nonzero(x == y) <= expected + SIGMAS * math.sqrt(expected) + 2


def assert_independent(drawn: Sequence[NDArray[np.uint32]], bits: int) -> None:
    """Each two of some numbers, of one word each time: their bits, and how often both are low."""
    count, draws = len(drawn), len(drawn[0])
    pairs = np.triu_indices(count, 1)
    found = np.concatenate([signs(x, bits) for x in drawn], axis=1)
    agreements = (found.T @ found).reshape(count, bits, count, bits).swapaxes(1, 2)[pairs]
    assert np.abs(agreements).max() <= SIGMAS * math.sqrt(draws)
    for p in (2**-6, 2**-2, 1 / 2, 1 - 2**-6):
        low = (np.stack(drawn) < p * 2**bits).astype(np.float32)
        both = (low @ low.T)[pairs]
        deviation = math.sqrt(draws * p**2 * (1 - p**2))
        assert np.abs(both - draws * p**2).max() <= SIGMAS * deviation


def test_what_a_word_rounds_is_rounded_independently() -> None:
    """Of the two elements that share it the param and three states: eight numbers of 16 bits."""
    halves = [over_elements(slot, first=2**20) for slot in SLOTS if slot not in ("word", "byte")]
    assert_independent([half[odd::2] for half in halves for odd in range(2)], 16)


def test_the_bytes_of_a_word_are_independent() -> None:
    drawn = over_elements("byte")
    assert_independent([drawn[i::4] for i in range(4)], 8)


def test_words_of_a_step_are_different() -> None:
    """2^18 of 2^32 at random would have 8 pairs; a permutation of the indices has none."""
    assert len(np.unique(over_elements("word"))) == DRAWS


# --- Stochastic rounding -------------------------------------------------------------------------

ALL_RANDOM = np.arange(2**16, dtype=np.uint32)


@given(patterns)
def test_stochastic_rounding_is_the_number_in_expectation(pattern: int) -> None:
    """To the last bit, denormals and what may become infinite included."""
    x = from_bits(pattern)
    stored = formats.store_stochastic(np.repeat(x, 2**16), ALL_RANDOM)
    if not np.isfinite(x).all():
        wanted = QUIET_NAN if np.isnan(x).any() else pattern >> 16
        assert (stored == wanted).all()
        return
    values = wide(stored)
    assert values.mean() == x[0]  # a sum of numbers of 8 bits is exact
    assert len(np.unique(stored)) == (1 if pattern % 2**16 == 0 else 2)
    gap = np.abs(np.ptp(values))
    assert gap <= abs(float(x[0])) * 2.0**-7 or gap <= 2.0**-133


@pytest.mark.parametrize("slot", ["param", "state 0", "state 1", "state 2"])
@pytest.mark.parametrize("cut_off", [1, 77, 0x4000, 0x8000, 0xC001, 0xFFFF])
def test_numbers_are_rounded_away_as_often_as_they_should(slot: str, cut_off: int) -> None:
    """Over elements, and over steps of 16 elements."""
    p = cut_off / 2**16
    for random in (over_elements(slot, seed=9, number=2, step=5), over_steps(slot)):
        values = np.repeat(from_bits(0xC0490000 + cut_off), len(random))
        if slot == "param":
            stored, nothing = formats.store_param(values, "bfloat16", "", True, random)
        else:
            stored, nothing = formats.store_state(values, "bfloat16", "", random)
        assert nothing is None
        up = np.count_nonzero(stored == 0xC04A)
        assert up + np.count_nonzero(stored == 0xC049) == len(values)
        assert abs(up - len(values) * p) <= SIGMAS * math.sqrt(len(values) * p * (1 - p))


def test_without_random_bits_numbers_are_rounded_to_nearest() -> None:
    for dtype in reference.STORAGE_DTYPES:
        param, nothing = formats.store_param(INTERESTING, dtype)
        state, no_scales = formats.store_state(INTERESTING, dtype)
        assert nothing is None
        assert no_scales is None
        assert same_bits(param, reference.store(INTERESTING, dtype))
        assert same_bits(state, param)
        assert same_bits(formats.load_param(param, dtype), reference.load(param, dtype))
        assert same_bits(formats.load_state(state, dtype), reference.load(state, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_bfloat16_is_rounded_stochastically(dtype: str) -> None:
    random = np.full(len(INTERESTING), 0xFFFF, np.uint32)
    stored, _ = formats.store_state(INTERESTING, dtype, "", random)
    assert same_bits(stored, reference.store(INTERESTING, dtype))


# --- Master, remainders, compensation ------------------------------------------------------------


def stored_and_loaded(
    values: NDArray[np.float32], beside: str, random: NDArray[np.uint32] | None = None
) -> tuple[NDArray[np.uint16], NDArray[Any], NDArray[np.float32]]:
    """The param in bfloat16, what is beside it, and the full value of the two."""
    param, kept = formats.store_param(values, "bfloat16", beside, random=random)
    assert kept is not None
    assert kept.dtype == reference.STORAGE_DTYPES.get(
        formats.BESIDES[beside].dtype, formats.BESIDES[beside].dtype
    )
    return param, kept, formats.load_param(param, "bfloat16", beside, kept)


def assert_nearest_or_away(param: NDArray[np.uint16], values: NDArray[np.float32]) -> None:
    """Against the nearest, ties to even, which is tested against torch."""
    number = ~np.isnan(values)
    x, found = wide(values[number], "float32"), wide(param[number])
    even = wide(reference.store(values[number], "bfloat16"))
    np.testing.assert_array_equal(np.abs(found - x), np.abs(even - x))
    assert (np.abs(found) >= np.abs(even)).all()
    assert (param[~number] == QUIET_NAN).all()


def assert_split_is_exact(values: NDArray[np.float32]) -> None:
    param, remainder, back = stored_and_loaded(values, "remainder16")
    number = ~np.isnan(values)
    assert same_bits(back[number], values[number])
    assert np.isnan(back[~number]).all()
    assert (remainder[~number] == 0).all()
    assert_nearest_or_away(param, values)


@given(st.lists(patterns, min_size=1, max_size=8))
def test_a_split_param_is_exact(bits: list[int]) -> None:
    assert_split_is_exact(from_bits(*bits))


def test_a_split_param_is_exact_at_every_boundary() -> None:
    assert_split_is_exact(INTERESTING)
    assert_split_is_exact(
        np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32).view(np.float32)
    )


def test_a_master_is_the_value_and_its_param_that_of_a_split_one() -> None:
    param, master, back = stored_and_loaded(INTERESTING, "master")
    assert same_bits(master, INTERESTING)
    assert same_bits(back, INTERESTING)
    assert back is not master
    assert_nearest_or_away(param, INTERESTING)
    np.testing.assert_array_equal(param, stored_and_loaded(INTERESTING, "remainder16")[0])


def test_a_master_beside_float16_is_rounded_to_nearest_even() -> None:
    param, master = formats.store_param(INTERESTING, "float16", "master")
    assert master is not None
    assert same_bits(param, reference.store(INTERESTING, "float16"))
    assert same_bits(formats.load_param(param, "float16", "master", master), INTERESTING)


@given(patterns)
def test_a_remainder_of_8_bits_is_the_value_in_expectation(pattern: int) -> None:
    """Over its 8 random bits."""
    x = from_bits(pattern)
    values = np.repeat(x, 2**8)
    param, remainder, back = stored_and_loaded(
        values, "remainder8", np.arange(2**8, dtype=np.uint32)
    )
    assert_nearest_or_away(param, back)
    if np.isnan(x).any():
        assert (param == QUIET_NAN).all()
        assert (remainder == 0).all()
        return
    if np.isinf(x).any():
        assert same_bits(back, values)
        return
    full = wide(back, "float32")
    assert full.mean() == x[0]
    assert (back.view(np.uint32) % 2**8 == 0).all()
    assert np.ptp(full) <= 2.0**8 * max(np.spacing(np.abs(x[0])).astype(np.float64), 2.0**-149)


@pytest.mark.parametrize("cut_off", [1, 0x55, 0x80, 0xFF])
def test_remainders_of_8_bits_are_rounded_away_as_often_as_they_should(cut_off: int) -> None:
    values = np.repeat(from_bits(0x3F9E0700 + cut_off), DRAWS)
    _, _, back = stored_and_loaded(values, "remainder8", over_elements("byte", seed=2, step=7))
    up, p = np.count_nonzero(back > values[0]), cut_off / 2**8
    assert abs(up - DRAWS * p) <= SIGMAS * math.sqrt(DRAWS * p * (1 - p))


def assert_compensated(values: NDArray[np.float32]) -> None:
    """With 2^e <= |x| < 2^(e + 1), the param is off by at most 2^(e - 8).

    The compensation, of 8 bits, is off by 2^-9 of that at most, or by half of the least denormal.
    It is a multiple of x's last bit, as the param is, so that adding the two is exact.
    """
    param, compensation, back = stored_and_loaded(values, "compensation")
    assert same_bits(param, reference.store(values, "bfloat16"))
    with np.errstate(invalid="ignore"):
        infinite = np.isinf(reference.load(param, "bfloat16"))
    finite = np.isfinite(values) & ~infinite
    x = values[finite].astype(np.float64)
    bound = np.maximum(2.0 ** (np.frexp(x)[1] - 1 - 17), 2.0**-134)
    assert (np.abs(back[finite].astype(np.float64) - x) <= bound).all()
    # What is lost stays lost, and visible.
    assert (compensation[~finite] == 0).all()
    assert same_bits(back[infinite], reference.load(param[infinite], "bfloat16"))
    assert np.isnan(back[np.isnan(values)]).all()


@given(st.lists(patterns, min_size=1, max_size=8))
def test_compensation_is_within_its_bound(bits: list[int]) -> None:
    assert_compensated(from_bits(*bits))


def test_compensation_is_within_its_bound_at_every_boundary() -> None:
    assert_compensated(INTERESTING)


# --- Codes of 8 bits -----------------------------------------------------------------------------

KINDS = ("signed", "square", "magnitude")
BIAS = {"signed": 2.0**-4, "square": 2.0**-16, "magnitude": 2.0**-8}
STEPS = {"signed": 32, "square": 16, "magnitude": 32}  # in a binade of t
TOP = {kind: 1 - 1 / (2 * STEPS[kind]) - BIAS[kind] for kind in KINDS}
LAST = {"signed": 127, "square": 255, "magnitude": 255}
BLOCK = 64
EXPONENTS = -125, 126  # of the scales, as powers of two
SMALLEST_SCALE = 2.0**-126


def coded(values: NDArray[np.float32], kind: str) -> tuple[Any, Any, Any]:
    """The codes, the scales, and what they are decoded to."""
    codes, scales = formats.encode(values, kind)
    assert codes.dtype == (np.int8 if kind == "signed" else np.uint8)
    assert codes.shape == values.shape
    assert scales.dtype == np.float32
    assert scales.shape == (-(-values.size // BLOCK),)
    decoded = formats.decode(codes, scales, kind)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    return codes, scales, decoded


def draw_state(kind: str, seed: int, numel: int, exponent: int, spread: float) -> Any:
    """Numbers whose magnitudes lie in ``spread`` binades below 2^exponent; some of them zeros."""
    rng = np.random.default_rng(seed)
    a = 2.0 ** (exponent - spread * rng.random(numel)) * (rng.random(numel) < 0.9)
    if kind == "signed":
        a *= rng.choice([-1, 1], numel)
    return a.astype(np.float32)


@st.composite
def states(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> tuple[str, Any]:
    kind = draw(st.sampled_from(kinds))
    exponent, numel = draw(st.integers(*EXPONENTS)), draw(st.integers(1, 200))
    spread = draw(st.sampled_from([0.0, 1.0, 5.0, 12.0, 24.0, 40.0]))
    return kind, draw_state(kind, draw(seeds), numel, exponent, spread)


def by_element(of_blocks: NDArray[Any], elements: int) -> NDArray[Any]:
    return np.repeat(of_blocks, BLOCK)[:elements]


def error_bound(kind: str, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of a decoded state.

    In a binade of t from 2^e a step is 2^e / 32, or 16, and rounding is off by half of it; a step
    of t is one of scale / top in the magnitude. What is not zero but was rounded to it is raised
    by at most the first step. t is computed with 4 roundings, the inverse of the scale among them,
    which as a denormal is off by as much as 4 alone, and decoded with 3; what is decoded may be
    denormal. A block without a normal number is zero.
    """
    a = np.abs(values.astype(np.float64))
    padded = np.pad(a, (0, -a.size % BLOCK)).reshape(-1, BLOCK)
    scale = by_element(padded.max(axis=1), a.size)
    unit = scale / TOP[kind]
    t = np.divide(a, unit, out=np.zeros_like(a), where=unit > 0) + BIAS[kind]
    half_a_step = 2.0 ** (np.frexp(t)[1] - 1) / (2 * STEPS[kind])
    if kind != "signed":
        raised = (a > 0) & (t - BIAS[kind] <= half_a_step * (1 + 16 * UNIT))
        half_a_step = np.where(raised, 2 * half_a_step, half_a_step)
    bound = half_a_step * unit + 16 * UNIT * t * unit + 2.0**-149
    return np.where(scale < SMALLEST_SCALE, a, bound)


@given(states())
@settings(max_examples=300)
def test_codes_are_within_half_a_step(drawn: tuple[str, Any]) -> None:
    kind, values = drawn
    _, _, decoded = coded(values, kind)
    error = np.abs(decoded.astype(np.float64) - values.astype(np.float64))
    assert (error <= error_bound(kind, values)).all()
    assert (np.sign(decoded) * np.sign(values) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_used_and_half_a_step_is_reached(kind: str) -> None:
    """In each binade of t, which has the number of codes that the bound supposes."""
    a = np.linspace(0, 1, BLOCK * 2**11, dtype=np.float32).reshape(-1, BLOCK)
    a[:, 0], a[0, 1] = 1, 0
    values = (a * a if kind == "square" else a).reshape(-1)  # many small ones for many binades
    codes, _, decoded = coded(values, kind)
    assert set(np.unique(codes)) == set(range(LAST[kind] + 1))
    error = np.abs(decoded.astype(np.float64) - values.astype(np.float64))
    ratio = error / error_bound(kind, values)
    binades = np.frexp(values.astype(np.float64) * TOP[kind] + BIAS[kind])[1]
    assert len(np.unique(binades)) == -math.log2(BIAS[kind])
    for binade in np.unique(binades):
        assert ratio[binades == binade].max() > 0.9


@given(states())
def test_codes_keep_the_order(drawn: tuple[str, Any]) -> None:
    kind, values = drawn
    values = np.sort(values[:BLOCK])
    codes, _, decoded = coded(values, kind)
    assert (np.diff(codes.astype(np.int64)) >= 0).all()
    assert (np.diff(decoded) >= 0).all()


@given(states(("signed",)))
def test_signs_are_coded_alike(drawn: tuple[str, Any]) -> None:
    _, values = drawn
    codes, scales, _ = coded(values, "signed")
    negated, same_scales, _ = coded(-values, "signed")
    np.testing.assert_array_equal(negated, -codes)
    assert same_bits(same_scales, scales)


@given(st.sampled_from(KINDS), seeds, st.data())
def test_what_was_decoded_is_coded_alike(kind: str, seed: int, data: st.DataObject) -> None:
    """If the block's largest is there: a step that changes nothing changes no code."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, LAST[kind] + 1, (4, BLOCK))
    codes[:, rng.integers(BLOCK)] = LAST[kind]
    if kind == "signed":
        codes *= rng.choice([-1, 1], codes.shape)
    codes = codes.astype(np.int8 if kind == "signed" else np.uint8)
    exponent = data.draw(st.integers(*EXPONENTS))
    scales = np.ldexp(1 + rng.random(4), exponent - 1).astype(np.float32)
    again, _ = formats.encode(formats.decode(codes, scales, kind), kind)
    np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_of_a_block_is_decoded_within_2_ulp(kind: str) -> None:
    rng = np.random.default_rng(3)
    exponents = rng.integers(*EXPONENTS, 2**13, endpoint=True)
    scales = np.ldexp(1 + rng.random(2**13), exponents).astype(np.float32)
    values = np.zeros((len(scales), BLOCK), np.float32)
    places = np.arange(len(scales)), rng.integers(0, BLOCK, len(scales))
    values[places] = scales
    codes, found, decoded = coded(values, kind)
    assert same_bits(found, scales)
    assert (codes[places] == LAST[kind]).all()
    error = np.abs(decoded[places].astype(np.float64) - scales.astype(np.float64))
    assert (error <= 2 * np.spacing(scales)).all()


@given(states(("square", "magnitude")))
def test_what_is_above_zero_stays_above_zero(drawn: tuple[str, Any]) -> None:
    """However small it is beside the largest of the block: a step is divided by it."""
    kind, values = drawn
    values = np.concatenate([values, np.array([0.0, 1e-45, 1e-30], np.float32)])
    codes, scales, decoded = coded(values, kind)
    is_kept = (values > 0) & (by_element(scales, len(values)) > 0)
    assert is_kept[-1]
    np.testing.assert_array_equal(codes > 0, is_kept)
    np.testing.assert_array_equal(decoded > 0, is_kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", [1, 64, 65, 130])
def test_zeros_are_coded_as_zeros(kind: str, numel: int) -> None:
    for zero in (0.0, -0.0):
        codes, scales, decoded = coded(np.full(numel, zero, np.float32), kind)
        assert (codes == 0).all()
        assert same_bits(np.abs(scales), np.zeros_like(scales))
        assert same_bits(decoded, np.zeros(numel, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_no_elements_have_no_scales(kind: str) -> None:
    coded(np.zeros((3, 0), np.float32), kind)


@given(states(), st.integers(0, 3))
def test_blocks_do_not_know_each_other(drawn: tuple[str, Any], where: int) -> None:
    """Nor does a ragged one know of what is not there; the shape is in C order."""
    kind, values = drawn
    codes, scales, _ = coded(values, kind)
    cut = BLOCK * where
    for piece in (slice(None, cut), slice(cut, None)):
        again, of_piece = formats.encode(values[piece], kind)
        np.testing.assert_array_equal(again, codes[piece])
        blocks = slice(where) if piece.start is None else slice(where, None)
        assert same_bits(of_piece, scales[blocks])
    folded, same_scales, _ = coded(values.reshape(1, -1, 1), kind)
    np.testing.assert_array_equal(folded.reshape(-1), codes)
    assert same_bits(same_scales, scales)


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_makes_its_own_block_coarse(kind: str) -> None:
    values = np.full(3 * BLOCK, 1e-3, np.float32)
    values[70] = 1e12
    codes, scales, decoded = coded(values, kind)
    others = np.r_[:BLOCK, 2 * BLOCK : 3 * BLOCK]
    np.testing.assert_allclose(decoded[others], values[others], rtol=8 * UNIT)
    np.testing.assert_allclose(decoded[70], values[70], rtol=8 * UNIT)
    assert scales[0] == scales[2] < scales[1]
    crushed = np.delete(codes[BLOCK : 2 * BLOCK], 70 - BLOCK)
    assert (crushed == (0 if kind == "signed" else 1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_its_own_block_nan(kind: str, bad: float) -> None:
    values = draw_state(kind, 1, 3 * BLOCK - 7, 0, 3.0)
    wanted_codes, wanted_scales, _ = coded(values, kind)
    for at in (BLOCK, 100, 2 * BLOCK - 1):
        bad_values = values.copy()
        bad_values[at] = bad
        codes, scales, decoded = coded(bad_values, kind)
        np.testing.assert_array_equal(np.isnan(scales), [False, True, False])
        assert (codes[BLOCK : 2 * BLOCK] == 0).all()
        assert np.isnan(decoded[BLOCK : 2 * BLOCK]).all()
        for part in (slice(None, BLOCK), slice(2 * BLOCK, None)):
            np.testing.assert_array_equal(codes[part], wanted_codes[part])
        np.testing.assert_array_equal(scales[[0, 2]], wanted_scales[[0, 2]])
        again, of_again, _ = coded(decoded, kind)
        np.testing.assert_array_equal(again, codes)  # it stays NaN
        assert np.isnan(of_again[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_denormals_is_zero(kind: str) -> None:
    """And one with the smallest normal number is not."""
    values = np.zeros(2 * BLOCK, np.float32)
    values[3 : BLOCK + 9] = from_bits(0x007FFFFF)  # the largest denormal
    values[BLOCK + 5] = 2.0**-126
    codes, scales, decoded = coded(values, kind)
    np.testing.assert_array_equal(scales, np.array([0, 2.0**-126], np.float32))
    assert (codes[:BLOCK] == 0).all()
    assert same_bits(decoded[:BLOCK], np.zeros(BLOCK, np.float32))
    assert codes[BLOCK + 5] == LAST[kind]
    np.testing.assert_allclose(decoded[BLOCK:], values[BLOCK:], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_too_large_for_its_unit_is_nan(kind: str) -> None:
    """Which is a little above the scale; the last number below 2^127 still has one."""
    values = np.full(2 * BLOCK, 2.0**120, np.float32)
    values[3], values[BLOCK + 3] = 2.0**127, np.nextafter(np.float32(2.0**127), np.float32(0))
    codes, scales, decoded = coded(values, kind)
    assert np.isnan(scales[0])
    assert (codes[:BLOCK] == 0).all()
    assert np.isnan(decoded[:BLOCK]).all()
    assert scales[1] == values[BLOCK + 3]
    assert codes[BLOCK + 3] == LAST[kind]
    assert np.isfinite(decoded[BLOCK:]).all()
    np.testing.assert_allclose(decoded[BLOCK + 3], values[BLOCK + 3], rtol=4 * UNIT)


# --- Training ------------------------------------------------------------------------------------


def drawn_for(
    beside: str, stochastic: bool, key: int, indices: NDArray[Any], step: int
) -> NDArray[np.uint32] | None:
    """The random bits that storing a param takes, if it takes any."""
    if stochastic:
        return formats.random_halves(key, indices, step)
    return formats.random_bytes(key, indices, step) if beside == "remainder8" else None


@pytest.mark.parametrize("name", ["nearest", "stochastic", *formats.BESIDES])
def test_steps_too_small_for_the_param_are_not_lost(name: str) -> None:
    """300 steps of 2^-14 down from 1, where numbers of bfloat16 are 2^-8 apart.

    Stochastic rounding is off in a step by a random number of mean 0 that is at most the gap wide:
    of variance at most gap^2 / 4, whatever was before. Compensation loses at most 2^-18 a step.
    """
    elements, steps, lr, gap = 2**12, 300, 2.0**-14, 2.0**-8
    beside, stochastic = name if name in formats.BESIDES else "", name == "stochastic"
    ones = np.ones(elements, np.float32)
    param, kept = formats.store_param(ones, "bfloat16", beside, random=0 * ones.view(np.uint32))
    for step in range(steps):
        random = drawn_for(beside, stochastic, formats.key_of(1, 2), np.arange(elements), step)
        full = formats.load_param(param, "bfloat16", beside, kept)
        param, kept = formats.store_param(
            full - np.float32(lr), "bfloat16", beside, stochastic, random
        )
    found = formats.load_param(param, "bfloat16", beside, kept).astype(np.float64)
    exact = 1 - steps * lr
    if name == "nearest":
        assert (found == 1).all()
    elif name in ("master", "remainder16"):
        assert (found == exact).all()
    elif name == "compensation":
        assert (np.abs(found - exact) <= steps * 2.0**-18).all()
    else:
        width = 2.0**-16 if name == "remainder8" else gap
        deviation = width / 2 * math.sqrt(steps / elements)
        assert abs(found.mean() - exact) <= SIGMAS * deviation


# --- Engine --------------------------------------------------------------------------------------

F32, BF16, F16, CODE8 = "float32", "bfloat16", "float16", "code8"
FORMATS = [
    *product([F32], [F32, BF16, F16], [CODE8], [""], [False]),
    *product([BF16], [BF16, F32], [BF16, F32], [""], [True]),
    *product([BF16], [BF16, F32], [F32], ["master"], [False]),
    *product([F16], [F16, F32], [F32], ["master"], [False]),
    *product([BF16], [BF16, F32], [F32, BF16, CODE8], ["remainder16"], [False]),
    *product([BF16], [BF16, F32], [CODE8], ["remainder8"], [False]),
    *product([BF16], [BF16, F32], [BF16], ["compensation"], [False]),
]
RULES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "adam": (
        {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "amsgrad": True},
        ("signed", "square", "square"),
    ),
    "adamax": ({"beta1": 0.9, "beta2": 0.99, "eps": 1e-3}, ("signed", "magnitude")),
}
SHARED = {
    "lr": 0.1,
    "weight_decay": 0.1,
    "schedule_multiplier": 0.75,
    "decay": "lr",
    "maximize": False,
}


class Problem:
    """The memory of tensors of one storage format, and a bucket of them."""

    def __init__(self, rule: str, format_: tuple[str, str, str, str, bool], numels: list[int]):
        self.rule, self.numels = rule, numels
        self.param_dtype, self.grad_dtype, self.state_dtype, self.beside, self.stochastic = format_
        self.values, self.kinds = RULES[rule][0], RULES[rule][1]
        self.params, self.kept, self.grads, self.emas = [], [], [], []  # type: ignore[var-annotated]
        self.states: list[list[tuple[Any, Any]]] = []
        rng = np.random.default_rng(7)
        for numel in numels:
            values = rng.standard_normal((3, numel)).astype(np.float32)
            random = rng.integers(0, 2**8, numel, np.uint32)
            param, kept = formats.store_param(
                values[0], self.param_dtype, self.beside, self.stochastic, random
            )
            self.params.append(param)
            self.kept.append(kept)
            self.grads.append(reference.store(values[1], self.grad_dtype))
            self.emas.append(values[2])
            self.states.append(
                [
                    formats.store_state(
                        np.abs(rng.standard_normal(numel, np.float32)), self.state_dtype, kind
                    )
                    for kind in self.kinds
                ]
            )
        self.keys = [formats.key_of(11, number) for number in range(len(numels))]
        self.offsets, self.rows, self.steps = (
            [0] * len(numels),
            [0] * len(numels),
            [3] * len(numels),
        )
        self.zero_grads = True
        chunks = [-(-numel // 16384) for numel in numels]
        self.chunks = np.cumsum([0, *chunks[:-1]])
        self.observed = np.full((sum(chunks), 5), np.nan)
        # The gradient's factor, the average's weight; and a step whose bits are a signalling NaN.
        self.coefficients = np.array([[np.nan, 0.3, 0.2, 0], [np.nan, 1.7, 0.9, 0]], np.float32)
        self.random_steps = [12, 0x7F800001]
        self.coefficients.view(np.uint32)[:, -1] = self.random_steps

    def run(self) -> None:
        def address(array: Any) -> int:
            return array.ctypes.data if array.size else 0

        is_coded = self.state_dtype == CODE8
        bucket = SimpleNamespace(
            param_dtype=self.param_dtype,
            grad_dtype=self.grad_dtype,
            state_dtype=self.state_dtype,
            beside=self.beside,
            stochastic=self.stochastic,
            state_kinds=self.kinds,
            addresses=np.array(
                [
                    [address(param), address(grad), *(address(state) for state, _ in states)]
                    for param, grad, states in zip(
                        self.params, self.grads, self.states, strict=True
                    )
                ]
            ),
            besides=np.array([address(x) for x in self.kept if x is not None], np.int64),
            scales=np.array(
                [[address(scales) for _, scales in states] for states in self.states if is_coded],
                np.int64,
            ),
            numels=np.array(self.numels),
            groups=np.zeros(len(self.numels), np.int32),
            steps=np.array(self.steps),
            chunks=self.chunks,
            scalars=np.zeros(len(self.numels)),
            rows=np.array(self.rows, np.int32),
            coefficients=self.coefficients,
            keys=np.array(self.keys, np.uint64),
            extents=np.array([(offset, 0, 0) for offset in self.offsets], np.int64),
            emas=np.array([address(x) for x in self.emas], np.int64),
            zero_grads=self.zero_grads,
            observed=self.observed.ctypes.data,
        )
        engine.run(bucket, [SimpleNamespace(rule=self.rule, values={**SHARED, **self.values})])

    def arrays(self, i: int) -> list[Any]:
        """What a step writes of tensor number ``i``, but for the observations."""
        states = [array for state in self.states[i] for array in state]
        arrays = [self.params[i], self.kept[i], self.grads[i], self.emas[i], *states]
        return [array for array in arrays if array is not None]


def format_id(format_: tuple[str, str, str, str, bool]) -> str:
    *names, stochastic = format_
    return "-".join([*filter(None, names), *["stochastic"] * stochastic])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format_", FORMATS, ids=format_id)
def test_engine_updates_memory_in_place(
    format_: tuple[str, str, str, str, bool], rule: str
) -> None:
    """The rule on full values; each element with its own bits; the average of full values."""
    numels = [130, 0, 5]
    found, old = Problem(rule, format_, numels), Problem(rule, format_, numels)
    for problem in (found, old):
        problem.offsets, problem.rows, problem.steps = [2**34 - 65, 0, 0], [0, 0, 1], [3, 9, 1]
    found.run()
    param_dtype, grad_dtype, state_dtype, beside, stochastic = format_
    for i, numel in enumerate(numels):
        if not numel:
            continue
        row = old.rows[i]
        drawn = old.keys[i], old.offsets[i] + np.arange(numel), old.random_steps[row]
        before = formats.load_param(old.params[i], param_dtype, beside, old.kept[i])
        grad = reference.load(old.grads[i], grad_dtype)
        numbers = [
            formats.load_state(state, state_dtype, kind, scales)
            for (state, scales), kind in zip(old.states[i], old.kinds, strict=True)
        ]
        factor, weight = old.coefficients[row, 1:3]
        hyperparameters = {**SHARED, **old.values, "step": old.steps[i]}
        new = reference.update(rule, before, grad, *numbers, grad_factor=factor, **hyperparameters)
        random = drawn_for(beside, stochastic, *drawn)
        param, kept = formats.store_param(new[0], param_dtype, beside, stochastic, random)
        assert same_bits(found.params[i], param)
        assert (found.kept[i] is None) == (kept is None) == (beside == "")
        if kept is not None:
            assert same_bits(found.kept[i], kept)
        for k, (state, kind) in enumerate(zip(new[1:], old.kinds, strict=True)):
            random = formats.random_halves(*drawn, k) if stochastic else None
            stored, scales = formats.store_state(state, state_dtype, kind, random)
            assert same_bits(found.states[i][k][0], stored)
            if scales is not None:
                assert same_bits(found.states[i][k][1], scales)
        after = formats.load_param(param, param_dtype, beside, kept)
        assert same_bits(found.emas[i], reference.ema(old.emas[i], after, weight))
        assert not found.grads[i].any()
        observed = reference.observed(grad, before, after)
        chunks = slice(found.chunks[i], found.chunks[i] + len(observed))
        np.testing.assert_array_equal(found.observed[chunks], observed)


@pytest.mark.parametrize("format_", FORMATS, ids=format_id)
def test_shards_of_a_tensor_train_as_the_whole(format_: tuple[str, str, str, str, bool]) -> None:
    """Cut between blocks, with one key and the offsets of the cuts."""
    whole, shards = Problem("adam", format_, [300]), Problem("adam", format_, [128, 172])
    cut = 128
    for name in ("params", "kept", "grads", "emas"):
        array = getattr(whole, name)[0]
        if array is not None:
            setattr(shards, name, [array[:cut].copy(), array[cut:].copy()])
    shards.states = [
        [(x[a:b].copy(), s if s is None else s[c:d].copy()) for x, s in whole.states[0]]
        for a, b, c, d in ((0, cut, 0, cut // BLOCK), (cut, 300, cut // BLOCK, None))
    ]
    shards.keys = whole.keys * 2
    whole.offsets, shards.offsets = [2**34 - 151], [2**34 - 151, 2**34 - 151 + cut]
    whole.run()
    shards.run()
    for array, *parts in zip(whole.arrays(0), shards.arrays(0), shards.arrays(1), strict=True):
        assert same_bits(np.concatenate(parts), array)
