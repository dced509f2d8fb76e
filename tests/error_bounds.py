"""A bound, derived and not tuned, of an engine's distance from the truth.

The truth is the update in float64, an engine's result the same operations in float32, both from the
same float32 state and the same gradients. `Bounded` carries through every operation the float64
value x and an error E such that the engine's value X obeys ``|X - x| <= E``. It starts from E = 0,
since the inputs are the same numbers, and from the known rounding errors of the coefficients.

Model. Each float32 operation is rounded once, to nearest:

    fl(y) = y(1 + d) + h,   |d| <= u = 2^-24,   |h| <= 2^-150,   while |fl(y)| is finite

h is nonzero only where a product or quotient becomes subnormal: sums are exact there, roots never
get there, and a product with an exact zero is exact. Negation and comparisons are exact.

Propagation. With A = a + Ea and B = b + Eb (errors as absolute values), before rounding:

    |A + B - (a + b)|  <=  Ea + Eb
    |A B - a b|        <=  |a| Eb + |b| Ea + Ea Eb
    |A / B - a / b|    =   |(A - a) - (a / b)(B - b)| / |B|  <=  (Ea + |a / b| Eb) / (|b| - Eb)
    |√A - √a|          =   |A - a| / (√A + √a)
                       <=  max(Ea / (√a + √(a + Ea)),  (a - L) / (√a + √L)),  L = max(a - Ea, 0)
    |max(A,B) - max(a,b)| <= max(Ea, Eb)

The quotient needs Eb < |b|, otherwise the denominator could vanish and the bound is infinite. The
root's two cases are A above and below a; A is not negative, as a second moment is a sum of squares
with positive weights. Let P be such a propagated error and c the float64 value of the result. The
engine's value before rounding is at most |c| + P, up to the rounding of c itself, so that

    E = P + u(|c| + P) [+ 2^-150].

The float64 side is rounded too, by less than 2^-53 |c|, and E is evaluated in float64, where sums
and products of non-negative terms lose less than 2^-48 of themselves. Both are covered by taking u
and 2^-150 a factor 1 + 2^-20 larger and E a factor 1 + 2^-40; the differences in denominators,
which may cancel, are first reduced by 2^-40 of the minuend. Where |c| + E exceeds the largest
number of the format the engine may overflow: the bound is infinite. So it is where x is not finite.

Results stored in bfloat16 or float16 are rounded once more, with that format's u and underflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fused_adamw import reference

FloatArray = NDArray[np.float64]

_SLACK = 2.0**-40


class Format(NamedTuple):
    """A binary format: unit roundoff, half of the smallest denormal, largest finite number."""

    unit: float
    underflow: float
    largest: float


FORMATS = {
    "float32": Format(2.0**-24, 2.0**-150, (2 - 2.0**-23) * 2.0**127),
    "bfloat16": Format(2.0**-8, 2.0**-134, (2 - 2.0**-7) * 2.0**127),
    "float16": Format(2.0**-11, 2.0**-25, 65504.0),
}


def _rounded(value: FloatArray, propagated: FloatArray, underflow: ArrayLike, to: str) -> Bounded:
    """Adds the rounding of one operation, whose result may underflow where told so."""
    form = FORMATS[to]
    grown = 1 + 2.0**-20
    error = propagated + form.unit * grown * (np.abs(value) + propagated)
    error = (error + np.where(underflow, form.underflow * grown, 0.0)) * (1 + _SLACK)
    representable = np.abs(value) + error <= form.largest  # False for NaN too
    return Bounded(value, np.where(representable, error, np.inf))


@dataclass(frozen=True, eq=False)
class Bounded:
    """A float64 value and the largest distance from it of the engine's value, elementwise."""

    value: FloatArray
    error: FloatArray

    @classmethod
    def exact(cls, values: ArrayLike) -> Bounded:
        """Numbers that engine and truth share, such as a float32 state or gradient."""
        array = np.asarray(values, np.float64)
        return cls(array, np.where(np.isfinite(array), 0.0, np.inf))

    @classmethod
    def coefficient(cls, value: float | np.floating[Any]) -> Bounded:
        """A binary64 coefficient that the engine uses rounded to float32: its error is known."""
        truth = np.asarray(value, np.float64)
        error = np.abs(truth.astype(np.float32).astype(np.float64) - truth)
        return cls(truth, error * (1 + _SLACK))

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error)

    def __add__(self, other: Bounded) -> Bounded:
        return _rounded(self.value + other.value, self.error + other.error, False, "float32")

    def __sub__(self, other: Bounded) -> Bounded:
        return self + -other

    def __mul__(self, other: Bounded) -> Bounded:
        a, b = np.abs(self.value), np.abs(other.value)
        propagated = a * other.error + b * self.error + self.error * other.error
        nonzero = (a + self.error > 0) & (b + other.error > 0)
        return _rounded(self.value * other.value, propagated, nonzero, "float32")

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient = self.value / other.value
        smallest = np.abs(other.value) * (1 - _SLACK) - other.error
        propagated = (self.error + np.abs(quotient) * other.error) / smallest
        propagated = np.where(smallest > 0, propagated, np.inf)
        nonzero = np.abs(self.value) + self.error > 0
        return _rounded(quotient, propagated, nonzero, "float32")

    def sqrt(self) -> Bounded:
        """Square root of what is not negative, in the truth and in the engine."""
        a, error = self.value, self.error
        least = np.maximum(a * (1 - _SLACK) - error, 0.0)
        root = np.sqrt(a)
        above = error / (root + np.sqrt(a + error))
        below = np.where(a > least, (a - least) / (root + np.sqrt(least)), 0.0)
        exact = error == 0
        return _rounded(root, np.where(exact, 0.0, np.maximum(above, below)), False, "float32")

    def maximum(self, other: Bounded) -> Bounded:
        """Larger of two numbers."""
        error = np.maximum(self.error, other.error)
        return Bounded(np.maximum(self.value, other.value), error)

    def sign(self) -> Bounded:
        """1, 0 or -1; either is possible where the bound contains zero."""
        error = np.where(self.error < np.abs(self.value), 0.0, 2.0)
        return Bounded(np.sign(self.value), np.where(self.error == 0, 0.0, error))

    def absolute(self) -> Bounded:
        """Magnitude."""
        return Bounded(np.abs(self.value), self.error)

    def __array_ufunc__(self, function: np.ufunc, method: str, *operands: Bounded) -> Bounded:
        """NumPy's functions on these numbers: the method of the same name."""
        first, *others = operands
        result: Bounded = getattr(first, function.__name__)(*others)
        return result

    def stored(self, dtype: str) -> Bounded:
        """What is left after rounding to a storage format; float32 is the computing format."""
        if dtype == "float32":
            return self
        return _rounded(self.value, self.error, np.abs(self.value) + self.error > 0, dtype)


def _bounded(values: ArrayLike | Bounded) -> Bounded:
    return values if isinstance(values, Bounded) else Bounded.exact(values)


@np.errstate(all="ignore")
def bounded_update(
    rule: str,
    *arrays: ArrayLike | Bounded,
    param_dtype: str = "float32",
    state_dtype: str = "float32",
    **hyperparameters: Any,
) -> list[Bounded]:
    """One step of the float64 truth with its bounds; feed the result in again for the next step.

    It is the reference's own function, run on numbers that carry their bound.

    Args:
        rule: a key of `reference.RULES`.
        arrays: param, gradient and states: numbers that the engine starts from, those that are
            narrower than float32 widened, or what the last step returned.
        param_dtype: the parameter's storage format, a key of `FORMATS`.
        state_dtype: the states' storage format.
        hyperparameters: those of the rule, with its step.

    Returns:
        The new param and states.
    """
    param, *states = reference.RULES[rule](
        Bounded.coefficient, *map(_bounded, arrays), **hyperparameters
    )
    return [param.stored(param_dtype), *(state.stored(state_dtype) for state in states)]


def bound_ratio(actual: ArrayLike, bounded: Bounded) -> float:
    """Largest ratio of actual error to bound: at most 1 where the bound holds.

    An infinite bound admits anything; where the bound is zero the numbers must be equal.
    """
    with np.errstate(all="ignore"):
        error = np.abs(np.asarray(actual, np.float64) - bounded.value)
        ratio = np.where(error == bounded.error, 1.0, error / bounded.error)
    ratio = np.where(np.isinf(bounded.error) | (error == 0), 0.0, ratio)
    return float(np.max(np.nan_to_num(ratio, nan=np.inf), initial=0.0))
