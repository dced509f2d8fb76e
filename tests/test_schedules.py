"""Schedules of the multiplier: closed forms, torch's schedulers, descriptions, command line."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_schedules import LARGEST, any_schedule, bounded, restarts, steps
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fused_adamw import schedules
from fused_adamw.__main__ import main
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
    cos_pi,
    from_description,
)

NAN, INF = math.nan, math.inf
UNIT = 2.0**-53  # unit roundoff of float64

WARMUP, COSINE = LinearWarmup(10), CosineAnnealing(90, eta_min=0.05)
EXAMPLES: list[Schedule] = [
    Constant(0.3),
    StepDecay(7, gamma=0.5, eta_max=0.8),
    LinearWarmup(9, eta_min=0.1, eta_max=0.7),
    CosineAnnealing(50, eta_min=0.1, eta_max=0.7),
    CosineWarmRestarts(10, T_mult=2, eta_min=0.1, eta_max=0.7),
    Polynomial(40, power=2.5, eta_min=0.1, eta_max=0.7),
    Sequential((WARMUP, COSINE), (10,)),
    Product((WARMUP, Sequential((StepDecay(3), Constant(), COSINE), (4, 9)))),
]
by_kind = pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: s.kind)


def test_examples_have_every_kind() -> None:
    assert [schedule.kind for schedule in EXAMPLES] == list(KINDS)


# --- Closed forms --------------------------------------------------------------------------------


def exact_cos_pi(x: float) -> Fraction:
    """The Taylor series to far below binary64; pi to 40 digits."""
    angle = Fraction(x) * Fraction("3.141592653589793238462643383279502884197")
    term, total = Fraction(1), Fraction(1)
    for k in range(1, 40, 2):
        term *= -(angle**2) / (k * (k + 1))
        total += term
    return total


@given(st.floats(0, 1))
def test_cosine(x: float) -> None:
    # The angle is off by 1.35 UNIT (pi's error and a rounding), of which the slope lets 0.75 pass;
    # the series rounds its square, its product and its difference.
    assert abs(Fraction(cos_pi(x)) - exact_cos_pi(x)) <= 2 * UNIT


def test_cosine_is_exact_where_it_can_be() -> None:
    assert [cos_pi(x) for x in (0.0, 0.5, 1.0)] == [1.0, 0.0, -1.0]


CLOSED_FORMS: list[tuple[Schedule, Callable[[float], float]]] = [
    (Constant(0.3), lambda t: 0.3),
    (StepDecay(7, 0.5, 0.8), lambda t: 0.8 * 0.5 ** math.floor(t / 7)),
    (LinearWarmup(8, eta_min=0.2, eta_max=0.6), lambda t: 0.2 + 0.4 * min(t / 8, 1)),
    (LinearWarmup(0), lambda t: 1.0),
    (
        CosineAnnealing(20, eta_min=0.2, eta_max=0.6),
        lambda t: 0.2 + 0.2 * (1 + math.cos(math.pi * min(t / 20, 1))),
    ),
    (
        CosineWarmRestarts(5, eta_min=0.2, eta_max=0.6),
        lambda t: 0.2 + 0.2 * (1 + math.cos(math.pi * (t % 5) / 5)),
    ),
    (
        CosineWarmRestarts(16, 2),  # restarts at 16, 48, 112; shown here is the third cycle
        lambda t: 0.5 * (1 + math.cos(math.pi * (t - 48) / 64)) if 48 <= t < 112 else NAN,
    ),
    (Polynomial(30, 3, eta_min=0.1), lambda t: 0.1 + 0.9 * (1 - min(t / 30, 1)) ** 3),
    (Polynomial(30, 0.5), lambda t: math.sqrt(1 - min(t / 30, 1))),
    (Product((WARMUP, StepDecay(20))), lambda t: min(t / 10, 1) * 0.1 ** (t // 20)),
    (
        Sequential((WARMUP, Constant(0.5), Polynomial(10)), (10, 25)),
        lambda t: t / 10 if t < 10 else 0.5 if t < 25 else max(1 - (t - 25) / 10, 0),
    ),
]


@pytest.mark.parametrize(
    ("schedule", "formula"), CLOSED_FORMS, ids=lambda c: getattr(c, "kind", "")
)
def test_closed_form(schedule: Schedule, formula: Callable[[float], float]) -> None:
    compared = 0
    for t in [*range(130), *(0.25 * quarter for quarter in range(500))]:
        expected = formula(t)
        if not math.isnan(expected):
            compared += 1
            # A dozen roundings of numbers up to 1. The root of what is left at the end enlarges
            # them, but not where 1 - t/30 is as it is here a multiple of 1/120.
            assert schedule(t) == pytest.approx(expected, abs=16 * UNIT)
    assert compared > 300


@given(bounded, steps)
def test_stays_between_eta_min_and_eta_max(schedule: Any, t: float) -> None:
    assert schedule.eta_min <= schedule(t) <= schedule.eta_max


def test_a_range_of_one_value_is_constant() -> None:
    # 0.7 w + 0.7 (1 - w) rounds to other numbers than 0.7 too.
    schedule = CosineAnnealing(100, eta_min=0.7, eta_max=0.7)
    assert {schedule(t) for t in range(200)} == {0.7}


@given(bounded)
def test_ends_are_exact(schedule: Any) -> None:
    first, last = schedule.eta_max, schedule.eta_min
    if isinstance(schedule, LinearWarmup):
        first, last = (last if schedule.total_iters else first), first
    if getattr(schedule, "power", 1.0) == 0:
        last = first
    assert schedule(0) == first
    if not isinstance(schedule, CosineWarmRestarts):
        assert schedule(getattr(schedule, "T_max", getattr(schedule, "total_iters", None))) == last
        assert schedule(LARGEST) == last


@given(restarts)
def test_restarts_at_the_exact_steps(schedule: CosineWarmRestarts) -> None:
    # In integers of any size; t ends at 2^53.
    start, length = 0, schedule.T_0
    for i in range(60):
        if start > LARGEST:
            break
        assert schedule.cycle(start) == (i, 0, float(length))
        assert schedule(start) == schedule.eta_max
        last = start + length - 1
        if last <= LARGEST:
            assert schedule.cycle(last) == (i, length - 1, float(length))
        middle = start + length // 2
        if middle <= LARGEST and length % 2 == 0:
            cos_is_zero = schedule.eta_max * 0.5 + schedule.eta_min * 0.5
            assert schedule(middle) == max(cos_is_zero, schedule.eta_min)  # it may underflow
        start, length = start + length, length * schedule.T_mult


def test_a_cycle_falls_and_the_next_jumps_to_eta_max() -> None:
    schedule = CosineWarmRestarts(10, 2, eta_min=0.1, eta_max=0.7)
    values = [schedule(t) for t in range(150)]
    rises = [t for t, (before, after) in enumerate(pairwise(values), start=1) if after > before]
    assert rises == [10, 30, 70]
    assert [values[t] for t in rises] == [0.7] * 3


@given(any_schedule, st.lists(steps, min_size=2, max_size=8))
def test_is_a_pure_function_of_t(schedule: Schedule, ts: list[float]) -> None:
    first = {t: schedule(t) for t in ts}
    shuffled = random.Random(0).sample(ts, len(ts))
    twin = dataclasses.replace(schedule)
    assert {t: schedule(t) for t in shuffled} == first
    assert {t: twin(t) for t in shuffled} == first
    assert hash(twin) == hash(schedule)
    assert all(type(value) is float for value in first.values())


@by_kind
def test_cannot_be_changed(schedule: Schedule) -> None:
    for field in dataclasses.fields(schedule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, field.name, 1)


@by_kind
def test_integers_and_floats_are_the_same_t(schedule: Schedule) -> None:
    for t in range(100):
        assert schedule(t) == schedule(float(t)) == schedule(np.int64(t))


# --- torch's schedulers --------------------------------------------------------------------------

AGAINST_TORCH: dict[str, tuple[Schedule, float, int, Callable[[Any], Any]]] = {
    # Schedule, learning rate at first, steps, torch's scheduler.
    "StepLR": (
        StepDecay(30, 0.5, eta_max=0.8),
        0.8,
        500,
        lambda opt: lr_scheduler.StepLR(opt, 30, gamma=0.5),
    ),
    "LinearLR": (
        LinearWarmup(300, eta_min=0.2, eta_max=0.8),
        0.8,
        500,
        lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.25, total_iters=300),
    ),
    # Ends at T_max, from where torch's rises again.
    "CosineAnnealingLR": (
        CosineAnnealing(400, eta_min=0.1, eta_max=0.8),
        0.8,
        401,
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 400, eta_min=0.1),
    ),
    "CosineAnnealingWarmRestarts": (
        CosineWarmRestarts(10, 2, eta_min=0.1, eta_max=0.8),
        0.8,
        700,
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 10, 2, eta_min=0.1),
    ),
    "CosineAnnealingWarmRestarts of one length": (
        CosineWarmRestarts(37),
        1.0,
        500,
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 37),
    ),
    "PolynomialLR": (
        Polynomial(300, 2.0, eta_max=0.8),
        0.8,
        500,
        lambda opt: lr_scheduler.PolynomialLR(opt, 300, power=2.0),
    ),
    "SequentialLR": (
        Sequential(
            (LinearWarmup(20, eta_min=0.2, eta_max=0.8), CosineAnnealing(300, eta_max=0.8)), (20,)
        ),
        0.8,
        321,
        lambda opt: lr_scheduler.SequentialLR(
            opt,
            [
                lr_scheduler.LinearLR(opt, start_factor=0.25, total_iters=20),
                lr_scheduler.CosineAnnealingLR(opt, 300),
            ],
            [20],
        ),
    ),
    "ChainedScheduler": (
        Product((LinearWarmup(50, eta_min=0.25), StepDecay(40, 0.5))),
        1.0,
        300,
        lambda opt: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.LinearLR(opt, start_factor=0.25, total_iters=50),
                lr_scheduler.StepLR(opt, 40, gamma=0.5),
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", AGAINST_TORCH)
def test_against_torch(name: str) -> None:
    schedule, lr, count, make = AGAINST_TORCH[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    for t in range(count):
        # torch multiplies its way from step to step: some roundings each, of numbers up to 1.
        tolerance = 8 * UNIT * (t + 2)
        assert schedule(t) == pytest.approx(optimizer.param_groups[0]["lr"], abs=tolerance), t
        optimizer.step()
        scheduler.step()


# --- Descriptions --------------------------------------------------------------------------------


def assert_plain(value: Any) -> None:
    if type(value) is dict:
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if type(value) is list:
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in (str, int, float)


@given(any_schedule)
def test_description_round_trip(schedule: Schedule) -> None:
    described = schedule.describe()
    assert_plain(described)
    assert from_description(described) == schedule
    assert from_description(json.loads(json.dumps(described))) == schedule
    assert described == schedule.describe(), "what was described has been changed"


@by_kind
def test_description_survives_checkpoints(schedule: Schedule) -> None:
    buffer = io.BytesIO()
    torch.save(schedule.describe(), buffer)
    buffer.seek(0)
    loaded = from_description(torch.load(buffer, weights_only=True))
    assert loaded == schedule
    assert [loaded(t) for t in range(100)] == [schedule(t) for t in range(100)]


def test_description_has_the_kind_and_all_fields() -> None:
    schedule = Sequential(
        (Constant(1), CosineWarmRestarts(np.int32(5), eta_min=np.float32(0.5))), [3]
    )
    assert schedule.describe() == {
        "kind": "sequential",
        "schedules": [
            {"kind": "constant", "eta": 1.0},
            {
                "kind": "cosine-warm-restarts",
                "T_0": 5,
                "T_mult": 1,
                "eta_min": 0.5,
                "eta_max": 1.0,
            },
        ],
        "milestones": [3],
    }
    assert_plain(schedule.describe())


@pytest.mark.parametrize(
    ("description", "kind", "mentions"),
    [
        (3, TypeError, ["description", "3"]),
        ({}, ValueError, ["kind", "None", "'cosine-annealing'"]),
        ({"kind": "cosine"}, ValueError, ["kind", "'cosine'", "'cosine-annealing'"]),
        ({"kind": ["constant"]}, ValueError, ["kind", "['constant']"]),
        ({"kind": "constant", "gamma": 1.0}, ValueError, ["constant", "'gamma'", "'eta'"]),
        ({"kind": "cosine-annealing", "eta_max": 1.0}, ValueError, ["no field 'T_max'"]),
        ({"kind": "constant", "eta": -1.0}, ValueError, ["Constant.eta", "-1.0"]),
        ({"kind": "constant", "eta": "1"}, TypeError, ["Constant.eta", "'1'"]),
        ({"kind": "product", "schedules": 3}, TypeError, ["Product.schedules", "3"]),
        ({"kind": "product", "schedules": [3]}, TypeError, ["description", "3"]),
        (
            {"kind": "product", "schedules": [{"kind": "constant", "T_0": 1}]},
            ValueError,
            ["constant", "'T_0'"],
        ),
    ],
)
def test_refuses_descriptions(description: Any, kind: type[Exception], mentions: list[str]) -> None:
    with pytest.raises(kind) as caught:
        from_description(description)
    for mention in mentions:
        assert mention in str(caught.value)


# --- Bad values ----------------------------------------------------------------------------------


def bad(kind: type[Schedule], field: str, *values: Any, **others: Any) -> list[Any]:
    """Cases in which `field` has a wrong value and `others` are right."""
    return [
        pytest.param(kind, {**others, field: value}, field, id=f"{kind.kind} {field}={value!r}")
        for value in values
    ]


def bad_numbers(kind: type[Schedule], field: str, *values: Any, **others: Any) -> list[Any]:
    return bad(kind, field, -0.1, NAN, INF, 10**400, "1", None, True, *values, **others)


def bad_counts(kind: type[Schedule], field: str, *values: Any, **others: Any) -> list[Any]:
    found = [-1, LARGEST + 1, 2.0, NAN, "1", None, True, *values]
    return bad(kind, field, *found, **others)


ONE = (Constant(),)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        *bad_numbers(Constant, "eta"),
        *bad_counts(StepDecay, "step_size", 0),
        *bad_numbers(StepDecay, "gamma", 1.1, step_size=1),
        *bad_numbers(StepDecay, "eta_max", step_size=1),
        *bad_counts(LinearWarmup, "total_iters"),
        *bad_counts(CosineAnnealing, "T_max", 0),
        *bad_numbers(CosineAnnealing, "eta_max", T_max=1),
        *bad_counts(CosineWarmRestarts, "T_0", 0),
        *bad_counts(CosineWarmRestarts, "T_mult", 0, 0.5, 1.5, T_0=1),
        *bad_numbers(CosineWarmRestarts, "eta_min", 1.5, T_0=1),
        *bad(CosineWarmRestarts, "eta_min", 0.5, T_0=1, eta_max=0.25),
        *bad_counts(Polynomial, "total_iters", 0),
        *bad_numbers(Polynomial, "power", 2.0**54, total_iters=1),
        *bad(Product, "schedules", (), [], None, 3, Constant(), (3,), (Constant,)),
        *bad(Sequential, "schedules", (), None, (3,), milestones=()),
        *bad(Sequential, "milestones", None, 3, (1, 2), (), (0,), (-1,), schedules=ONE * 2),
        *bad(Sequential, "milestones", (2, 2), (3, 2), (1, 2.0), (1, NAN), schedules=ONE * 3),
    ],
)
def test_refuses_values(kind: type[Schedule], fields: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        kind(**fields)
    message = str(caught.value)
    assert message.startswith(f"{kind.__name__}.{named}")
    assert "found" in message
    assert "accepted" in message


@by_kind
@pytest.mark.parametrize("t", [-1, -0.5, NAN, INF, LARGEST + 2, "1", None, torch.tensor(1)])
def test_refuses_t(schedule: Schedule, t: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^t: found .*, accepted: "):
        schedule(t)


def test_cycle_refuses_t() -> None:
    with pytest.raises(ValueError, match=r"^t: found -1, accepted: "):
        CosineWarmRestarts(1).cycle(-1)


# --- Command line --------------------------------------------------------------------------------


def words(schedule: Schedule) -> list[str]:
    """The schedule as the command line takes it."""
    found = [schedule.kind]
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        items = value if isinstance(value, tuple) else (value,)
        texts = [shlex.join(words(i)) if isinstance(i, Schedule) else str(i) for i in items]
        found += [f"--{field.name}", *texts]
    return found


@by_kind
def test_prints_a_table(schedule: Schedule, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every step where they are few, so that no short period is overlooked."""
    for count, printed in ((100, range(100)), (413, [*range(0, 413, 5), 412])):
        assert main(["schedule", *words(schedule), "--steps", str(count)]) == 0
        heading, *rows = capsys.readouterr().out.splitlines()
        assert heading.split() == ["step", "multiplier"]
        table = {int(t): float(eta) for t, eta in map(str.split, rows)}
        assert list(table) == list(printed)
        assert table == {t: pytest.approx(schedule(t), rel=1e-5) for t in table}  # six digits


def test_options_have_the_defaults_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    main(["schedule", "cosine-warm-restarts", "--T_0", "10"])
    short = capsys.readouterr().out
    main(["schedule", *words(CosineWarmRestarts(10)), "--steps", "100"])
    assert capsys.readouterr().out == short


def test_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = "cosine-warm-restarts --T_0 10 --T_mult 2 --steps 150 --plot new/restarts.png"
    command = [sys.executable, "-m", "fused_adamw", "schedule", *options.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "new/restarts.png" in result.stdout
    assert (tmp_path / "new" / "restarts.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = {}
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: drawn.update({path: self}))
    file = tmp_path / "restarts.png"
    main(["schedule", *words(EXAMPLES[4]), "--steps", "150", "--plot", str(file)])
    (line,) = drawn[file].axes[0].lines
    assert line.get_xdata().tolist() == list(range(150))
    assert line.get_ydata().tolist() == [EXAMPLES[4](t) for t in range(150)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("cosine", "'cosine-warm-restarts'"),
        ("cosine-warm-restarts", "--T_0"),
        ("cosine-warm-restarts --T_0 0", "CosineWarmRestarts.T_0: found 0"),
        ("cosine-warm-restarts --T_0 1.5", "--T_0"),
        ("constant --eta nan", "Constant.eta: found nan"),
        ("constant --gamma 1", "--gamma"),
        ("constant --steps 0", "--steps: found 0"),
        ("product --schedules cosine", "--schedules"),
        ("product --schedules 'constant --eta -1'", "Constant.eta: found -1.0"),
        ("product --schedules 'constant --eta'", "--schedules: argument --eta"),
        ("sequential --schedules constant constant --milestones", "Sequential.milestones"),
        ("constant --plot picture.docx", "picture.docx must end in one of"),
    ],
)
def test_refuses_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--plot" in options:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as caught:
        main(["schedule", *shlex.split(options)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_says_that_matplotlib_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as caught:
        main(["schedule", "constant", "--plot", "picture.png"])
    assert caught.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_help_describes_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, schedule in KINDS.items():
        with pytest.raises(SystemExit) as caught:
            main(["schedule", kind, "--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        for name in schedules.field_types(schedule):
            assert f"--{name}" in shown
            assert f"    {name}: " in shown, "the docstring says what it is"
