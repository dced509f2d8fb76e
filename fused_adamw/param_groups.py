"""What a param group holds, and what messages call its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from fused_adamw import _C
from fused_adamw.hyperparameters import group_keys
from fused_adamw.schedules import Schedule

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of parameters that are stepped."""
FLAG = "decoupled_weight_decay"
"""torch's name for the convention of decay, kept in checkpoints."""
RULES_KEYS = {FLAG}.union(*map(group_keys, _C.RULES))
"""Every value of a group that only some rules have, and that tells them apart."""

# Of a parameter, by its name, if it has one, and itself.
Precision: TypeAlias = Callable[[str | None, Tensor], str | None]
# Of a parameter its param group, its place there and its number among all.
Place = tuple[int, int, int]


class Options(TypedDict, total=False):
    """The keywords of `FusedOptimizer` that every optimizer takes beside its own."""

    engine: str
    schedule_multiplier: float
    schedule: Schedule | None
    precision: str | Precision | None
    stochastic_rounding: bool
    seed: int
    remainder_bits: int
    state_dtype: torch.dtype | None
    max_grad_norm: float | Tensor | None
    skip_nonfinite: bool
    norm_process_groups: Sequence[Any]
    ema_decay: float | None
    zero_grads: bool
    telemetry: bool


OF_ALL_GROUPS = Options.__annotations__.keys() - {"schedule_multiplier", "schedule", "seed"}
"""The options that are the optimizer's, and no group's."""


def decay_of_flag(decoupled: bool, decay: str | None = None) -> str:
    """The convention that torch's flag names, or the one given, which the flag must not deny.

    Raises:
        ValueError: the flag beside "l2".
    """
    if decay is None:
        return "lr" if decoupled else "l2"
    if decoupled and decay == "l2":
        raise ValueError(
            f"{FLAG}: found {decoupled!r} beside decay {decay!r}, accepted: only one of them"
        )
    return decay


def label_of(number: int, group: dict[str, Any], place: int) -> str:
    """What messages call a parameter, by its number among all and its name if it has one."""
    names = group.get("param_names")
    return f"parameter {number}" + (f" ('{names[place]}')" if names else "")
