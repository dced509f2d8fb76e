"""Schedules of every kind and nesting, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from fused_adamw.schedules import (
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

LARGEST = 2**53  # of steps and lengths

lengths = st.integers(1, 50) | st.integers(1, LARGEST)
whole_steps = st.integers(0, 100) | st.integers(0, LARGEST)
steps = whole_steps | st.floats(0, 1000)
etas = st.just(0.0) | st.just(1.0) | st.floats(0, 10)
whole_powers = st.integers(0, 5)
powers = whole_powers | st.floats(0, 5)


@st.composite
def ranges(draw: st.DrawFn) -> dict[str, float]:
    low, high = sorted([draw(etas), draw(etas)])
    return {"eta_min": low, "eta_max": high}


def between(kind: Callable[..., Schedule], *fields: st.SearchStrategy[Any]) -> Any:
    return st.builds(lambda limits, *values: kind(*values, **limits), ranges(), *fields)


restarts = between(CosineWarmRestarts, lengths, st.integers(1, 4) | lengths)


def bounded_with(powers: st.SearchStrategy[float]) -> Any:
    return st.one_of(
        between(LinearWarmup, st.just(0) | lengths),
        between(CosineAnnealing, lengths),
        restarts,
        between(Polynomial, lengths, powers),
    )


def composed(parts: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    lists = st.lists(parts, min_size=1, max_size=4)
    milestones = st.lists(lengths, min_size=3, max_size=3, unique=True)
    sequences = st.builds(
        lambda some, at: Sequential(tuple(some), tuple(sorted(at)[: len(some) - 1])),
        lists,
        milestones,
    )
    return sequences | st.builds(lambda some: Product(tuple(some)), lists)


def schedules_with(powers: st.SearchStrategy[float]) -> st.SearchStrategy[Schedule]:
    decays = st.builds(StepDecay, lengths, st.floats(0, 1), etas)
    simple = st.builds(Constant, etas) | decays | bounded_with(powers)
    return st.recursive(simple, composed, max_leaves=6)


bounded = bounded_with(powers)
any_schedule = schedules_with(powers)
