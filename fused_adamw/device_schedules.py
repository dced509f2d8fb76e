"""Schedules as programs for a device, which evaluates eta from a step count that it holds itself.

A program is a list of numbers; csrc/schedules/program.h says how it is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator

from fused_adamw import _C
from fused_adamw.checks import LARGEST_COUNT
from fused_adamw.schedules import KINDS, Polynomial, Product, Schedule, Sequential, field_types

_OPCODES = {name: float(opcode) for opcode, name in enumerate(_C.SCHEDULE_OPCODES)}


def program(schedule: Schedule | None) -> list[float]:
    """The program that gives, for every integer t, the bits of ``schedule(t)``.

    Args:
        schedule: None gives the empty program, which has no value.

    Returns:
        At most ``_C.SCHEDULE_MAX_WORDS`` numbers; zeros may be appended.

    Raises:
        TypeError: not one of the classes of `schedules`.
        ValueError: a Polynomial whose power is no integer, or too many schedules in one.
    """
    rows = [] if schedule is None else list(_rows(schedule, 0, LARGEST_COUNT))
    words = [word for row in rows for word in row] + [_OPCODES["end"]]
    if len(words) > _C.SCHEDULE_MAX_WORDS:
        raise ValueError(
            f"schedule: found {len(rows)} parts (schedules, and products of two), "
            f"accepted on a device: at most {_C.SCHEDULE_MAX_WORDS // _C.SCHEDULE_ROW_WORDS}"
        )
    return words


def _rows(schedule: Schedule, first: int, last: int) -> Iterator[list[float]]:
    """The rows of what is in force from step `first` to step `last`."""
    if type(schedule) is not KINDS.get(schedule.kind):
        raise TypeError(
            f"schedule: found {schedule!r}, accepted on a device: {', '.join(map(repr, KINDS))}"
        )
    if isinstance(schedule, Sequential):
        begins = (first, *(first + milestone for milestone in schedule.milestones))
        ends = (*(begin - 1 for begin in begins[1:]), last)
        for part, begin, end in zip(schedule.schedules, begins, ends, strict=True):
            if begin <= last:  # others are never reached
                yield from _rows(part, begin, min(end, last))
    elif isinstance(schedule, Product):
        for i, factor in enumerate(schedule.schedules):
            yield from _rows(factor, first, last)
            if i:
                yield _row("product", first, last)
    else:
        if isinstance(schedule, Polynomial) and not schedule.power.is_integer():
            raise ValueError(
                f"schedule: found Polynomial.power = {schedule.power}, accepted on a device: an "
                "integer power (any other takes pow, whose bits differ between math libraries)"
            )
        fields = (getattr(schedule, name) for name in field_types(type(schedule)))
        yield _row(schedule.kind, first, last, *fields)


def _row(opcode: str, first: int, last: int, *fields: float) -> list[float]:
    row = [_OPCODES[opcode], *map(float, (first, last, *fields))]
    return row + [0.0] * (_C.SCHEDULE_ROW_WORDS - len(row))
