"""Storage formats in torch: the closed table, their bits, and conversions of checkpoints.

Bits are compared with a spelling of the contract of its own, an element and a block at a time.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_adamw.precision import (
    BESIDE_KEYS,
    BLOCK,
    LEAST_CODED,
    PRECISIONS,
    Layout,
    beside_of,
    code_key,
    convert_state,
    decode_state,
    decoded_states,
    encode_state,
    full_value,
    in_memory_order,
    is_master_of,
    layout_of,
    scale_key,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ("signed", "square", "magnitude")
SPECIAL = (
    *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x807FFFFF),
    *(0x3F800000, 0xBF800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0xBF808000, 0x3F80FF80),
    *(0x3F80007F, 0x3F800080, 0x3F807F80, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF),
    *(0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF),
)


# --- The contract, spelled once more -------------------------------------------------------------


def widen(p: int) -> np.float32:
    return np.array(p << 16, np.uint32).view(np.float32)[()]


def bits_of(x: np.float32) -> int:
    return int(np.float32(x).view(np.uint32))


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def nearest_even(x: np.float32) -> int:
    if np.isnan(x):
        return 0x7FC0
    u = bits_of(x)
    low = u & 0xFFFF
    return (u >> 16) + (low > 0x8000 or (low == 0x8000 and (u >> 16) & 1))


def encoded_param(x: np.float32, beside: str) -> tuple[int, Any]:
    """The 16 bits of the parameter, and what stands beside them."""
    u = bits_of(x)
    nan = bool(np.isnan(x))
    if beside == "":
        return nearest_even(x), None
    if beside == "master":
        return (0x7FC0 if nan else (u + 0x8000) >> 16), x
    if beside == "remainder16":
        return (0x7FC0, 0) if nan else ((u + 0x8000) >> 16, signed(u, 16))
    if beside == "remainder8":
        if nan:
            return 0x7FC0, 0
        u = u + 128 & ~255  # a step adds a random number below 256 instead
        return (u + 0x8000) >> 16, signed(u >> 8, 8)
    p = nearest_even(x)
    with np.errstate(all="ignore"):
        d = x - widen(p)
    return p, nearest_even(d if np.isfinite(d) else np.float32(0))


def decoded_param(p: int, array: Any, beside: str) -> np.float32:
    if beside == "":
        return widen(p)
    if beside == "master":
        return array
    if beside == "compensation":
        with np.errstate(all="ignore"):
            return widen(p) + widen(array)
    u = (p << 16) + (array << (8 if beside == "remainder8" else 0))
    return np.array(u % 2**32, np.uint32).view(np.float32)[()]


class Coding(NamedTuple):
    bias: np.float32
    top: np.float32
    dropped: int  # bits of a float32

    @property
    def base(self) -> int:
        return bits_of(self.bias) >> self.dropped


CODINGS = {
    "signed": Coding(np.float32(1 / 16), np.float32(59 / 64), 18),
    "square": Coding(np.float32(2**-16), np.float32(31 / 32 - 2**-16), 19),
    "magnitude": Coding(np.float32(1 / 256), np.float32(251 / 256), 18),
}


def encoded_block(x: np.ndarray, kind: str) -> tuple[list[int], np.float32]:
    bias, top, dropped = CODINGS[kind]
    a = np.abs(x)
    scale = a.max()
    if not scale < np.float32(2**127):
        return [0] * len(x), np.float32("nan")
    if scale < np.float32(2**-126):
        return [0] * len(x), np.float32(0)
    inv = top / scale
    codes = []
    for value, magnitude in zip(x, a, strict=True):
        t = magnitude * inv + bias
        n = ((bits_of(t) + (1 << dropped - 1)) >> dropped) - CODINGS[kind].base
        if kind == "signed":
            codes.append(-n if value < 0 else n)
        else:
            codes.append(max(n, 1) if magnitude > 0 else n)
    return codes, scale


def decoded_block(codes: list[int], scale: np.float32, kind: str) -> list[np.float32]:
    bias, top, dropped = CODINGS[kind]
    unit = scale * np.float32(1 / float(top))
    values = []
    for code in codes:
        pattern = (abs(code) + CODINGS[kind].base) << dropped
        a = (np.array(pattern, np.uint32).view(np.float32)[()] - bias) * unit
        values.append(-a if code < 0 else a)
    return values


# --- Tensors -------------------------------------------------------------------------------------


def floats(patterns: np.ndarray) -> np.ndarray:
    return patterns.astype(np.uint32).view(np.float32)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether dtype, shape, strides and bits are the same; one NaN is as good as another."""
    if (x.dtype, x.shape) != (y.dtype, y.shape) or (x.numel() and x.stride() != y.stride()):
        return False
    if not x.is_floating_point():
        return bool(torch.equal(x, y))
    integers = torch.int32 if x.dtype == F32 else torch.int16
    same = (x.view(integers) == y.view(integers)) | (x.isnan() & y.isnan())
    return bool(same.all())


def in_order(values: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in memory order as a tensor of the shape and strides of another."""
    result = torch.empty_strided(like.shape, like.stride(), dtype=dtype)
    array = np.array(values)
    if dtype == BF16:
        flat = torch.from_numpy(array.astype(np.uint16).view(np.int16)).view(BF16)
    else:
        flat = torch.from_numpy(array).to(dtype)
    result.as_strided((like.numel(),), (1,)).copy_(flat)
    return result


def elements(tensor: Tensor) -> np.ndarray:
    """In memory order; bfloat16 as patterns."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype == BF16 else flat.numpy()


@st.composite
def dense_tensors(draw: st.DrawFn, at_most: int = 400) -> Tensor:
    """float32 in any order of dimensions: special values, wide ones and near ones."""
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    while math.prod(shape) > at_most:
        shape.pop()
    if draw(st.booleans()):
        shape = [draw(st.integers(0, at_most))]
    order = draw(st.permutations(range(len(shape))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = math.prod(shape)
    values = rng.standard_normal(count).astype(np.float32)
    values *= np.float32(10) ** rng.integers(-draw(st.integers(0, 30)), 2, count)
    if draw(st.booleans()):
        special = floats(rng.choice(np.array(SPECIAL, np.uint32), count))
        values = np.where(rng.random(count) < draw(st.sampled_from([0.02, 0.9])), special, values)
    if draw(st.booleans()):
        values[: count // 2] = rng.choice([0.0, -0.0])
    memory = torch.from_numpy(values.astype(np.float32)).view([shape[i] for i in order])
    return memory.permute([order.index(i) for i in range(len(shape))])


@st.composite
def dense_params(draw: st.DrawFn) -> Tensor:
    x = draw(dense_tensors(at_most=200))
    bits = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 2**16, x.numel())
    return in_order(bits, x, BF16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- The table -----------------------------------------------------------------------------------

LARGE = LEAST_CODED
# (precision, the parameter's dtype, state_dtype, stochastic_rounding, remainder_bits): all accepted
ACCEPTED: dict[tuple[Any, ...], Layout] = {}
for _asked, _precision, _param, _states in [
    (None, "fp32", F32, (F32, BF16)),
    (None, "bf16", BF16, (BF16, F32)),
    (None, "fp16", F16, (F16, F32)),
    ("fp32", "fp32", F32, (F32,)),
    ("bf16", "fp32", F32, (F32, BF16)),
    ("bf16", "bf16", BF16, (BF16, F32)),
    ("master", "fp32", F32, (F32,)),
    ("split", "fp32", F32, (F32, BF16)),
    ("kahan", "fp32", F32, (None, BF16)),
]:
    for _state in (None, *filter(None, _states)):
        _layout = Layout(_precision, "", _state or _states[0] or F32, False)
        ACCEPTED[_asked, _param, _state, False, 8] = _layout
        if _asked in (None, "bf16") and _param != F16:
            _layout = Layout(_precision, "", _layout.state_dtype, _param == BF16)
            ACCEPTED[_asked, _param, _state, True, 8] = _layout
for _param in (BF16, F16):
    for _state in (None, F32):
        ACCEPTED["master", _param, _state, False, 8] = Layout("master", "master", F32, False)
for _state in (None, F32, BF16):
    _layout = Layout("split", "remainder16", _state or F32, False)
    ACCEPTED["split", BF16, _state, False, 8] = _layout
for _state in (None, BF16):
    ACCEPTED["kahan", BF16, _state, False, 8] = Layout("kahan", "compensation", BF16, False)
for _bits in (8, 16):
    ACCEPTED["8bit", BF16, None, False, _bits] = Layout("8bit", f"remainder{_bits}", None, False)
    ACCEPTED["8bit", F32, None, False, _bits] = Layout("8bit", "", None, False)


def test_every_combination() -> None:
    """Accepted or refused with what is accepted; nothing in between."""
    refused = 0
    for combination in itertools.product(
        (None, *PRECISIONS), (F32, BF16, F16), (None, F32, BF16, F16), (False, True), (8, 16)
    ):
        precision, dtype, state_dtype, stochastic, bits = combination
        options: dict[str, Any] = {
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic,
            "remainder_bits": bits,
        }
        if combination in ACCEPTED:
            assert layout_of(dtype, LARGE, precision, **options) == ACCEPTED[combination]
            continue
        refused += 1
        names = r"(precision|state_dtype|stochastic_rounding|remainder_bits): found .*, accepted:"
        with pytest.raises((TypeError, ValueError), match=names) as caught:
            layout_of(dtype, LARGE, precision, **options)
        assert '\n  precision "kahan": bfloat16 parameters, bfloat16 states\n' in str(caught.value)
    assert refused + len(ACCEPTED) == 7 * 3 * 4 * 2 * 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("numel", "codable"), [(0, True), (LARGE - 1, True), (LARGE, False)])
def test_what_8bit_does_not_code_keeps_float32(numel: int, codable: bool, bits: int) -> None:
    found = layout_of(BF16, numel, "8bit", remainder_bits=bits, codable=codable)
    assert found == Layout("split", "remainder16", F32, False)
    found = layout_of(F32, numel, "8bit", remainder_bits=bits, codable=codable)
    assert found == Layout("fp32", "", F32, False)


@pytest.mark.parametrize(
    ("dtype", "precision", "options", "message"),
    [
        (BF16, "fp8", {}, "precision: found 'fp8', accepted: None, \"fp32\", \"bf16\", \"master\""),
        (BF16, "fp16", {}, "precision: found 'fp16'"),
        (F32, "bf16 ", {}, "precision: found 'bf16 '"),
        (torch.float64, None, {}, "params: found torch.float64, accepted: float32 or bfloat16 or"),
        (torch.float64, "8bit", {}, "params: found torch.float64"),
        (BF16, None, {"stochastic_rounding": 1}, "stochastic_rounding: found 1, accepted: True or"),
        (F16, None, {"stochastic_rounding": True}, "stochastic_rounding: found True for a float16"),
        (BF16, "8bit", {"remainder_bits": 4}, "remainder_bits: found 4, accepted: 8 or 16"),
        (BF16, "8bit", {"remainder_bits": True}, "remainder_bits: found True"),
        (BF16, "split", {"remainder_bits": 16}, "remainder_bits: found 16 beside .* 'split'"),
        (BF16, None, {"state_dtype": torch.int8}, "state_dtype: found torch.int8"),
        (BF16, "8bit", {"state_dtype": F32}, "state_dtype: found torch.float32 .*: None\n"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(
    dtype: torch.dtype, precision: str | None, options: dict, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        layout_of(dtype, LARGE, precision, **options)


def test_layouts_as_words_and_keys() -> None:
    words = {
        Layout("8bit", "remainder8", None, False): "8bit: 8-bit states, 8-bit remainder",
        Layout("bf16", "", BF16, True): "bf16: bfloat16 states, stochastic rounding",
        Layout("kahan", "compensation", BF16, False): (
            "kahan: bfloat16 states, bfloat16 compensation"
        ),
    }
    assert {layout: str(layout) for layout in words} == words
    keys = {
        "": (None, None),
        "master": ("param_master", F32),
        "remainder16": ("param_remainder", torch.int16),
        "remainder8": ("param_remainder", torch.int8),
        "compensation": ("param_compensation", BF16),
    }
    for beside, expected in keys.items():
        layout = Layout("", beside, F32, False)
        assert (layout.beside_key, layout.beside_dtype) == expected


# --- Memory order --------------------------------------------------------------------------------


@given(dense_tensors())
def test_memory_order_is_that_of_addresses(x: Tensor) -> None:
    flat = in_memory_order(x)
    assert flat.shape == (x.numel(),)
    assert x.numel() == 0 or flat.data_ptr() == x.data_ptr()
    found = [flat[address].view(torch.int32) for address in range(len(flat))]
    offsets = [sum(map(int.__mul__, i, x.stride())) for i in np.ndindex(*x.shape)]
    for index, offset in zip(np.ndindex(*x.shape), offsets, strict=True):
        assert found[offset] == x[index].view(torch.int32)


@pytest.mark.parametrize(
    "x", [torch.zeros(6, 4)[:, ::2], torch.zeros(3).expand(2, 3), torch.zeros(4, 4)[:, 1:]]
)
def test_memory_with_gaps_or_overlap_has_no_order(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"found strides .* accepted: dense"):
        in_memory_order(x)


def test_a_view_into_the_middle_and_an_odd_stride_of_one() -> None:
    x = torch.arange(12.0)[4:10].as_strided((6, 1), (1, 77))
    assert in_memory_order(x).tolist() == [4, 5, 6, 7, 8, 9]
    codes, scale = encode_state(x, "signed")
    assert codes.stride() == x.stride()
    plain_codes, plain_scale = encode_state(x.clone().reshape(6), "signed")
    assert codes.flatten().tolist() == plain_codes.tolist()
    assert torch.equal(scale, plain_scale)
    assert torch.equal(
        decode_state(codes, scale, "signed").flatten(), decode_state(plain_codes, scale, "signed")
    )


# --- Coded states --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(x=dense_tensors())
def test_bits_of_coded_states(kind: str, x: Tensor) -> None:
    if kind == "magnitude":
        x = x.abs()
    flat = elements(x)
    codes, scales, values = [], [], []
    for start in range(0, len(flat), BLOCK):
        block, scale = encoded_block(flat[start : start + BLOCK], kind)
        codes += block
        scales.append(scale)
        values += decoded_block(block, scale, kind)
    found, found_scale = encode_state(x, kind)
    dtype = torch.int8 if kind == "signed" else torch.uint8
    assert same_bits(found, in_order(codes, x, dtype))
    assert same_bits(found_scale, torch.tensor(np.array(scales, np.float32)))
    assert same_bits(decode_state(found, found_scale, kind), in_order(values, x, F32))


@pytest.mark.parametrize("kind", KINDS)
def test_quotients_are_correctly_rounded(kind: str) -> None:
    """In tensors of a size where torch takes other code than for a few numbers.

    All but the largest magnitude of a block are within a few last places of halfway between two
    codes, where a quotient that is rounded twice leads to the other one.
    """
    bias, top, dropped = CODINGS[kind]
    base, half = CODINGS[kind].base, 1 << dropped - 1
    largest = normal(2000).exp() * 2.0 ** torch.arange(-50.0, 50.0).repeat(20)
    last = 127 if kind == "signed" else 255
    below = np.random.default_rng(0).integers(1, last, (2000, BLOCK - 1))
    halfway = floats(((below + base) << dropped) + half) - bias
    near = torch.from_numpy(halfway) / float(top) * largest[:, None]
    x = torch.cat([largest[:, None], near], 1).numpy()
    t = x * (top / x[:, :1]) + bias
    n = ((t.view(np.uint32) + half) >> dropped) - base
    codes, scale = encode_state(torch.from_numpy(x), kind)
    assert np.array_equal(scale.numpy(), x[:, 0])
    assert np.array_equal(codes.numpy(), n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [1.0, 3.7e-15, 2.0**-125, 1.7e38])
def test_every_code_is_its_own_nearest(kind: str, largest: float) -> None:
    """So that decoding and coding again, in a checkpoint of float32, changes no code."""
    last = 127 if kind == "signed" else 255
    numbers = torch.arange(-last if kind == "signed" else 0, last + 1)
    codes = torch.stack([numbers, torch.full_like(numbers, last)], 1).flatten()
    codes = codes[: len(codes) // BLOCK * BLOCK].to(torch.int8 if kind == "signed" else torch.uint8)
    scale = torch.full((len(codes) // BLOCK,), largest)
    again, scale_again = encode_state(decode_state(codes, scale, kind), kind)
    assert torch.equal(again, codes)
    assert (scale_again / scale - 1).abs().max() <= 2**-22


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_codes(kind: str) -> None:
    """Half a step: a 64th or 32nd of the magnitude plus the bias, in the units of the block."""
    bias, top = map(float, CODINGS[kind][:2])
    steps = 16 if kind == "square" else 32  # in a binade
    x = normal(100, BLOCK) * 10.0 ** -torch.arange(100.0)[:, None].div(10)
    x[:, 1:] *= 10.0 ** normal(100, BLOCK - 1, seed=1).mul(2).clamp(max=0)
    x = x if kind == "signed" else x.square()
    codes, scale = encode_state(x, kind)
    a, b = x.double(), decode_state(codes, scale, kind).double()
    least = bias / top * scale[:, None].double()
    half_a_step = (a.abs() + least) / (2 * steps)
    # A magnitude that is not zero is never coded as zero: it may be raised by the first step.
    raised = 0 if kind == "signed" else least / steps
    assert ((a - b).abs() <= torch.clamp(half_a_step, min=raised) * (1 + 1e-5)).all()
    assert (codes[x > 0] > 0).all() or kind == "signed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_block_is_alone(kind: str) -> None:
    x = normal(3 * BLOCK + 5).abs()
    codes, scale = encode_state(x, kind)
    for bad in (math.nan, math.inf):
        x[BLOCK + 7] = bad
        bad_codes, bad_scale = encode_state(x, kind)
        assert bad_scale.isnan().tolist() == [False, True, False, False]
        values = decode_state(bad_codes, bad_scale, kind)
        assert values[BLOCK : 2 * BLOCK].isnan().all()
        bad_codes[BLOCK : 2 * BLOCK] = codes[BLOCK : 2 * BLOCK]
        bad_scale[1] = scale[1]
        assert torch.equal(bad_codes, codes)
        assert torch.equal(bad_scale, scale)


def test_coding_refuses() -> None:
    with pytest.raises(ValueError, match="kind: found 'cube', accepted: signed, square, magnitude"):
        encode_state(torch.zeros(3), "cube")
    with pytest.raises(TypeError, match=r"x: found torch\.bfloat16, accepted: float32"):
        encode_state(torch.zeros(3, dtype=BF16), "square")


# --- The array beside the parameter --------------------------------------------------------------

BESIDES = {
    "": Layout("bf16", "", BF16, False),
    "master": Layout("master", "master", F32, False),
    "remainder16": Layout("split", "remainder16", F32, False),
    "remainder8": Layout("8bit", "remainder8", None, False),
    "compensation": Layout("kahan", "compensation", BF16, False),
}


@pytest.mark.parametrize("beside", BESIDES)
@settings(deadline=None)
@given(x=dense_tensors(at_most=200))
def test_bits_of_stored_parameters(beside: str, x: Tensor) -> None:
    layout = BESIDES[beside]
    param = in_order(np.zeros(x.numel()), x, BF16)
    expected = [encoded_param(value, beside) for value in elements(x)]
    stored, array = beside_of(x, layout, param)
    assert same_bits(stored, in_order([p for p, _ in expected], param, BF16))
    if array is None:
        assert not beside
        return
    arrays = np.array([a for _, a in expected], None if x.numel() else np.float32)
    assert same_bits(array, in_order(arrays, param, layout.beside_dtype))
    value = full_value(stored, layout, {layout.beside_key: array})
    back = np.array([decoded_param(p, a, beside) for p, a in expected], np.float32)
    assert same_bits(value, in_order(back, param, F32))
    if beside in ("master", "remainder16"):
        assert same_bits(value, torch.empty_strided(x.shape, x.stride()).copy_(x))


@pytest.mark.parametrize("beside", ["remainder16", "remainder8", "compensation"])
@settings(deadline=None)
@given(param=dense_params(), seed=st.integers(0, 2**32 - 1))
def test_bits_of_any_parameter_and_any_array(beside: str, param: Tensor, seed: int) -> None:
    """A model may be loaded beside arrays that belong to another: sums wrap."""
    layout = BESIDES[beside]
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**8 if beside == "remainder8" else 2**16, param.numel())
    if beside == "compensation":
        array = in_order(bits, param, BF16)
    else:
        width = 8 if beside == "remainder8" else 16
        bits = np.array([signed(int(b), width) for b in bits], np.int64)
        array = in_order(bits, param, layout.beside_dtype)
    pairs = zip(elements(param), bits, strict=True)
    values = np.array([decoded_param(int(p), int(b), beside) for p, b in pairs], np.float32)
    value = full_value(param, layout, {layout.beside_key: array})
    assert same_bits(value, in_order(values, param, F32))
    elsewhere = torch.empty(param.shape, dtype=array.dtype).copy_(array)  # in another order
    assert same_bits(value, full_value(param, layout, {layout.beside_key: elsewhere}))


def test_value_of_a_parameter_whose_array_is_still_to_come() -> None:
    for dtype in (F32, BF16, F16):
        param = normal(4, 5).to(dtype).t().requires_grad_()
        value = full_value(param, BESIDES["master"], {})
        assert same_bits(value, param.detach().float())
        assert value.data_ptr() != param.data_ptr()


def test_float16_beside_its_master() -> None:
    x = normal(300) * 10.0 ** normal(300, seed=1)
    x[0], x[1], x[2] = math.nan, 1e30, 1e-7
    layout = layout_of(F16, 300, "master")
    stored, master = beside_of(x, layout, torch.empty(300, dtype=F16))
    assert same_bits(stored, x.half())
    assert same_bits(full_value(stored, layout, {"param_master": master}), x)
    assert master is not None
    assert master.data_ptr() != x.data_ptr()


def test_storing_refuses() -> None:
    param = torch.zeros(3, dtype=BF16)
    with pytest.raises(TypeError, match=r"x: found torch\.bfloat16"):
        beside_of(param, BESIDES["master"], param)
    with pytest.raises(ValueError, match=r"x: found shape \(2,\), accepted: \(3,\)"):
        beside_of(torch.zeros(2), BESIDES["master"], param)


# --- Checkpoints ---------------------------------------------------------------------------------

NAMES = ("exp_avg", "exp_avg_sq", "exp_inf")
FORMATS = {
    "fp32": (F32, layout_of(F32, LARGE, None)),
    "fp32 bf16": (F32, layout_of(F32, LARGE, None, state_dtype=BF16)),
    "fp32 8bit": (F32, layout_of(F32, LARGE, "8bit")),
    "bf16": (BF16, layout_of(BF16, LARGE, "bf16")),
    "bf16 fp32": (BF16, layout_of(BF16, LARGE, "bf16", state_dtype=F32)),
    "fp16": (F16, layout_of(F16, LARGE, None)),
    "fp16 master": (F16, layout_of(F16, LARGE, "master")),
    "master": (BF16, layout_of(BF16, LARGE, "master")),
    "split": (BF16, layout_of(BF16, LARGE, "split")),
    "split bf16": (BF16, layout_of(BF16, LARGE, "split", state_dtype=BF16)),
    "kahan": (BF16, layout_of(BF16, LARGE, "kahan")),
    "8bit": (BF16, layout_of(BF16, LARGE, "8bit")),
    "8bit 16": (BF16, layout_of(BF16, LARGE, "8bit", remainder_bits=16)),
}
LAID = {
    "plain": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
}


def values_of(kind: str) -> Tensor:
    x = normal(21, 10, seed=KINDS.index(kind)) * 10.0 ** normal(21, 10, seed=7)
    return x if kind == "signed" else x.abs()


def weights() -> Tensor:
    x = normal(21, 10, seed=9) * 10.0 ** normal(21, 10, seed=10)
    x[0, :4] = torch.tensor([0.0, -0.0, math.inf, math.nan])
    # Halfway between two of bfloat16, and just below: where an 8-bit remainder is not enough.
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F807F90]).to(torch.int32)
    x[1, :4] = ties.view(F32)
    x[2, :4] = -ties.view(F32)
    return x


def in_format(name: str, laid: str = "plain") -> tuple[Tensor, dict[str, Any]]:
    """A parameter and its state as they are after steps in a format."""
    dtype, layout = FORMATS[name]
    x = LAID[laid](weights())
    param, array = beside_of(x, layout, torch.empty_like(x, dtype=dtype))
    state: dict[str, Any] = {"step": torch.tensor(3.0), "param_ema": x.clone()}
    for key, kind in zip(NAMES, KINDS, strict=True):
        value = LAID[laid](values_of(kind))
        if layout.state_dtype is None:
            state[code_key(key)], state[scale_key(key)] = encode_state(value, kind)
        else:
            state[key] = value.to(layout.state_dtype)
    if array is not None:
        state[layout.beside_key] = array
    return param, state


def of_its_own(saved: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in ("step", "param_ema")}


@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("name", FORMATS)
def test_a_state_in_its_own_format_is_copied(name: str, laid: str) -> None:
    param, saved = in_format(name, laid)
    loaded = convert_state(saved, torch.zeros_like(param), NAMES, KINDS, FORMATS[name][1])
    assert loaded.keys() == of_its_own(saved).keys()
    for key, value in loaded.items():
        assert same_bits(value, saved[key])
        assert value.data_ptr() != saved[key].data_ptr()


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize(
    ("saved_laid", "laid"),
    [("plain", "plain"), ("transposed", "plain"), ("plain", "transposed")],
)
def test_states_are_converted(source: str, target: str, saved_laid: str, laid: str) -> None:
    """As a decoding into float32 and an encoding; with codes where only the order is another."""
    _, saved = in_format(source, saved_laid)
    saved = {key: value for key, value in saved.items() if key not in BESIDE_KEYS}
    dtype, layout = FORMATS[target]
    param = LAID[laid](torch.zeros(21, 10, dtype=dtype))
    loaded = convert_state(saved, param, NAMES, KINDS, layout)
    for name, kind in zip(NAMES, KINDS, strict=True):
        if name in saved:
            value = saved[name]
        else:
            value = decode_state(saved[code_key(name)], saved[scale_key(name)], kind)
        value = LAID[laid](value.float())
        if layout.state_dtype is not None:
            assert same_bits(loaded.pop(name), value.to(layout.state_dtype))
            continue
        codes, scale = encode_state(value, kind)
        if not FORMATS[source][1].state_dtype and saved_laid == laid:
            codes, scale = saved[code_key(name)], saved[scale_key(name)]
        assert same_bits(loaded.pop(code_key(name)), codes)
        assert same_bits(loaded.pop(scale_key(name)), scale)
    assert not loaded  # where nothing was saved beside the parameter, nothing is


BF16_FORMATS = [name for name, (dtype, _) in FORMATS.items() if dtype == BF16]
WITH_ARRAY = [name for name in BF16_FORMATS if FORMATS[name][1].beside]


@pytest.mark.parametrize("target", WITH_ARRAY)
@pytest.mark.parametrize("source", WITH_ARRAY)
def test_arrays_beside_parameters_are_converted(source: str, target: str) -> None:
    """The value beside the parameter that was saved is as near as the format allows."""
    param, saved = in_format(source, "transposed")
    layout = FORMATS[target][1]
    loaded = convert_state(saved, param, NAMES, KINDS, layout)
    array = loaded[layout.beside_key]
    assert (array.dtype, array.stride()) == (layout.beside_dtype, param.stride())
    assert len(BESIDE_KEYS & loaded.keys()) == 1
    before = full_value(param, FORMATS[source][1], saved)
    after = full_value(param, layout, loaded)
    assert torch.equal(before.isnan(), after.isnan())
    apart = (before.view(torch.int32) - after.view(torch.int32)).abs()[~before.isnan()]
    # In last places of float32. Of two neighbours at the same distance a compensation may have
    # rounded to the one, from which a remainder of 16 bits ends one place short of halfway.
    halfway = 1 if source == "kahan" else 0
    if layout.beside in ("master", FORMATS[source][1].beside):
        assert not apart.any()
    elif layout.beside == "remainder16":
        assert apart.max() <= halfway
    elif layout.beside == "remainder8":
        assert apart.max() <= 0xFF + halfway
        assert apart.double().mean() < 90
    else:  # 8 bits of what is missing, itself at most half of a bfloat16's last place
        assert apart.max() <= 2**15 / 2**8


@pytest.mark.parametrize("way", [("split", "master"), ("8bit", "8bit 16"), ("8bit", "master")])
def test_the_way_through_a_wider_format_and_back(way: tuple[str, str]) -> None:
    near, far = way
    param, saved = in_format(near)
    there = convert_state(saved, param, NAMES, KINDS, FORMATS[far][1])
    back = convert_state(there, param, NAMES, KINDS, FORMATS[near][1])
    assert back.keys() == of_its_own(saved).keys()
    for key, value in back.items():
        if key.endswith("_scale"):
            assert torch.allclose(value, saved[key], rtol=2**-22, atol=0)
        else:
            assert same_bits(value, saved[key])


@pytest.mark.parametrize("target", ["fp32", "fp32 8bit", "bf16", "bf16 fp32", "fp16"])
@pytest.mark.parametrize("source", [*WITH_ARRAY, "fp16 master"])
def test_a_plain_parameter_drops_what_was_beside(source: str, target: str) -> None:
    _, saved = in_format(source)
    dtype, layout = FORMATS[target]
    loaded = convert_state(saved, torch.zeros(21, 10, dtype=dtype), NAMES, KINDS, layout)
    assert not BESIDE_KEYS & loaded.keys()


@pytest.mark.parametrize("beside", ["remainder16", "remainder8"])
@pytest.mark.parametrize("p", [0x0000, 0x8000, 0x3F80, 0xBF80, 0x7F7F, 0x7F80, 0xFF80])
@pytest.mark.parametrize("c", [0xBA83, 0x3A83, 0x4500, 0xC500, 0x7F80, 0x7FC0])
def test_a_stale_compensation_makes_no_nan_of_a_remainder(beside: str, p: int, c: int) -> None:
    """As beside a parameter that was set to zero: what does not fit is cut."""
    one = torch.zeros(1)
    param = in_order([p], one, BF16)
    saved = {"param_compensation": in_order([c], one, BF16)}
    layout = BESIDES[beside]
    value = full_value(param, layout, convert_state(saved, param, (), (), layout))
    assert not value.isnan().any()
    if param.isfinite():
        ulp = float(widen((p & 0x7FFF) + 1) - widen(p & 0x7FFF))
        assert abs(float(value) - float(param)) <= ulp / 2


@pytest.mark.parametrize("source", ["split", "8bit", "kahan"])
def test_a_remainder_completes_bfloat16_alone(source: str) -> None:
    _, saved = in_format(source)
    key = FORMATS[source][1].beside_key
    with pytest.raises(ValueError, match=f"'{key}': found beside a float16 parameter, accepted"):
        convert_state(
            saved, torch.zeros(21, 10, dtype=F16), NAMES, KINDS, FORMATS["fp16 master"][1]
        )


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("way", [BF16, F16, F32])
def test_a_master_is_known_by_its_values(dtype: torch.dtype, way: torch.dtype) -> None:
    """By way of another dtype too; one other value is enough."""
    master = weights()
    param = master.to(way).to(dtype)
    assert is_master_of(master, param)
    param[-1, -1] *= 1.02
    assert not is_master_of(master, param)


META = {"device": "meta"}
CODES = torch.zeros(21, 10, dtype=torch.int8)
GAPS = torch.zeros(21, 20, dtype=torch.int8)[:, ::2]
FLOATS = CODES.float()
REFUSED: list[tuple[str, str, Any, str]] = [
    # a format, the entry that is changed (None: removed), and what the refusal says
    ("8bit", "exp_avg_scale", None, "found nothing, accepted: float32 of shape (4,), one for 64"),
    ("8bit", "exp_avg_scale", torch.ones(3), "found float32 of shape (3,), accepted: float32 of"),
    ("8bit", "exp_avg_scale", torch.ones(4, 1), "found float32 of shape (4, 1)"),
    ("8bit", "exp_avg_scale", torch.tensor([1.0, 0, -2, 1]), "found -2.0, accepted: numbers >= 0"),
    ("8bit", "exp_avg_scale", torch.ones(4).double(), "found float64"),
    ("8bit", "exp_avg_scale", torch.ones(4, **META), "found float32"),
    ("8bit", "exp_avg_scale", 1.0, "found a float, accepted"),
    ("8bit", "exp_inf_scale", torch.ones(210), "found float32 of shape (210,)"),
    ("8bit", "exp_avg_sq_codes", CODES, "found int8 of shape (21, 10), accepted: uint8 of shape"),
    ("8bit", "exp_avg_codes", CODES.byte(), "found uint8 of shape (21, 10), accepted: int8 of"),
    ("8bit", "exp_avg_codes", CODES.short(), "found int16"),
    ("8bit", "exp_avg_codes", CODES.t(), "found int8 of shape (10, 21)"),
    ("8bit", "exp_avg_codes", FLOATS, "found float32 of shape (21, 10), accepted: int8 of shape"),
    ("fp32", "exp_avg", CODES, "found int8 of shape (21, 10), accepted: floating-point of shape"),
    ("fp32", "exp_avg_codes", CODES, "found beside 'exp_avg', accepted: one of them"),
    ("8bit", "exp_avg_codes", GAPS, "found codes with gaps in memory, accepted: dense"),
    ("fp32", "exp_avg_scale", torch.ones(4), "found float32 of shape (4,), accepted: none beside"),
    ("fp32", "exp_avg_sq", None, "found nothing, accepted: floating-point"),
    ("fp32", "exp_avg", FLOATS.flatten(), "found float32 of shape (210,)"),
    ("fp32", "exp_avg", FLOATS.to(**META), "found float32"),
    ("fp32", "exp_avg", FLOATS.to_sparse(), "found float32"),
    ("fp32", "exp_avg", [0.0], "found a list, accepted"),
    ("split", "param_remainder", CODES.flatten(), "found int8 of shape (210,), accepted: int16 or"),
    ("split", "param_remainder", CODES.bfloat16(), "found bfloat16"),
    (
        "master",
        "param_master",
        CODES.bfloat16(),
        "found bfloat16 of shape (21, 10), accepted: floa",
    ),
    ("master", "param_master", 0.0, "found a float"),
    ("master", "param_remainder", CODES, "found beside 'param_master', accepted: one of them"),
    ("kahan", "param_compensation", FLOATS, "found float32"),
    ("kahan", "param_compensation", CODES.bfloat16().to(**META), "found bfloat16"),
]


@pytest.mark.parametrize(("source", "key", "value", "message"), REFUSED)
@pytest.mark.parametrize("target", ["8bit", "bf16", "split"])
def test_what_is_in_no_format_is_refused(
    source: str, key: str, value: Any, message: str, target: str
) -> None:
    _, saved = in_format(source)
    saved[key] = value
    if value is None:
        del saved[key]
    param = torch.zeros(21, 10, dtype=BF16)
    with pytest.raises(ValueError, match=re.escape(f"'{key}': {message}")):
        convert_state(saved, param, NAMES, KINDS, FORMATS[target][1])


@pytest.mark.parametrize("name", FORMATS)
def test_export(name: str) -> None:
    _, saved = in_format(name, "transposed")
    found = decoded_states(saved, NAMES, KINDS)
    assert tuple(found) == NAMES
    for key, kind in zip(NAMES, KINDS, strict=True):
        if scale_key(key) in saved:
            value = decode_state(saved[code_key(key)], saved[scale_key(key)], kind)
        else:
            value = saved[key]
            assert found[key].data_ptr() != value.data_ptr()
        assert same_bits(found[key], value.float())
    if scale_key("exp_avg") in saved:
        del saved[scale_key("exp_avg")]
        with pytest.raises(ValueError, match="'exp_avg_scale': found nothing"):
            decoded_states(saved, NAMES, KINDS)
    with pytest.raises(ValueError, match="'exp_avg': found nothing"):
        decoded_states({}, NAMES, KINDS)
