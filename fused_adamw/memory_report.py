"""The memory that training keeps, by kind, and what one step moves; known before it is allocated.

Counted are arrays. Numbers kept once a tensor (its count of steps, the engines' addresses) are left
out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fused_adamw.precision import BLOCK, Layout

_SCALE = _AVERAGE = torch.float32.itemsize
_CODE = 1  # bytes
_BESIDE_KINDS = {
    "master": "masters",
    "remainder16": "remainders",
    "remainder8": "remainders",
    "compensation": "compensations",
}
KINDS = (
    *("parameters", "gradients", "states", "scales"),
    *dict.fromkeys(_BESIDE_KINDS.values()),
    "averages",
)
"""The kinds of memory, in the order in which they are shown."""


class PlannedTensor(NamedTuple):
    """What a report needs to know of one parameter; a plain tuple will do.

    Attributes:
        numel: its number of elements.
        dtype: its dtype, which its gradient has too.
        layout: how it and its states lie in memory.
        states: the number of arrays that its rule keeps.
        averaged: whether a float32 average of it is kept.
    """

    numel: int
    dtype: torch.dtype
    layout: Layout
    states: int
    averaged: bool = False


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a list of parameters and of what belongs to them; as a string, a table.

    Attributes:
        numel: the number of parameters, as elements.
        held: bytes kept, by kind, one of `KINDS`.
        moved: bytes that one step reads and writes.
        layouts: of each layout how many tensors and how many elements are in it.
    """

    numel: int
    held: dict[str, int]
    moved: int
    layouts: dict[Layout, tuple[int, int]]

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.held.values())

    def per_parameter(self, count: int) -> float:
        """A number of bytes divided by the number of parameters."""
        return count / self.numel if self.numel else 0.0

    def __str__(self) -> str:
        rows = [(kind, count) for kind, count in self.held.items() if count]
        rows += [("total", self.total), ("moved by a step", self.moved)]
        lines = [f"{'':16s}{'bytes':>20s}{'':>12s}{'a parameter':>14s}"]
        lines += [
            f"{name:16s}{count:>20,d}{_readable(count):>12s}{self.per_parameter(count):>14.2f}"
            for name, count in rows
        ]
        lines += [
            f"{layout}: {tensors:,d} tensor{'s' * (tensors != 1)}, {numel:,d} parameters"
            for layout, (tensors, numel) in self.layouts.items()
        ]
        return "\n".join(lines)


def memory_report(
    tensors: Iterable[PlannedTensor | tuple[int, torch.dtype, Layout, int, bool]],
) -> MemoryReport:
    """The memory of parameters in their layouts; nothing is allocated.

    A step reads the gradient, reads and writes the parameter and all that belongs to it; beside a
    master the parameter is only written.

    Args:
        tensors: of each parameter what `PlannedTensor` says.
    """
    held = dict.fromkeys(KINDS, 0)
    layouts: dict[Layout, tuple[int, int]] = {}
    moved = total = 0
    for numel, dtype, layout, states, averaged in tensors:
        is_coded = layout.state_dtype is None
        state_size = _CODE if layout.state_dtype is None else layout.state_dtype.itemsize
        own = {
            "parameters": numel * dtype.itemsize,
            "gradients": numel * dtype.itemsize,
            "states": numel * states * state_size,
            "scales": -(-numel // BLOCK) * states * _SCALE if is_coded else 0,
            "averages": numel * _AVERAGE if averaged else 0,
        }
        if layout.beside_dtype is not None:
            own[_BESIDE_KINDS[layout.beside]] = numel * layout.beside_dtype.itemsize
        for kind, count in own.items():
            held[kind] += count
        only_once = own["gradients"] + (own["parameters"] if layout.beside == "master" else 0)
        moved += 2 * sum(own.values()) - only_once
        total += numel
        count_before, numel_before = layouts.get(layout, (0, 0))
        layouts[layout] = count_before + 1, numel_before + numel
    return MemoryReport(total, held, moved, layouts)


def _readable(count: int) -> str:
    """A number of bytes with a unit, of powers of 1024."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"
