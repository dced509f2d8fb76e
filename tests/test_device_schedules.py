"""Schedules as programs for a device: the bits of the schedules themselves, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from drawn_schedules import LARGEST, lengths, schedules_with, whole_powers, whole_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_adamw import _C
from fused_adamw.device_schedules import program
from fused_adamw.schedules import (
    KINDS,
    Constant,
    CosineAnnealing,
    CosineWarmRestarts,
    LinearWarmup,
    Polynomial,
    Product,
    Schedule,
    Sequential,
    StepDecay,
)

MAX_ROWS = _C.SCHEDULE_MAX_WORDS // _C.SCHEDULE_ROW_WORDS
WARMUP, COSINE = LinearWarmup(10, eta_min=0.1), CosineAnnealing(90, eta_min=0.05, eta_max=0.7)
EXAMPLES: list[Schedule] = [
    Constant(0.3),
    StepDecay(7, gamma=0.7, eta_max=0.8),
    LinearWarmup(9, eta_min=0.1, eta_max=0.7),
    CosineAnnealing(50, eta_min=0.1, eta_max=0.7),
    CosineWarmRestarts(10, T_mult=3, eta_min=0.1, eta_max=0.7),
    Polynomial(40, power=3, eta_min=0.1, eta_max=0.7),
    Sequential((WARMUP, COSINE, Constant(0.01)), (10, 60)),
    Product((WARMUP, Sequential((StepDecay(3), Constant(0.9), COSINE), (4, 9)), COSINE)),
]
MORE_EXAMPLES: list[Schedule] = [
    LinearWarmup(0),
    CosineWarmRestarts(37, eta_max=0.3),
    CosineWarmRestarts(1, T_mult=2),
    CosineWarmRestarts(LARGEST - 1, T_mult=LARGEST),
    Polynomial(LARGEST, power=LARGEST),
    CosineAnnealing(100, eta_min=0.7, eta_max=0.7),
    # A sequence within another that ends it during its second part.
    Sequential((WARMUP, Sequential((COSINE, WARMUP, COSINE), (20, 70)), StepDecay(2)), (10, 60)),
    # What follows begins at 2^53, and within it at 2^53 + 1, which no step reaches.
    Sequential((COSINE, Sequential((WARMUP, Constant(5)), (1,))), (LARGEST,)),
    # The order of the factors shows in the rounding.
    Product((Constant(0.1), Product((Constant(0.7), Constant(0.3))))),
    Product((Product((Constant(0.1), Constant(0.7))), Constant(0.3))),
]


def turning_points(schedule: Schedule, begin: int = 0) -> Iterator[int]:
    """Steps at which something begins, ends or restarts."""
    yield begin
    for name in ("step_size", "total_iters", "T_max"):
        yield begin + getattr(schedule, name, 0)
    if isinstance(schedule, CosineWarmRestarts):
        length, start = schedule.T_0, begin
        for _ in range(60):
            start, length = start + length, length * schedule.T_mult
            yield start
    begins = [begin] * len(getattr(schedule, "schedules", ()))
    if isinstance(schedule, Sequential):
        begins[1:] = [begin + milestone for milestone in schedule.milestones]
    for part, start in zip(getattr(schedule, "schedules", ()), begins, strict=True):
        yield from turning_points(part, start)


def assert_same_bits(schedule: Schedule, steps: set[int]) -> None:
    words = program(schedule)
    for t in sorted(steps):
        assert _C.evaluate_schedule(words, t).hex() == schedule(t).hex(), t


def near(points: set[int]) -> set[int]:
    return {t for point in points for t in range(point - 2, point + 3) if 0 <= t <= LARGEST}


def test_examples_have_every_kind() -> None:
    assert [schedule.kind for schedule in EXAMPLES] == list(KINDS)


@pytest.mark.parametrize("schedule", [*EXAMPLES, *MORE_EXAMPLES], ids=lambda s: s.kind)
def test_examples(schedule: Schedule) -> None:
    turns = set(turning_points(schedule))
    assert_same_bits(schedule, {*range(1000), *near({*turns, LARGEST // 3, LARGEST})})


@settings(deadline=None, max_examples=500)
@given(schedules_with(whole_powers | lengths), st.sets(whole_steps, max_size=20))
def test_drawn_schedules(schedule: Schedule, steps: set[int]) -> None:
    assert_same_bits(schedule, {*range(20), *steps, *near({*turning_points(schedule), LARGEST})})


def nested(count: int) -> Schedule:
    """A product within a product and so on: all numbers are on the stack before the first is."""
    schedule: Schedule = WARMUP
    for i in range(count - 1):
        schedule = Product((Constant(1 - 2.0 ** -(i + 2)), schedule))
    return schedule


def sequence(count: int) -> Schedule:
    return Sequential((COSINE,) * count, tuple(range(5, 5 * count, 5)))


def test_the_largest_programs() -> None:
    deepest = (MAX_ROWS + 1) // 2
    for schedule in (nested(deepest), sequence(MAX_ROWS)):
        assert_same_bits(schedule, set(range(6 * MAX_ROWS)))


@pytest.mark.parametrize("make", [nested, sequence])
def test_refuses_programs_that_are_too_long(make) -> None:
    schedule = make(MAX_ROWS + 1)
    found = {nested: 2 * MAX_ROWS + 1, sequence: MAX_ROWS + 1}[make]
    message = rf"^schedule: found {found} parts .*, accepted on a device: at most {MAX_ROWS}$"
    with pytest.raises(ValueError, match=message):
        program(schedule)


def test_what_is_never_reached_takes_no_room() -> None:
    five_and_more = Sequential((WARMUP,) * MAX_ROWS, tuple(range(100, 99 + MAX_ROWS)))
    schedule = Product((Sequential((five_and_more, COSINE), (104,)), WARMUP))
    assert len(program(schedule)) == (5 + 1 + 2) * _C.SCHEDULE_ROW_WORDS + 1
    assert_same_bits(schedule, set(range(200)))


@pytest.mark.parametrize("power", [0.5, 2.5])
def test_refuses_powers_that_are_no_integers(power: float) -> None:
    schedule = Product((WARMUP, Sequential((COSINE, Polynomial(30, power)), (5,))))
    message = (
        rf"^schedule: found Polynomial.power = {power}, accepted on a device: an integer power"
    )
    with pytest.raises(ValueError, match=message):
        program(schedule)


@dataclass(frozen=True)
class Shifted(CosineAnnealing):
    def _weight(self, t: float) -> float:
        return super()._weight(t + 1)


@dataclass(frozen=True)
class Cubic(Schedule):
    kind = "cubic"

    def _multiplier(self, t: float) -> float:
        return t * t * t


@pytest.mark.parametrize("schedule", [Shifted(3), Cubic(), Sequential((COSINE, Cubic()), (4,))])
def test_refuses_classes_of_others(schedule: Schedule) -> None:
    message = r"^schedule: found (Shifted|Cubic)\(.*\), accepted on a device: 'constant', "
    with pytest.raises(TypeError, match=message):
        program(schedule)


def test_no_schedule_is_an_empty_program() -> None:
    assert program(None) == [0.0]
    with pytest.raises(ValueError, match="empty"):
        _C.evaluate_schedule(program(None), 0)
