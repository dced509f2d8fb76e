r"""Schedules of eta_t, the multiplier that stands apart from the learning rate.

Loshchilov & Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), SetScheduleMultiplier
in Algorithms 1 and 2: eta scales the step and, in the decoupled convention, the decay.

A schedule is a value: equal when its fields are, hashable, without state. ``schedule(t)`` is the
multiplier of the step taken after t completed steps, t = 0, 1, ...; a fractional t is for plots.
All lengths are in steps. ``schedule.describe()`` is the same as plain data, from which
`from_description` makes an equal schedule. With r = eta_max - eta_min:

====================  ==============================================================================
Constant              eta
StepDecay             eta_max gamma^floor(t / step_size)
LinearWarmup          eta_min + r min(t / total_iters, 1)
CosineAnnealing       eta_min + r/2 (1 + cos(pi min(t / T_max, 1)))
CosineWarmRestarts    eta_min + r/2 (1 + cos(pi T_cur / T_i))
Polynomial            eta_min + r (1 - min(t / total_iters, 1))^power
Sequential            schedules[i](t - milestones[i - 1]) from milestones[i - 1] to milestones[i]
Product               the product of schedules[i](t)
====================  ==============================================================================

[note: the same eta everywhere] Every value is a closed form of t in binary64 by ``+ - * /``, floor,
comparisons and loops whose length t bounds, in the order written here, without fused multiply-add:
no math library has a say, so csrc/schedules/program.h returns the same bits, on a device too. The
one exception is a Polynomial whose power is no integer, which takes ``pow``. Counts of steps are
at most 2^53, where all integers are exact.
"""

from __future__ import annotations

import bisect
import itertools
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from fused_adamw import checks

# 1 / k!, exactly rounded: the Taylor coefficients of the cosine and the sine. On [0, pi/4] what
# is left out is below 2e-18, a hundredth of the rounding of the result.
_COSINE = tuple(1.0 / math.factorial(k) for k in range(16, 0, -2))
_SINE = tuple(1.0 / math.factorial(k) for k in range(17, 0, -2))


def _alternating(coefficients: tuple[float, ...], square: float) -> float:
    """``c[-1] - z (c[-2] - z (c[-3] - ...))`` with z = `square`."""
    result = 0.0
    for coefficient in coefficients:
        result = coefficient - square * result
    return result


def cos_pi(x: float) -> float:
    """``cos(pi x)`` for x in [0, 1], within 2^-52; exact at 0, 1/2 and 1. See the module's note."""
    if x > 0.5:
        return -cos_pi(1.0 - x)
    # Both differences with 1 and 1/2 are exact.
    angle = math.pi * (x if x <= 0.25 else 0.5 - x)
    square = angle * angle
    if x <= 0.25:
        return 1.0 - square * _alternating(_COSINE, square)
    return angle * _alternating(_SINE, square)


def integer_power(x: float, n: int) -> float:
    """``x**n`` for n >= 0 by repeated squaring from the lowest bit, as in every engine."""
    result = 1.0
    while n:
        if n & 1:
            result *= x
        x *= x
        n >>= 1
    return result


@dataclass(frozen=True)
class Schedule(ABC):
    """What all schedules have in common. Fields are checked and brought to plain types."""

    kind: ClassVar[str]

    def __call__(self, t: float) -> float:
        """Eta of the step taken after `t` completed steps, a finite number in [0, 2^53]."""
        return self._multiplier(checks.number("t", t, at_most=checks.LARGEST_COUNT))

    @abstractmethod
    def _multiplier(self, t: float) -> float:
        """Eta for a `t` that has been checked."""

    def describe(self) -> dict[str, Any]:
        """The kind and the fields as str, int, float, list and dict, for checkpoints and JSON."""
        described = {name: _described(getattr(self, name)) for name in field_types(type(self))}
        return {"kind": self.kind, **described}

    def _check_number(self, name: str, **limits: Any) -> None:
        self._replace(name, checks.number(self._full(name), getattr(self, name), **limits))

    def _check_count(self, name: str, **limits: Any) -> None:
        self._replace(name, checks.count(self._full(name), getattr(self, name), **limits))

    def _full(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _replace(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # only from __post_init__


@dataclass(frozen=True)
class Constant(Schedule):
    """The same multiplier at every step.

    Args:
        eta: the multiplier, >= 0.
    """

    kind = "constant"
    eta: float = 1.0

    def __post_init__(self) -> None:
        self._check_number("eta")

    def _multiplier(self, t: float) -> float:
        return self.eta


@dataclass(frozen=True)
class StepDecay(Schedule):
    """Falls by a factor every so many steps, as torch's StepLR.

    Args:
        step_size: steps between two decays, >= 1.
        gamma: the factor, in [0, 1].
        eta_max: the multiplier before the first decay, >= 0.
    """

    kind = "step-decay"
    step_size: int
    gamma: float = 0.1
    eta_max: float = 1.0

    def __post_init__(self) -> None:
        self._check_count("step_size")
        self._check_number("gamma", at_most=1.0)
        self._check_number("eta_max")

    def _multiplier(self, t: float) -> float:
        return self.eta_max * integer_power(self.gamma, int(t // self.step_size))


@dataclass(frozen=True)
class _Between(Schedule):
    """Eta_max where the weight is 1, eta_min where it is 0, both exactly; in between, between."""

    eta_min: float = field(default=0.0, kw_only=True)
    eta_max: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        self._check_number("eta_min")
        self._check_number("eta_max")
        if self.eta_min > self.eta_max:
            raise ValueError(
                f"{self._full('eta_min')}: found {self.eta_min}, "
                f"accepted: at most eta_max = {self.eta_max}"
            )

    def _multiplier(self, t: float) -> float:
        weight = self._weight(t)
        # Unlike eta_min + (eta_max - eta_min) weight, exact at both ends. Rounding may still leave
        # the interval in between, where the two are close.
        value = self.eta_max * weight + self.eta_min * (1.0 - weight)
        return min(max(value, self.eta_min), self.eta_max)

    @abstractmethod
    def _weight(self, t: float) -> float:
        """In [0, 1]."""


@dataclass(frozen=True)
class LinearWarmup(_Between):
    """Rises linearly from eta_min to eta_max and stays there, as torch's LinearLR.

    With eta_min = 0 the first step does nothing; total_iters = n - 1 with eta_min = 1/n is the
    common (t + 1)/n.

    Args:
        total_iters: the step at which eta_max is reached, >= 0.
        eta_min: the multiplier at first, >= 0.
        eta_max: the multiplier at last, >= eta_min.
    """

    kind = "linear-warmup"
    total_iters: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("total_iters", at_least=0)

    def _weight(self, t: float) -> float:
        return t / self.total_iters if t < self.total_iters else 1.0


@dataclass(frozen=True)
class CosineAnnealing(_Between):
    """Falls from eta_max to eta_min along half a cosine and stays there.

    torch's CosineAnnealingLR is the same up to T_max, but rises again thereafter.

    Args:
        T_max: the step at which eta_min is reached, >= 1.
        eta_min: the multiplier at last, >= 0.
        eta_max: the multiplier at first, >= eta_min.
    """

    kind = "cosine-annealing"
    T_max: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("T_max")

    def _weight(self, t: float) -> float:
        return 0.5 * (1.0 + cos_pi(min(t / self.T_max, 1.0)))


class Cycle(NamedTuple):
    """Where a step stands among restarts.

    Attributes:
        i: restarts so far.
        T_cur: steps since the last restart, in [0, T_i).
        T_i: length of the cycle in steps.
    """

    i: int
    T_cur: float
    T_i: float


@dataclass(frozen=True)
class CosineWarmRestarts(_Between):
    """Cycles of cosine annealing, each T_mult times as long as the one before: AdamWR, SGDWR.

    Loshchilov & Hutter, SGDR (arXiv 1608.03983); Decoupled Weight Decay Regularization, appendix.
    T_cur moves at every step: eta_max at the first step of a cycle, where it is 0; eta_min is only
    approached, since the last step has T_cur = T_i - 1. The same as torch's
    CosineAnnealingWarmRestarts.

    Args:
        T_0: length of the first cycle in steps, >= 1.
        T_mult: factor from one cycle's length to the next's, an integer >= 1.
        eta_min: the multiplier that cycles fall to, >= 0.
        eta_max: the multiplier that cycles start with, >= eta_min.
    """

    kind = "cosine-warm-restarts"
    T_0: int
    T_mult: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("T_0")
        self._check_count("T_mult")

    def cycle(self, t: float) -> Cycle:
        """The cycle that the step after `t` completed steps is in.

        Exact for every t: whole cycles, at most 53 since they at least double, are taken off one by
        one, which rounds nothing; no logarithm is involved.
        """
        return self._cycle(checks.number("t", t, at_most=checks.LARGEST_COUNT))

    def _cycle(self, t: float) -> Cycle:
        if self.T_mult == 1:
            whole, since = divmod(t, self.T_0)
            return Cycle(int(whole), since, float(self.T_0))
        i, since, length = 0, t, float(self.T_0)
        while since >= length:
            since -= length
            length *= self.T_mult
            i += 1
        return Cycle(i, since, length)

    def _weight(self, t: float) -> float:
        cycle = self._cycle(t)
        return 0.5 * (1.0 + cos_pi(cycle.T_cur / cycle.T_i))


@dataclass(frozen=True)
class Polynomial(_Between):
    """Falls from eta_max to eta_min as a power of the steps left; torch's PolynomialLR.

    Args:
        total_iters: the step at which eta_min is reached, >= 1.
        power: the exponent, >= 0; 1 is linear.
        eta_min: the multiplier at last, >= 0.
        eta_max: the multiplier at first, >= eta_min.
    """

    kind = "polynomial"
    total_iters: int
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("total_iters")
        self._check_number("power", at_most=checks.LARGEST_COUNT)

    def _weight(self, t: float) -> float:
        left = max(self.total_iters - t, 0.0) / self.total_iters
        if self.power.is_integer():
            return integer_power(left, int(self.power))
        return math.pow(left, self.power)


@dataclass(frozen=True)
class _Composition(Schedule):
    """Several schedules in one."""

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        accepted = "accepted: one or more schedules"
        if not isinstance(self.schedules, tuple | list):
            raise TypeError(f"{self._full('schedules')}: found {self.schedules!r}, {accepted}")
        if not self.schedules:
            raise ValueError(f"{self._full('schedules')}: found none, {accepted}")
        for i, schedule in enumerate(self.schedules):
            if not isinstance(schedule, Schedule):
                raise TypeError(
                    f"{self._full('schedules')}[{i}]: found {schedule!r}, accepted: a schedule"
                )
        self._replace("schedules", tuple(self.schedules))


@dataclass(frozen=True)
class Sequential(_Composition):
    """One schedule after another, each counting steps from its own start; torch's SequentialLR.

    Args:
        schedules: what to follow, in order.
        milestones: the steps at which the second, third, ... begin: one fewer than schedules,
            increasing, >= 1.
    """

    kind = "sequential"
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        name, expected = self._full("milestones"), len(self.schedules) - 1
        if not isinstance(self.milestones, tuple | list):
            raise TypeError(f"{name}: found {self.milestones!r}, accepted: a tuple of integers")
        if len(self.milestones) != expected:
            raise ValueError(
                f"{name}: found {len(self.milestones)} for {len(self.schedules)} schedules, "
                f"accepted: {expected}"
            )
        counts = tuple(checks.count(f"{name}[{i}]", m) for i, m in enumerate(self.milestones))
        if any(later <= earlier for earlier, later in itertools.pairwise(counts)):
            raise ValueError(f"{name}: found {counts}, accepted: increasing steps")
        self._replace("milestones", counts)

    def _multiplier(self, t: float) -> float:
        i = bisect.bisect_right(self.milestones, t)
        return self.schedules[i](t - self.milestones[i - 1] if i else t)


@dataclass(frozen=True)
class Product(_Composition):
    """The product of schedules at the same step, such as warm-up times cosine.

    Args:
        schedules: the factors, multiplied from the first to the last. Nothing keeps the product
            of huge multipliers finite; an optimizer refuses one that is not.
    """

    kind = "product"

    def _multiplier(self, t: float) -> float:
        result = 1.0
        for schedule in self.schedules:
            result *= schedule(t)
        return result


KINDS: dict[str, type[Schedule]] = {
    schedule.kind: schedule
    for schedule in (
        Constant,
        StepDecay,
        LinearWarmup,
        CosineAnnealing,
        CosineWarmRestarts,
        Polynomial,
        Sequential,
        Product,
    )
}


def field_types(schedule: type[Schedule]) -> dict[str, Any]:
    """Names and types of a kind's fields: int, float, tuple[int, ...], tuple[Schedule, ...]."""
    types = typing.get_type_hints(schedule)
    return {field.name: types[field.name] for field in fields(schedule)}


def field_defaults(schedule: type[Schedule]) -> dict[str, Any]:
    """The default values of those fields of a kind that need not be given."""
    return {field.name: field.default for field in fields(schedule) if field.default is not MISSING}


def _described(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.describe()
    return [_described(item) for item in value] if isinstance(value, tuple) else value


def from_description(description: Mapping[str, Any]) -> Schedule:
    """The schedule that `Schedule.describe` described.

    Raises:
        TypeError: not a mapping, or a value of another type; the message names it.
        ValueError: an unknown kind, an unknown or missing field, a value out of range; likewise.
    """
    if not isinstance(description, Mapping):
        raise TypeError(f"description: found {description!r}, accepted: what describe() returns")
    values = dict(description)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: found {kind!r}, accepted: {', '.join(map(repr, KINDS))}")
    schedule = KINDS[kind]
    types = field_types(schedule)
    defaults = field_defaults(schedule)
    accepted = f"accepted: {', '.join(map(repr, types))}"
    for name in values:
        if name not in types:
            raise ValueError(f"description of {kind}: found a field {name!r}, {accepted}")
    for name in types:
        if name not in values and name not in defaults:
            raise ValueError(f"description of {kind}: found no field {name!r}, {accepted}")
    for name, value in values.items():
        if types[name] == tuple[Schedule, ...] and isinstance(value, tuple | list):
            values[name] = tuple(map(from_description, value))
    return schedule(**values)
