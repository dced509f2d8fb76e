"""What takes part in a comparison: something that starts an optimizer over given parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import fused_adamw
from bench.rules import Rule

# Our engines by type of device, the one to compare with first. The reference is for checks; it is
# only timed when it is asked for.
ENGINES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Started(NamedTuple):
    """An optimizer over some parameters, and the call that is its step."""

    optimizer: Optimizer
    step: Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """An optimizer by name.

    Attributes:
        name: what tables call it.
        start: takes parameters that have gradients.
        ours: whether it is one of our engines, whose result has to be exact.
        most_tensors: the longest list it is measured on, if there is a bound.
        why_most: the reason for the bound.
        state_itemsize: bytes of an element of its states, if not those of the parameter.
    """

    name: str
    start: Callable[[list[Tensor]], Started]
    ours: bool = False
    most_tensors: int | None = None
    why_most: str = ""
    state_itemsize: int | None = None


def start_ours(rule: Rule, engine: str, params: list[Tensor]) -> Started:
    """Our optimizer on one engine."""
    optimizer = getattr(fused_adamw, rule.ours)(params, engine=engine, **rule.options)
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
