"""What takes part in a comparison: something that starts an optimizer over given parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import fused_adamw
from bench.rules import Rule

# Our engines by type of device, the one to compare with first. The reference is for checks; it is
# only timed when it is asked for.
ENGINES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Started(NamedTuple):
    """An optimizer over some parameters, and the call that is timed.

    Attributes:
        optimizer: with the states; None where a function is timed that belongs to none.
        step: the call.
        averages: the averages of the parameters, where the step keeps them.
        grad_norm: what it found the norm of the gradients to be, where that is what it is for.
    """

    optimizer: Optimizer | None
    step: Callable[[], object]
    averages: Callable[[], list[Tensor]] = list
    grad_norm: Tensor | None = None


@dataclass(frozen=True)
class Contender:
    """An optimizer by name.

    Attributes:
        name: what tables call it.
        start: takes parameters that have gradients.
        ours: whether it is one of our engines, whose result has to be exact.
        most_tensors: the longest list it is measured on, if there is a bound.
        why_most: the reason for the bound.
        least_elements: the smallest tensor it is measured on.
        why_least: the reason for that.
        devices: the types of device it works on.
        dtype: of the parameters it is measured on, if not the case's.
        state_itemsize: bytes of an element of its states, if not those of the parameter.
        moved_besides, kept_besides: bytes that it moves and keeps for each parameter beyond the
            parameter, the gradient and the states that its optimizer has.
        like: starts our reference in the format that its parameters and states are in, where the
            task has several.
        against: the contenders that its time is given relative to, by what tables call them.
    """

    name: str
    start: Callable[[list[Tensor]], Started]
    ours: bool = False
    most_tensors: int | None = None
    why_most: str = ""
    least_elements: int = 0
    why_least: str = ""
    devices: tuple[str, ...] = tuple(ENGINES)
    dtype: torch.dtype | None = None
    state_itemsize: int | None = None
    moved_besides: int = 0
    kept_besides: int = 0
    like: Callable[[list[Tensor]], Started] | None = None
    against: Mapping[str, str] = field(default_factory=dict)


def start_ours(rule: Rule, engine: str, params: list[Tensor], **options: Any) -> Started:
    """Our optimizer on one engine, with options that it has beside the rule's."""
    optimizer = getattr(fused_adamw, rule.ours)(params, engine=engine, **rule.options, **options)
    return Started(optimizer, optimizer.step)


def our_engines(device: torch.device) -> list[str]:
    """Those that are measured on a device unless others are asked for, if they are present."""
    present = fused_adamw.available_engines()
    return [engine for engine in ENGINES[device.type] if engine in present]


def ours(rule: Rule, engines: list[str]) -> list[Contender]:
    """Our engines as contenders."""
    return [
        Contender(f"ours {engine}", partial(start_ours, rule, engine), ours=True)
        for engine in engines
    ]
