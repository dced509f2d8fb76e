"""What a step does beside its rule has the bits of the float32 reference, on every engine.

It unscales, clips, averages and zeroes in one pass, over the lists of `problems`. Triton's
interpreter is slow and gets less to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    ADAM,
    BF16,
    CPU_ENGINES,
    DRAWS,
    F16,
    F32,
    FORMATS,
    HOST_ENGINES,
    REFERENCE_ENGINE,
    RULES,
    SGD,
    SIMD_LEVELS,
    TRITON_ENGINES,
    UNIFORM_FORMATS,
    Format,
    Parameter,
    Problem,
    Rule,
    State,
    array,
    assert_same_bits,
    differences,
    same_bits,
)

from fused_adamw import FusedAdamW, reference
from fused_adamw.engines import Engine
from fused_adamw.measurements import Measurements
from fused_adamw.registration import Member, RegisteredList
from fused_adamw.whole_step import EMA, StepOptions

SCALE = 3.0  # no power of two, so that dividing by it and by a clipped norm rounds
SIZES = (0, 1, 31, 32, 33, 0, 1023, 1024, 1025, 2047, 2048, 2049, 16383, 16384, 16385, 65537)

OPTIONS: dict[str, StepOptions] = {
    "unscaled": StepOptions(grad_scale=SCALE),
    "clipped": StepOptions(max_grad_norm=0.5),
    "hardly clipped": StepOptions(max_grad_norm=1e9),
    "unscaled and clipped": StepOptions(max_grad_norm=0.5, grad_scale=SCALE),
    "finite": StepOptions(skip_nonfinite=True, grad_scale=SCALE),
    "averaged": StepOptions(ema_decay=0.9),
    "averaged over a short time": StepOptions(ema_decay=0.3),  # torch.lerp's other branch
    "copied": StepOptions(ema_decay=0.0),
    "zeroed": StepOptions(zero_grads=True),
}
ALL = StepOptions(
    max_grad_norm=0.5, skip_nonfinite=True, ema_decay=0.9, zero_grads=True, grad_scale=SCALE
)

ALL_ENGINES = HOST_ENGINES | REFERENCE_ENGINE | TRITON_ENGINES

all_rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
all_formats = pytest.mark.parametrize("dtypes", FORMATS, ids="-".join)
uniform_formats = pytest.mark.parametrize("dtypes", UNIFORM_FORMATS, ids="-".join)


# --- Every option, rule, format and engine -------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@all_rules
def test_one_option(rule: Rule, name: str) -> None:
    """Parameters that were stepped before, and those that begin, of which one has no gradient."""
    groups = rule.groups(rule.compiled)
    parameters = [
        Parameter(37 + i, dtypes, group, step=(group + i) % 2, has_grad=i != 3)
        for group in range(len(groups))
        for i, dtypes in enumerate(UNIFORM_FORMATS)
    ]
    problem = Problem(rule, groups, parameters, gradients=2, options=OPTIONS[name])
    assert_same_bits(problem, HOST_ENGINES | REFERENCE_ENGINE, after=(1, 2, 3))
    if rule is ADAM:
        few = Problem(rule, groups, parameters[:6], gradients=2, options=OPTIONS[name])
        assert_same_bits(few, TRITON_ENGINES, after=(2,))


@all_formats
@all_rules
def test_all_options_at_once(rule: Rule, dtypes: Format) -> None:
    groups = rule.groups()
    parameters = [
        Parameter(37, dtypes, group, step=group % 3, has_grad=group % 5 != 4)
        for group in range(len(groups))
    ]
    problem = Problem(rule, groups, parameters, gradients=3, options=ALL)
    # After the third step all gradients are zero.
    assert_same_bits(problem, HOST_ENGINES | REFERENCE_ENGINE, after=(1, 2, 3, 4))
    if rule is ADAM or dtypes in UNIFORM_FORMATS:
        few = Problem(rule, groups[-2:], [Parameter(37, dtypes, g) for g in (0, 1)], options=ALL)
        assert_same_bits(few, TRITON_ENGINES)


# --- Sizes and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ALL, OPTIONS["averaged"]], ids=["all", "averaged"])
@all_formats
def test_ragged_sizes(dtypes: Format, options: StepOptions) -> None:
    groups = ADAM.groups(ADAM.compiled)
    parameters = [Parameter(numel, dtypes, i % len(groups)) for i, numel in enumerate(SIZES)]
    assert_same_bits(Problem(ADAM, groups, parameters, options=options), after=(1, 2))


@all_rules
def test_ragged_sizes_of_every_rule(rule: Rule) -> None:
    groups = rule.groups(rule.compiled)[-1:]
    parameters = [Parameter(numel, dtypes) for dtypes in UNIFORM_FORMATS for numel in SIZES]
    assert_same_bits(Problem(rule, groups, parameters, options=ALL))


@uniform_formats
def test_ragged_sizes_in_triton(dtypes: Format) -> None:
    sizes = (0, 1, 31, 33, 1025, 2049, 16385)
    parameters = [Parameter(numel, dtypes) for numel in sizes]
    assert_same_bits(Problem(ADAM, ADAM.groups()[:1], parameters, options=ALL), TRITON_ENGINES)


@all_formats
@all_rules
def test_unaligned_views(rule: Rule, dtypes: Format) -> None:
    """One array in turn off its boundary, all by the same, all by another."""
    groups = rule.groups(rule.compiled)[-1:]
    arrays = len(rule.states(groups[0])) + 3  # with param, gradient and average
    offsets = [
        tuple(off * (k == slot) for k in range(arrays)) for slot in range(arrays) for off in (1, 2)
    ]
    offsets += [(1,), (2,), (3,), (4,), (1, 2, 3, 0)]
    parameters = [Parameter(n, dtypes, offsets=off) for off in offsets for n in (5, 67, 300)]
    parameters.append(Parameter(2 * 16384 + 5, dtypes, offsets=(1,)))
    assert_same_bits(Problem(rule, groups, parameters, options=ALL))


@all_rules
def test_a_list_of_everything(rule: Rule) -> None:
    """All formats, groups, step counts, several launches of CUDA: the norm is of all of them."""
    groups = rule.groups()
    parameters = [
        Parameter(
            numel=i * 5 % 71,
            dtypes=FORMATS[i % len(FORMATS)],
            group=i % len(groups),
            step=(0, 1, 2, 9, 999)[i % 5],
            offsets=(0, 0, i % 3),
            has_grad=i % 4 != 1,
        )
        for i in range(900)
    ]
    problem = Problem(rule, groups, parameters, gradients=2, options=ALL)
    assert_same_bits(problem, HOST_ENGINES | REFERENCE_ENGINE, after=(1, 2))


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0)], ids=str)
def test_a_list_without_elements(sizes: Sequence[int]) -> None:
    problem = Problem(ADAM, ADAM.groups(), [Parameter(numel) for numel in sizes], options=ALL)
    assert_same_bits(problem, ALL_ENGINES)
    state = State(problem)
    state.step(HOST_ENGINES["cuda-on-host"])
    assert state.measurements.grad_norm == 0


def test_permuted_parameters_and_gradients() -> None:
    """The squares are added in the order of the parameter's memory, whatever that of its gradient.

    Through the optimizer, with two groups; what its arrays should be is computed here.
    """
    shape, order = (5, 33, 16), (2, 0, 1)
    rng = np.random.default_rng(3)
    values, grads = rng.standard_normal((2, 2, *shape)).astype(np.float32)
    common = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
    lrs = (0.1, 0.05)
    squares = [
        reference.squared_norm(
            reference.squared_norm_partials(np.ascontiguousarray(grad.transpose(order)), F32)
        )
        for grad in grads
    ]
    norm, factor = reference.clip(squares, 0.5, SCALE)
    assert norm > 1
    inverse = tuple(np.argsort(order))
    for engine in ("cpu", "cuda-on-host", "reference", *TRITON_ENGINES):
        params = []
        for value, grad in zip(values, grads, strict=True):
            param = torch.from_numpy(np.ascontiguousarray(value.transpose(order))).permute(inverse)
            params.append(param.requires_grad_())
            param.grad = torch.from_numpy(grad.copy())
            assert param.stride() != param.grad.stride()
        optimizer = FusedAdamW(
            [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)],
            betas=(0.9, 0.99),
            eps=1e-3,
            weight_decay=0.1,
            engine=engine,
            max_grad_norm=0.5,
            ema_decay=0.9,
            zero_grads=True,
        )
        optimizer.grad_scale = torch.tensor(SCALE)
        kept = [param.grad for param in params]
        optimizer.step()
        assert optimizer.grad_norm == np.float32(norm)
        for i, (param, lr) in enumerate(zip(params, lrs, strict=True)):
            zeros = np.zeros_like(values[i])
            wanted = reference.update(
                *("adam", values[i], grads[i], zeros, zeros),
                **common,
                grad_factor=factor,
                step=1,
                lr=lr,
                schedule_multiplier=1.0,
                decay="lr",
                maximize=False,
                amsgrad=False,
            )
            state = optimizer.state[param]
            found = [param.detach(), state["exp_avg"], state["exp_avg_sq"], state[EMA]]
            for want, have in zip((*wanted, wanted[0]), found, strict=True):
                np.testing.assert_array_equal(have.numpy(), want, err_msg=engine)
            assert state[EMA].stride() == param.stride()
            assert param.grad is kept[i]
            assert not kept[i].any()


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True], ids=["goes on", "is skipped"])
@pytest.mark.parametrize("values", ["special", "bits"])
@all_rules
def test_special_values(rule: Rule, values: str, skip: bool) -> None:
    """Infinities and NaNs in all arrays: the norm is a NaN, which reaches everything, or nothing.

    Formats are mixed, since the payload of one's NaN need not fit another.
    """
    groups = rule.groups(rule.compiled)
    parameters = [
        Parameter(300, dtypes, group % len(groups), step=group % 2)
        for group, dtypes in enumerate(FORMATS * 2)
    ]
    for clips in (None, 0.5):
        options = StepOptions(clips, skip, ema_decay=0.9, zero_grads=True, grad_scale=SCALE)
        problem = Problem(rule, groups, parameters, DRAWS[values], options=options)
        assert_same_bits(problem, HOST_ENGINES | REFERENCE_ENGINE)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], ids=hex)
def test_any_nan_reaches_every_format(bits: int) -> None:
    """Also one whose payload would round to a number."""

    def draw(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Any:
        if dtype == F32 and numel == 1:
            return np.array([bits], np.uint32).view(np.float32)
        return reference.store(rng.random(numel, np.float32), dtype)

    parameters = [Parameter(33, dtypes) for dtypes in FORMATS] + [Parameter(1)]
    options = StepOptions(max_grad_norm=1.0)
    problem = Problem(ADAM, ADAM.groups()[:1], parameters, draw, options=options)
    assert_same_bits(problem, HOST_ENGINES | REFERENCE_ENGINE)
    for engine in ALL_ENGINES.values():
        state = State(problem)
        state.step(engine)
        for i in range(len(parameters)):
            assert np.isnan(state.read(i, "param")).all()


@pytest.mark.parametrize("magnitude", [1e30, 1e-30], ids=["huge", "tiny"])
def test_squares_beyond_the_range_of_float32(magnitude: float) -> None:
    def draw(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Any:
        return rng.standard_normal(numel).astype(np.float32) * np.float32(magnitude)

    problem = Problem(ADAM, ADAM.groups()[:1], [Parameter(40000)], draw, options=ALL)
    assert_same_bits(problem, ALL_ENGINES)
    state = State(problem)
    state.step_by_reference()
    assert state.measurements.grad_norm is not None
    assert state.measurements.grad_norm / magnitude == pytest.approx(200 / SCALE, rel=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("skip", [False, True], ids=["goes on", "is skipped"])
def test_a_norm_that_float32_cannot_hold_is_infinite(skip: bool) -> None:
    """To what decides as to what is reported, though every gradient is finite."""

    def draw(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Any:
        return np.full(numel, 3e38, np.float32)

    options = StepOptions(max_grad_norm=1.0, skip_nonfinite=skip)
    problem = Problem(SGD, SGD.groups()[:1], [Parameter(4)], draw, options=options)
    assert_same_bits(problem, HOST_ENGINES | REFERENCE_ENGINE)
    state = State(problem)
    before = state.read(0, "param").copy()
    state.step_by_reference()
    assert state.measurements.grad_norm == math.inf
    assert np.isfinite(state.read(0, "param")).all()  # torch's coefficient is 0
    params = [torch.full((4,), 1.0, requires_grad=True) for _ in range(3)]
    for param, engine in zip(params, ("cpu", "cuda-on-host", "reference"), strict=True):
        param.grad = torch.full((4,), 3e38)
        optimizer = FusedAdamW(
            [param],
            lr=0.1,
            weight_decay=0.1,
            engine=engine,
            capturable=engine == "cuda-on-host",
            max_grad_norm=1.0,
            skip_nonfinite=skip,
            telemetry=True,
        )
        optimizer.step()
        assert optimizer.grad_norm == math.inf
        assert same_bits(param.detach(), params[0].detach())
        assert (param == (1.0 if skip else 0.99)).all()
    assert skip == (state.read(0, "param") == before).all()


@pytest.mark.parametrize("values", [np.inf, np.nan])
def test_one_bad_gradient_in_a_thousand_tensors_skips_everything(values: float) -> None:
    parameters = [Parameter(i % 40 + 1, FORMATS[i % len(FORMATS)], step=i % 2) for i in range(1000)]
    options = StepOptions(None, True, ema_decay=0.9)
    problem = Problem(ADAM, ADAM.groups()[:1], parameters, options=options)
    slot = problem.slots[777]["grad 0"]
    array(problem.memory, slot)[-1:] = reference.store(np.array([values], np.float32), slot.dtype)
    for name, engine in (HOST_ENGINES | REFERENCE_ENGINE).items():
        before, state = State(problem), State(problem)
        state.step(engine)
        assert state.measurements.grad_norm is not None
        assert not state.measurements.grad_norm.isfinite()
        before.measurements = state.measurements
        assert not differences(before, state), name


# --- The norm of many elements -------------------------------------------------------------------


def norms_of(grad: torch.Tensor, engines: Mapping[str, Engine]) -> dict[str, float]:
    """The norm of one gradient by each engine."""
    rule = {**SGD.loud, **SGD.variants()[0]}
    hyperparameters = [SGD.hyperparameters(**rule)]
    member = Member(torch.empty_like(grad), {}, (), 0, "parameter 0", counts=False)
    native = RegisteredList([member], "auto").native
    assert native.gather(hyperparameters, [grad])
    (bucket,) = native.buckets()
    return {
        name: norm_of(Measurements(), native, engine, bucket) for name, engine in engines.items()
    }


def norm_of(measured: Measurements, native: Any, engine: Engine, bucket: Any) -> float:
    squares = measured.squares(native, [engine], [bucket], 1)
    return measured.norm_of(squares, 1.0, torch.device("cpu"))


def float64_norm(grad: torch.Tensor) -> float:
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in grad.split(10**6)))


def test_norm_of_a_hundred_million_elements() -> None:
    grad = torch.randn(10**8, generator=torch.Generator().manual_seed(1))
    found = norms_of(grad, CPU_ENGINES)
    assert len(set(found.values())) == 1, found
    assert found[f"cpu {SIMD_LEVELS[-1]} 2 threads"] == pytest.approx(float64_norm(grad), rel=1e-12)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_norm_of_many_chunks(dtype: str) -> None:
    """More than a group's 256 lanes, of numbers so different that the order shows."""
    generator = torch.Generator().manual_seed(2)
    numel = 300 * 16384 + 777
    grad = torch.randn(numel, generator=generator) * 2.0 ** torch.randint(
        -8, 8, (numel,), generator=generator
    )
    grad = grad.to(getattr(torch, dtype))
    found = norms_of(grad, HOST_ENGINES | REFERENCE_ENGINE)
    assert len(set(found.values())) == 1, found
    assert found["reference"] == pytest.approx(float64_norm(grad), rel=1e-12)


# --- Drawn cases ---------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A problem of any rule with any options; `test_same_bits` draws hyperparameters."""
    rule = draw(st.sampled_from(RULES))
    groups = rule.groups()
    number = st.floats(1e-3, 1e3)
    parameter = st.builds(
        Parameter,
        numel=st.integers(0, 100) | st.sampled_from([n for n in SIZES if n < 20000]),
        dtypes=st.sampled_from(FORMATS),
        group=st.integers(0, len(groups) - 1),
        step=st.integers(0, 3),
        offsets=st.lists(st.integers(0, 9), min_size=1, max_size=7).map(tuple),
        has_grad=st.sampled_from([True, True, True, False]),
    )
    options = st.builds(
        StepOptions,
        max_grad_norm=st.none() | number,
        skip_nonfinite=st.booleans(),
        ema_decay=st.none() | st.floats(0, 1, exclude_max=True),
        zero_grads=st.booleans(),
        grad_scale=st.just(1.0) | number,
    )
    return Problem(
        rule,
        groups,
        draw(st.lists(parameter, min_size=1, max_size=6)),
        draw=DRAWS[draw(st.sampled_from(sorted(DRAWS)))],
        seed=draw(st.integers(0, 2**32 - 1)),
        gradients=draw(st.integers(1, 2)),
        options=draw(options),
    )


@settings(deadline=None, max_examples=100)
@given(problems())
def test_drawn_cases(problem: Problem) -> None:
    assert_same_bits(problem, HOST_ENGINES | REFERENCE_ENGINE, after=(1, 2))
