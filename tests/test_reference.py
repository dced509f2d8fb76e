"""The NumPy reference against the paper, against torch, and float32 against float64."""

from __future__ import annotations

import dataclasses
import decimal
import math
import sys
from fractions import Fraction
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from error_bounds import Bounded, bound_ratio, bounded_update
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fused_adamw import _C, reference
from fused_adamw.engines import reference as engine

DECAYS = ("lr", "decoupled", "l2", "proximal")
UNIT = 2.0**-53  # unit roundoff of float64
LARGEST = sys.float_info.max

# Loud, so that a decay in the wrong place cannot hide in the tolerance.
LOUD: dict[str, Any] = {
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "schedule_multiplier": 0.75,
}

# None so small that float64 underflows: the tolerances count relative errors.
hyperparameters = st.fixed_dictionaries(
    {
        "step": st.integers(1, 10) | st.integers(1, 10**6),
        "lr": st.floats(1e-4, 1.0),
        "beta1": st.sampled_from([0.0, 0.5, 0.9, 0.99]),
        "beta2": st.sampled_from([0.0, 0.5, 0.99, 0.9999]),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.1, 0.5]),
        "schedule_multiplier": st.just(0.0) | st.floats(1e-4, 1.0),
    }
)
seeds = st.integers(0, 2**32 - 1)


def draw_state(seed: int, size: int = 64) -> tuple[NDArray[np.float64], ...]:
    """A parameter, a gradient and two moments, as after some steps; some zeros among them."""
    rng = np.random.default_rng(seed)
    param, grad, exp_avg, root = rng.standard_normal((4, size)) * (rng.random((4, size)) < 0.9)
    return param, grad, exp_avg, root**2


def roundings(h: dict[str, float]) -> float:
    """Rounding errors, in units of UNIT, that two ways to compute a step may differ by.

    Counted along the longest paths, the two ways have under 24 in all. The bias corrections
    come on top: powers of repeated squaring are off by t - 1 roundings, a library's by 2, and
    1 - beta^t enlarges them by beta^t / (1 - beta^t); since t beta^t / (1 - beta^t) is at most
    beta / (1 - beta), that makes 3 / (1 - beta) for each of the moments.
    """
    return 24 + 3 / (1 - h["beta1"]) + 3 / (1 - h["beta2"])


# --- Truth: float64 against the paper


@given(hyperparameters, seeds, st.sampled_from(["l2", "decoupled", "lr"]))
def test_rearranged_form_is_algorithm_2(h: dict[str, Any], seed: int, decay: str) -> None:
    state = draw_state(seed)
    updated = reference.adamw(*state, **h, decay=decay, dtype=np.float64)
    literal = dict(h)
    if decay == "lr":  # the same algorithm, with the learning rate taken into lambda
        literal["weight_decay"] = h["lr"] * h["weight_decay"]
    paper = reference.algorithm_2(*state, **literal, decay="l2" if decay == "l2" else "decoupled")

    np.testing.assert_array_equal(updated.exp_avg, paper.exp_avg)
    np.testing.assert_allclose(updated.exp_avg_sq, paper.exp_avg_sq, rtol=4 * UNIT, atol=0)
    decayed = literal["schedule_multiplier"] * literal["weight_decay"]
    moved = np.abs(paper.param - state[0]) + decayed * np.abs(state[0])
    tolerance = roundings(h) * UNIT * (np.abs(state[0]) + moved)
    assert np.all(np.abs(updated.param - paper.param) <= tolerance)


@given(hyperparameters, seeds)
def test_proximal_step_is_its_closed_form(h: dict[str, Any], seed: int) -> None:
    state = draw_state(seed)
    updated = reference.adamw(*state, **h, decay="proximal", dtype=np.float64)
    undecayed = reference.algorithm_2(*state, **{**h, "weight_decay": 0.0}).param
    closed_form = undecayed / (1 + h["schedule_multiplier"] * h["weight_decay"])
    tolerance = roundings(h) * UNIT * (np.abs(state[0]) + np.abs(undecayed - state[0]))
    assert np.all(np.abs(updated.param - closed_form) <= tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("decay", "factor"),
    [
        ("lr", 1 - 0.5 * 0.1 * 0.25),
        ("decoupled", 1 - 0.5 * 0.25),
        ("proximal", 1 / (1 + 0.5 * 0.25)),
    ],
)
def test_schedule_multiplier_scales_the_decay(decay: str, factor: float, dtype: Any) -> None:
    h = {**LOUD, "lr": 0.1, "weight_decay": 0.25, "schedule_multiplier": 0.5}
    param, zeros = np.linspace(-2, 2, 9, dtype=dtype), np.zeros(9, dtype)
    updated = reference.adamw(param, zeros, zeros, zeros, step=3, **h, decay=decay, dtype=dtype)
    np.testing.assert_array_equal(updated.param, param * dtype(factor))


@pytest.mark.parametrize("decay", DECAYS)
def test_schedule_multiplier_of_zero_only_averages(decay: str) -> None:
    param, grad, exp_avg, exp_avg_sq = draw_state(0)
    h = {**LOUD, "schedule_multiplier": 0.0}
    updated = reference.adamw(
        param, grad, exp_avg, exp_avg_sq, step=2, **h, decay=decay, dtype=np.float64
    )
    np.testing.assert_array_equal(updated.param, param)
    assert not np.array_equal(updated.exp_avg, exp_avg)


# --- Truth: float64 against torch ----------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("decay", "optimizer"), [("lr", "AdamW"), ("l2", "Adam")])
def test_float64_is_torch(decay: str, optimizer: str, amsgrad: bool, maximize: bool) -> None:
    """Six steps from zero states.

    There |m_hat| <= sqrt(t v_hat) (Cauchy-Schwarz), so each step moves a parameter by lr sqrt(t)
    at most, and all of them by less than steps^1.5 lr. With gradients between 1/2 and 2 in size an
    error in the parameter comes back through L2 as lr weight_decay / 0.3 of itself, and is small.
    """
    steps = 6
    h = {**LOUD, "schedule_multiplier": 1.0}
    rng = np.random.default_rng(1)
    arrays: list[Any] = [rng.uniform(-1, 1, 64), np.zeros(64), np.zeros(64)]
    arrays.append(np.zeros(64) if amsgrad else None)
    tensor = torch.tensor(arrays[0], requires_grad=True)
    torch_optimizer = getattr(torch.optim, optimizer)(
        [tensor],
        lr=h["lr"],
        betas=(h["beta1"], h["beta2"]),
        eps=h["eps"],
        weight_decay=h["weight_decay"],
        amsgrad=amsgrad,
        maximize=maximize,
        foreach=False,
    )
    for step in range(1, steps + 1):
        grad = rng.uniform(0.5, 2, 64) * rng.choice([-1, 1], 64)
        tensor.grad = torch.tensor(grad)
        torch_optimizer.step()
        arrays = list(
            reference.adamw(
                arrays[0],
                grad,
                *arrays[1:],
                step=step,
                **h,
                decay=decay,
                maximize=maximize,
                dtype=np.float64,
            )
        )
    tolerance = steps * roundings(h) * UNIT
    state = torch_optimizer.state[tensor]
    names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    largest = (1 + steps**1.5 * h["lr"], 2, 4, 4)
    for name, ours, size in zip(names, arrays, largest, strict=True):
        if ours is None:
            continue
        theirs = tensor.detach() if name == "param" else state[name]
        np.testing.assert_allclose(
            ours, theirs.numpy(), rtol=0, atol=tolerance * size, err_msg=name
        )


# --- Bits: float32 -------------------------------------------------------------------------------


@given(hyperparameters, st.sampled_from(DECAYS), st.booleans())
def test_coefficients_are_rounded_once(h: dict[str, Any], decay: str, maximize: bool) -> None:
    wide = reference.adam_coefficients(np.float64, **h, decay=decay, maximize=maximize)
    narrow = reference.adam_coefficients(np.float32, **h, decay=decay, maximize=maximize)
    for field in dataclasses.fields(wide):
        assert getattr(narrow, field.name).dtype == np.float32
        assert getattr(narrow, field.name) == np.float32(getattr(wide, field.name))


@given(st.floats(0.5, 1.0, exclude_max=True), st.integers(0, 300))
def test_power_is_a_product_of_roundings(base: float, exponent: int) -> None:
    exact = Fraction(base) ** exponent
    tolerance = (1 + Fraction(UNIT)) ** max(exponent - 1, 0) - 1
    assert abs(Fraction(reference.power(base, exponent)) - exact) <= tolerance * exact


@given(st.floats(0, 20_000) | st.floats(0, 30) | st.integers(0, 20_000).map(float))
def test_power_of_0_96_is_within_two_ulp(x: float) -> None:
    computed = reference.power_of_0_96(x)
    if x >= 17353:
        assert computed == 0.0
    else:
        # Of the number that 0.96 is in binary64.
        exact = decimal.Context(prec=60).power(*map(decimal.Decimal.from_float, (0.96, x)))
        ulp = math.ulp(float(exact))
        assert abs(Fraction(computed) - Fraction(exact)) <= 2 * Fraction(ulp)


def test_power_of_0_96_ends_where_it_is_tiny() -> None:
    assert reference.power_of_0_96(math.nextafter(17353.0, 0.0)) < 2.0**-1021
    assert reference.power_of_0_96(math.inf) == 0.0


@given(st.integers(1, 1000) | st.integers(1, 2**53), st.floats(0, 1) | st.floats(0, LARGEST))
def test_momentum_schedule_has_the_bits_of_the_extension(step: int, momentum_decay: float) -> None:
    beta1 = 1 - UNIT
    mu = reference.momentum_schedule(beta1, momentum_decay, step)
    h = {**LOUD, "beta1": beta1, "momentum_decay": momentum_decay, "decay": "lr"}
    flags = {"scheduled_average": False, "maximize": False}
    assert _C.Hyperparameters("nadam", {**h, **flags}).coefficients(step, 1.0)[1] == mu
    # In units: half of 2 from the power here, half of 1 from the library's, and on both sides
    # half of one from the difference and from the product.
    library = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    assert abs(mu - library) <= 4 * UNIT


@pytest.mark.parametrize(
    ("decay", "amsgrad", "maximize"), list(product(DECAYS, [False, True], [False, True]))
)
def test_float32_rounds_every_operation(decay: str, amsgrad: bool, maximize: bool) -> None:
    """The contract's operations one by one, in float64 and then rounded.

    The detour rounds as float32 itself does: its 53 bits are more than twice 24 and two.
    """

    def rounded(value: Any) -> Any:
        return np.float32(value).astype(np.float64)

    p, g, m, v = map(rounded, draw_state(2, 500))
    x = rounded(draw_state(3, 500)[3])
    h = {**LOUD, "step": 7, "decay": decay, "maximize": maximize}
    updated = reference.adamw(p, g, m, v, x if amsgrad else None, **h)

    coefficients = dataclasses.asdict(reference.adam_coefficients(np.float32, **h))
    k = SimpleNamespace(**{name: np.float64(value) for name, value in coefficients.items()})
    sign = -1.0 if maximize else 1.0
    g = sign * g
    if decay == "l2":
        g = rounded(g + rounded(sign * k.l2 * p))
    m = rounded(rounded(k.b1 * m) + rounded(sign * k.c1 * g))
    v = rounded(rounded(k.b2 * v) + rounded(rounded(k.c2 * g) * g))
    x = np.maximum(x, v)
    root = rounded(np.sqrt(x if amsgrad else v))
    quotient = rounded(rounded(k.a * m) / rounded(root + k.eps))
    p = rounded(rounded(k.d * p) - quotient)
    for ours, expected in zip(updated, (p, m, v, x if amsgrad else None), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, expected)


def test_amsgrad_propagates_nan() -> None:
    nan = np.nan
    ones = np.ones(4)
    exp_avg_sq, maximum = np.array([1.0, nan, 1.0, 1.0]), np.array([0.0, 5.0, nan, 5.0])
    updated = reference.adamw(ones, ones, ones, exp_avg_sq, maximum, step=1, **LOUD)
    np.testing.assert_array_equal(updated.max_exp_avg_sq, [1.0, nan, nan, 5.0])
    np.testing.assert_array_equal(np.isnan(updated.param), [False, True, True, False])


def test_weight_decay_of_zero_does_not_touch_the_gradient() -> None:
    """Multiplying by it would turn an infinite parameter's gradient into NaN."""
    h = {**LOUD, "weight_decay": 0.0}
    updated = reference.adamw([np.inf], [1.0], [0.0], [0.0], step=1, **h, decay="l2")
    assert updated.exp_avg[0] == np.float32(1 - h["beta1"])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)])
def test_shapes_are_kept_and_inputs_untouched(shape: tuple[int, ...]) -> None:
    arrays = [np.ones(shape, np.float32) for _ in range(5)]
    for array in reference.adamw(*arrays, step=1, **LOUD):
        assert isinstance(array, np.ndarray)
        assert array.shape == shape
        assert array.dtype == np.float32
    assert all(np.array_equal(array, np.ones(shape)) for array in arrays)


def test_unknown_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="decay"):
        reference.adamw(1.0, 1.0, 1.0, 1.0, step=1, **LOUD, decay="weight")


# --- Error of float32 ----------------------------------------------------------------------------


def run_with_bounds(
    seed: int,
    steps: int,
    h: dict[str, Any],
    *,
    amsgrad: bool = False,
    scale: float = 1.0,
    param_dtype: str = "float32",
    state_dtype: str = "float32",
) -> tuple[list[Any], list[Any], list[Any]]:
    """Computes, from the same state, what an engine would hold, its bounds, and the truth."""
    rng = np.random.default_rng(seed)

    def draw(dtype: str) -> Any:
        values = (scale * rng.standard_normal(256)).astype(np.float32)
        return reference.load(reference.store(values, dtype), dtype)

    zeros = np.zeros(256, np.float32)
    engine_state: list[Any] = [draw(param_dtype), zeros, zeros, zeros if amsgrad else None]
    bounded, truth = list(engine_state), list(engine_state)
    dtypes = (param_dtype, state_dtype, state_dtype, state_dtype)
    present = 4 if amsgrad else 3
    for step in range(1, steps + 1):
        grad = draw("float32")
        values = reference.adamw(engine_state[0], grad, *engine_state[1:], step=step, **h)
        engine_state = [
            None if array is None else reference.load(reference.store(array, dtype), dtype)
            for array, dtype in zip(values, dtypes, strict=True)
        ]
        bounded = bounded_update(
            "adam",
            bounded[0],
            grad,
            *bounded[1:present],
            step=step,
            amsgrad=amsgrad,
            param_dtype=param_dtype,
            state_dtype=state_dtype,
            **{"decay": "lr", **h},
        )
        truth = list(reference.adamw(truth[0], grad, *truth[1:], step=step, **h, dtype=np.float64))
    return engine_state[:present], bounded[:present], truth[:present]


@pytest.mark.parametrize(
    ("decay", "amsgrad", "maximize"), list(product(DECAYS, [False, True], [False, True]))
)
@pytest.mark.parametrize("steps", [1, 10])
def test_float32_is_within_a_tight_bound(
    steps: int, decay: str, amsgrad: bool, maximize: bool
) -> None:
    h = {**LOUD, "eps": 1e-8, "decay": decay, "maximize": maximize}
    ours, bounded, truth = run_with_bounds(steps, steps, h, amsgrad=amsgrad)
    for actual, bound, exact in zip(ours, bounded, truth, strict=True):
        np.testing.assert_array_equal(bound.value, exact)
        # At most 1, as it is a bound; not far below, as it would judge nothing.
        assert 0.05 < bound_ratio(actual, bound) <= 1
        assert np.all(np.isfinite(bound.error))


@given(
    hyperparameters,
    seeds,
    st.sampled_from(DECAYS),
    st.booleans(),
    st.sampled_from([1e-30, 1e-19, 1e-5, 1.0, 1e4, 1e18, 1e25]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_bound_holds_everywhere(
    h: dict[str, Any],
    seed: int,
    decay: str,
    amsgrad: bool,
    scale: float,
    param_dtype: str,
    state_dtype: str,
) -> None:
    """Also where squares become denormal or overflow, and where storage rounds once more."""
    values = {name: value for name, value in h.items() if name != "step"}
    ours, bounded, _ = run_with_bounds(
        seed,
        3,
        {**values, "decay": decay},
        amsgrad=amsgrad,
        scale=scale,
        param_dtype=param_dtype,
        state_dtype=state_dtype,
    )
    assert all(bound_ratio(*pair) <= 1 for pair in zip(ours, bounded, strict=True))


def test_bound_is_infinite_where_the_denominator_may_vanish() -> None:
    h = {**LOUD, "eps": 0.0}
    grad = np.array([0.0, 1e-30, 1.0], np.float32)
    zeros = np.zeros(3)
    param, *_ = bounded_update("adam", np.ones(3), grad, zeros, zeros, step=1, decay="lr", **h)
    np.testing.assert_array_equal(np.isinf(param.error), [True, True, False])


@given(seeds)
def test_bounds_of_single_operations(seed: int) -> None:
    """Operands anywhere within their bounds keep the result within its bound."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((2, 200)) * 10.0 ** rng.integers(-25, 15, (2, 200))
    error = np.abs(value) * 10.0 ** rng.uniform(-8, 1, (2, 200))
    float32 = (value + error * rng.choice([-1, 1, 0.5, 0], (2, 200))).astype(np.float32)
    error = np.maximum(error, np.abs(float32 - value))
    a, b = (Bounded(*pair) for pair in zip(value, error, strict=True))
    root = Bounded(np.abs(value[0]), error[0])
    with np.errstate(all="ignore"):
        for actual, bound in (
            (float32[0] + float32[1], a + b),
            (float32[0] - float32[1], a - b),
            (float32[0] * float32[1], a * b),
            (float32[0] / float32[1], a / b),
            (np.sqrt(np.abs(float32[0])), root.sqrt()),
            (np.maximum(*float32), a.maximum(b)),
        ):
            assert bound_ratio(actual, bound) <= 1


# --- Storage -------------------------------------------------------------------------------------

ALL_16_BITS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


def assert_stored_as_torch(values: NDArray[np.float32]) -> None:
    """Checks both formats; a NaN must be a quiet NaN, of any payload."""
    for dtype, quiet in (("bfloat16", 0x7FC0), ("float16", 0x7E00)):
        ours = reference.store(values, dtype)
        assert ours.dtype == reference.STORAGE_DTYPES[dtype]
        bits = ours.view(np.uint16)
        expected = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.uint16).numpy()
        nan = np.isnan(values)
        np.testing.assert_array_equal(bits[~nan], expected[~nan])
        assert np.all(bits[nan] & quiet == quiet)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_pattern_survives(dtype: str) -> None:
    stored = ALL_16_BITS.view(reference.STORAGE_DTYPES[dtype])
    widened = reference.load(stored, dtype)
    assert widened.dtype == np.float32
    expected = torch.from_numpy(ALL_16_BITS).view(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(widened, expected)
    number = ~np.isnan(widened)
    back = reference.store(widened, dtype).view(np.uint16)
    np.testing.assert_array_equal(back[number], ALL_16_BITS[number])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_boundary_rounds_as_in_torch(dtype: str) -> None:
    """On and next to each number of the format and each midpoint between two of them."""
    numbers = reference.load(ALL_16_BITS.view(reference.STORAGE_DTYPES[dtype]), dtype)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    # Infinity begins at the midpoint between the largest number and the next power of two.
    power_of_two = 2.0**16 if dtype == "float16" else 2.0**128
    wide = np.concatenate([[-power_of_two], numbers.astype(np.float64), [power_of_two]])
    middles = (wide[1:] + wide[:-1]) / 2
    edges = np.concatenate([numbers, middles.astype(np.float32)])
    below, above = np.nextafter(edges, np.float32(-np.inf)), np.nextafter(edges, np.float32(np.inf))
    assert_stored_as_torch(np.concatenate([edges, below, above]))


def test_random_patterns_round_as_in_torch() -> None:
    bits = np.random.default_rng(4).integers(0, 2**32, 10**6, dtype=np.uint32)
    assert_stored_as_torch(bits.view(np.float32))


def test_float32_storage_is_the_identity() -> None:
    values = np.array([0.0, -0.0, 1e-45, -1e-40, np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    stored = reference.store(reference.load(values, "float32"), "float32")
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored.view(np.uint32), values.view(np.uint32))


# --- What else a step does -----------------------------------------------------------------------

NORM_SIZES = [0, 1, *(n + i for n in (128, 2048, 16384) for i in (-1, 0, 1)), 40000]


def draw_gradient(numel: int, dtype: str, seed: int = 0) -> NDArray[Any]:
    """Numbers of many magnitudes, so that nearly every order of their sum has other bits."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(numel) * np.exp2(rng.integers(-8, 8, numel))
    return reference.store(values.astype(np.float32), dtype)


@pytest.mark.parametrize("dtype", reference.STORAGE_DTYPES)
@pytest.mark.parametrize("numel", NORM_SIZES)
def test_squared_norm_is_the_sum_of_squares(numel: int, dtype: str) -> None:
    grad = draw_gradient(numel, dtype)
    x = reference.load(grad, dtype).astype(np.float64)
    partials = reference.squared_norm_partials(grad, dtype)
    assert len(partials) == -(-numel // 16384)
    for i, partial in enumerate(partials):
        truth = math.fsum(x[16384 * i : 16384 * (i + 1)] ** 2)
        assert partial == pytest.approx(truth, rel=1e-12, abs=0)
    assert reference.squared_norm(partials) == pytest.approx(math.fsum(x**2), rel=1e-12, abs=0)


@pytest.mark.parametrize("numel", [1, 127, 300, 2049, 5000, 16384])
def test_squared_norm_of_a_chunk_number_by_number(numel: int) -> None:
    """The order of the additions, in which any other has other bits."""
    grad = draw_gradient(numel, "float32")
    total = 0.0
    for segment in range(8):
        s = [0.0] * 32
        for i, x in enumerate(grad[2048 * segment : 2048 * (segment + 1)].tolist()):
            s[i % 32] += x * x
        for h in (16, 8, 4, 2, 1):
            for t in range(h):
                s[t] += s[t + h]
        total += s[0]
    assert reference.squared_norm_partials(grad, "float32") == [total]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_squared_norm_of_a_group_number_by_number(count: int) -> None:
    partials = np.random.default_rng(1).random(count)
    lanes = [0.0] * 256
    for i, partial in enumerate(partials.tolist()):
        lanes[i % 256] += partial
    for h in (128, 64, 32, 16, 8, 4, 2, 1):
        for t in range(h):
            lanes[t] += lanes[t + h]
    assert reference.squared_norm(partials) == lanes[0]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_squared_norm_shows_what_is_not_finite(bad: float) -> None:
    grad = draw_gradient(20000, "float32")
    grad[17000] = bad
    first, second = reference.squared_norm_partials(grad, "float32")
    assert np.isfinite(first)
    np.testing.assert_equal(second, abs(bad))
    np.testing.assert_equal(reference.squared_norm(np.array([first, second])), abs(bad))


SHAPES = [[(3, 5), (20000,)], [(), (0,), (130, 17)], [(40000,)]]  # of param groups


def clip_by_hand(gradients: list[list[NDArray[Any]]], **options: Any) -> reference.Clipped:
    partials = [
        [reference.squared_norm_partials(gradient, "float32") for gradient in group]
        for group in gradients
    ]
    return reference.clip([reference.squared_norm(np.concatenate(p)) for p in partials], **options)


@pytest.mark.parametrize("grad_scale", [1.0, 3.0, 65536.0])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1, 100.0, 1e9])
def test_clip_is_that_of_torch(max_grad_norm: float, grad_scale: float) -> None:
    rng = np.random.default_rng(2)
    gradients = [[np.asarray(rng.random(shape, np.float32)) for shape in g] for g in SHAPES]
    params = [torch.zeros(shape, dtype=torch.float64) for group in SHAPES for shape in group]
    for param, grad in zip(params, (x for group in gradients for x in group), strict=True):
        param.grad = torch.from_numpy(grad).double() / grad_scale
    norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)

    ours = clip_by_hand(gradients, max_grad_norm=max_grad_norm, grad_scale=grad_scale)
    assert isinstance(ours.grad_factor, np.float32)
    assert ours.norm == pytest.approx(norm.item(), rel=1e-12)
    for param, grad in zip(params, (x for group in gradients for x in group), strict=True):
        # One rounding, that of the factor, and 1e-12 for the norm.
        expected = param.grad.numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(
            grad * np.float64(ours.grad_factor), expected, rtol=2**-24 * 1.01
        )


def test_without_clipping_the_factor_only_unscales() -> None:
    for options in ({}, {"max_grad_norm": 3.0 + 1e-5}, {"max_grad_norm": np.inf}):
        assert reference.clip([9.0], **options) == (3.0, 1.0)
        norm, factor = reference.clip([9.0, 0.0], **options, grad_scale=10.0)
        assert (norm, factor) == (0.3, np.float32(0.1))


def test_clip_of_what_is_not_finite_is_that_of_torch() -> None:
    for squared in (np.inf, np.nan):
        param = torch.zeros(1)
        param.grad = torch.tensor([math.sqrt(squared)])
        norm = torch.nn.utils.clip_grad_norm_([param], 1.0)
        ours = reference.clip([1.0, squared, 1.0], 1.0)
        np.testing.assert_equal(ours.norm, norm.item())
        np.testing.assert_equal(ours.grad_factor, np.float32(1.0 / norm.item()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_factor_multiplies_the_gradient_before_the_rule(dtype: Any) -> None:
    p, g, m, v = draw_state(4)
    h = {**LOUD, "step": 3, "decay": "l2", "maximize": True}
    factor = 0.3
    found = reference.update("adam", p, g, m, v, dtype=dtype, grad_factor=factor, **h)
    scaled = dtype(factor) * g.astype(dtype)
    wanted = reference.update("adam", p, scaled, m, v, dtype=dtype, **h)
    for ours, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert (found[1] != reference.update("adam", p, g, m, v, dtype=dtype, **h)[1]).any()


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.5001, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ema_is_that_of_torch(dtype: Any, decay: float) -> None:
    average, param = np.random.default_rng(3).standard_normal((2, 1000)).astype(dtype)
    found = reference.ema(average, param, 1 - decay, dtype)
    assert found.dtype == dtype
    theirs = torch.from_numpy(average.copy())
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    update([theirs], [torch.from_numpy(param)], 1)
    # Both ways have at most four roundings, each of half a unit of numbers no larger than this.
    scale = np.abs(average) + np.abs(param)
    assert (np.abs(found - theirs.numpy()) <= 4 * np.finfo(dtype).eps * scale).all()
    if decay in (0.0, 1.0):
        np.testing.assert_array_equal(found, average if decay else param)


def test_ema_takes_the_two_branches_of_torch() -> None:
    """On either side of 1/2; the branches are equal but for their roundings."""
    for weight in (0.25, float(np.nextafter(np.float32(0.5), np.float32(0))), 0.5, 0.75):
        e, theta = np.random.default_rng(4).standard_normal((2, 5000)).astype(np.float32)
        w = np.float32(weight)
        near, far = e + w * (theta - e), theta - (np.float32(1) - w) * (theta - e)
        assert (near != far).any()
        wanted = near if weight < 0.5 else far
        np.testing.assert_array_equal(reference.ema(e, theta, weight), wanted)


def test_ema_with_a_weight_of_one_is_the_parameter() -> None:
    """Whatever the average was."""
    average = np.array([np.inf, np.nan, -np.inf, 1e38, 3.0], np.float32)
    param = np.array([1.0, -0.0, np.inf, -3.4e38, np.nan], np.float32)
    found = reference.ema(average, param, 1.0)
    assert found is not param
    np.testing.assert_array_equal(found.view(np.uint32), param.view(np.uint32))


# --- Engine --------------------------------------------------------------------------------------

FORMATS = [
    *product(["float32"], ["float32", "bfloat16", "float16"], ["float32"]),
    *product(["bfloat16"], ["float32", "bfloat16"], ["float32", "bfloat16"]),
    *product(["float16"], ["float32", "float16"], ["float32", "float16"]),
    *product(["float32"], ["float32", "bfloat16"], ["bfloat16"]),
]


@pytest.mark.parametrize("whole", [False, True], ids=["update", "average-zero"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", FORMATS, ids="-".join)
def test_engine_updates_memory_in_place(
    dtypes: tuple[str, str, str], amsgrad: bool, whole: bool
) -> None:
    rng = np.random.default_rng(5)
    slots = (*dtypes, dtypes[2], dtypes[2])[: 5 if amsgrad else 4]
    numels, groups, steps = [5, 0, 16], [1, 0, 0], [3, 1, 8]
    memory = [
        [reference.store(rng.random(numel, np.float32), dtype) for dtype in slots]
        for numel in numels
    ]
    before = [[array.copy() for array in arrays] for arrays in memory]
    averages = [rng.random(numel, np.float32) for numel in numels]
    old_averages = [average.copy() for average in averages]
    rows, factors = [0, 0, 1], [(0.3, 0.2), (1.7, 0.9)]
    bucket = SimpleNamespace(
        param_dtype=dtypes[0],
        grad_dtype=dtypes[1],
        state_dtype=dtypes[2],
        beside="",
        stochastic=False,
        addresses=np.array([[a.ctypes.data if a.size else 0 for a in row] for row in memory]),
        numels=np.array(numels),
        groups=np.array(groups),
        steps=np.array(steps),
        chunks=np.array([0, 1, 1]),
        scalars=np.zeros(len(steps)),
        rows=np.array(rows, np.int32),
        # The rule's own are computed anew.
        coefficients=np.array([[np.nan, *row, 0] for row in factors], np.float32),
        emas=np.array([a.ctypes.data if a.size else 0 for a in averages if whole], np.int64),
        keys=np.zeros(len(steps), np.uint64),
        extents=np.zeros((len(steps), 3), np.int64),
        zero_grads=whole,
        observed=0,
    )
    by_group = [
        {**LOUD, "decay": "lr", "maximize": False},
        {**LOUD, "decay": "l2", "maximize": True},
    ]
    values = [{**h, "amsgrad": amsgrad} for h in by_group]
    engine.run(bucket, [SimpleNamespace(rule="adam", values=h) for h in values])

    for i, (old, new) in enumerate(zip(before, memory, strict=True)):
        values = [reference.load(array, dtype) for array, dtype in zip(old, slots, strict=True)]
        grad_factor, ema_weight = factors[rows[i]]
        values[1] = np.float32(grad_factor) * values[1]
        updated = reference.adamw(*values, step=steps[i], **by_group[groups[i]])
        np.testing.assert_array_equal(new[1], np.zeros_like(old[1]) if whole else old[1])
        for index, array in zip((0, 2, 3, 4), updated, strict=True):
            if array is not None:
                np.testing.assert_array_equal(
                    new[index], reference.store(array, slots[index]), err_msg=f"slot {index}"
                )
        stored = reference.load(new[0], slots[0])
        average = reference.ema(old_averages[i], stored, ema_weight) if whole else old_averages[i]
        np.testing.assert_array_equal(averages[i], average)
