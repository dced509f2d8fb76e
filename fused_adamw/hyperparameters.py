"""Hyperparameters on their way from a param group to the extension, which checks their ranges."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fused_adamw import _C


def _number(name: str, value: Any) -> float:
    """A number, or a tensor of one, as a float."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return float(value)
        found = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    elif isinstance(value, numbers.Real):
        return float(value)
    else:
        found = repr(value)
    raise TypeError(f"{name}: found {found}, accepted: a number or a tensor of one")


def _flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    raise TypeError(f"{name}: found {value!r}, accepted: True or False")


def _decay(name: str, value: Any) -> str:
    if value in _C.DECAYS:
        return str(value)
    raise ValueError(f"{name}: found {value!r}, accepted: {', '.join(map(repr, _C.DECAYS))}")


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "number": _number,
    "flag": _flag,
    "decay": _decay,
}


def group_keys(rule: str) -> tuple[str, ...]:
    """The keys of a param group that hold a rule's hyperparameters; "betas" holds two."""
    fields, _ = _C.RULES[rule]
    return tuple(dict.fromkeys(argument.split("[")[0] for _, argument, _ in fields))


def values_of(rule: str) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """What reads a rule's values out of a param group, as a tuple."""
    return operator.itemgetter(*group_keys(rule))


def hyperparameters(rule: str, group: Mapping[str, Any]) -> _C.Hyperparameters:
    """The values of a param group, checked.

    Raises:
        TypeError: a value of another type; the message names the argument.
        ValueError: a value out of range, or an unknown decay; likewise.
    """
    values = {
        name: check(argument, group[key] if index is None else _pair(key, group[key])[index])
        for name, argument, key, index, check in _plan(rule)
    }
    return _C.Hyperparameters(rule, values)


@functools.cache
def _plan(rule: str) -> tuple[tuple[str, str, str, int | None, Callable[[str, Any], Any]], ...]:
    """Of each field its name, its argument, the group's key and index there, and its check."""
    plan = []
    for name, argument, kind in _C.RULES[rule][0]:
        key, _, index = argument.removesuffix("]").partition("[")  # "lr", or "betas[0]" of a pair
        plan.append((name, argument, key, int(index) if index else None, _CHECKS[kind]))
    return tuple(plan)


def _pair(key: str, value: Any) -> Any:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{key}: found {value!r}, accepted: two numbers")
    return value
