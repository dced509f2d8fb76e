"""Hyperparameters on their way from a param group to the extension, which checks their ranges."""

from __future__ import annotations

import numbers
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


def adam_hyperparameters(
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    schedule_multiplier: Any,
    decay: Any,
    amsgrad: Any,
    maximize: Any,
) -> _C.AdamHyperparameters:
    """Checks the hyperparameters of the Adam family; `FusedAdamW` says what they are.

    Raises:
        TypeError: a value of another type; the message names the argument.
        ValueError: a value out of range, or an unknown decay; likewise.
    """
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas: found {betas!r}, accepted: two numbers")
    if decay not in _C.DECAYS:
        raise ValueError(f"decay: found {decay!r}, accepted: {', '.join(map(repr, _C.DECAYS))}")
    return _C.AdamHyperparameters(
        lr=_number("lr", lr),
        beta1=_number("betas[0]", betas[0]),
        beta2=_number("betas[1]", betas[1]),
        eps=_number("eps", eps),
        weight_decay=_number("weight_decay", weight_decay),
        schedule_multiplier=_number("schedule_multiplier", schedule_multiplier),
        decay=decay,
        amsgrad=_flag("amsgrad", amsgrad),
        maximize=_flag("maximize", maximize),
    )
