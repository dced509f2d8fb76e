"""Checks of numbers given by the user: what was found, what is accepted."""

from __future__ import annotations

import math
import numbers
from typing import Any

# Integers up to here are exact in binary64.
LARGEST_COUNT = 2**53


def number(name: str, value: Any, *, positive: bool = False, at_most: float = math.inf) -> float:
    """A finite number of any real type as a float.

    Args:
        name: the argument, for the message.
        value: what was given.
        positive: whether zero is refused too; negative numbers always are.
        at_most: largest value accepted.

    Raises:
        TypeError: not a real number.
        ValueError: out of range, infinite or NaN.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number:
        try:
            result = float(value)
        except OverflowError:  # an integer beyond binary64
            result = math.inf
        if 0.0 <= result <= at_most and result < math.inf and (result or not positive):
            return result
    limit = f" and <= {at_most:g}" if at_most < math.inf else ""
    accepted = f"a finite number {'>' if positive else '>='} 0{limit}"
    refusal = ValueError if is_number else TypeError
    raise refusal(f"{name}: found {value!r}, accepted: {accepted}")


def count(name: str, value: Any, *, at_least: int = 1) -> int:
    """An integer of any integral type, from `at_least` to `LARGEST_COUNT`.

    Raises:
        TypeError: not an integer (a float is none, whatever its value).
        ValueError: out of range.
    """
    accepted = f"an integer >= {at_least} and <= 2**53"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: found {value!r}, accepted: {accepted}")
    result = int(value)
    if not at_least <= result <= LARGEST_COUNT:
        raise ValueError(f"{name}: found {value!r}, accepted: {accepted}")
    return result
