"""What a step does beside its rule: unscale, clip, average, zero, observe; all in the same pass.

Of a gradient g as it is in memory, with s the factor that the loss was multiplied by::

    norm = sqrt(sum of g^2 over all parameters) / s          infinite where float32 cannot hold it
    coefficient = min(1, max_grad_norm / (norm + 1e-6))      as torch.nn.utils.clip_grad_norm_
    the rule sees g coefficient / s                          the factor is rounded once, to float32
    ema = ema + (1 - ema_decay) (theta - ema)                as torch.lerp, theta as it is stored
    g = 0                                                    with zero_grads
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EMA = "param_ema"
"""The key of a parameter's average in its state."""


class Outcome(enum.Enum):
    """What came of a step."""

    STALE = "nothing was done: the list is out of date"
    SKIPPED = "nothing was updated: the gradients are not finite"
    DONE = "updated"


@dataclass(frozen=True)
class StepOptions:
    """The options of one step.

    Attributes:
        max_grad_norm: the norm that gradients are clipped to, over all param groups; a tensor only
            where the device reads it.
        skip_nonfinite: whether a norm that is not finite skips the step.
        ema_decay: how much of the average of the parameters a step keeps.
        zero_grads: whether gradients are zeroed once they have been read.
        telemetry: whether the step is observed.
        norm_process_groups: over whose ranks the squared norm is summed, one group after the other.
        grad_scale: what the loss was multiplied by.
        overflow: whether the scaler found one, after which the norm alone is measured.
    """

    max_grad_norm: float | Tensor | None = None
    skip_nonfinite: bool = False
    ema_decay: float | None = None
    zero_grads: bool = False
    telemetry: bool = False
    norm_process_groups: Sequence[Any] = ()
    grad_scale: float = 1.0
    overflow: bool = False

    @property
    def measures_norm(self) -> bool:
        """Whether the gradients are read once before the update."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def ema_weight(self) -> float:
        """Of the new parameter in its average."""
        return 1.0 if self.ema_decay is None else 1.0 - self.ema_decay

    def check(self) -> StepOptions:
        """These options.

        Raises:
            TypeError, ValueError: for one out of range; the message names it.
        """
        if not isinstance(self.max_grad_norm, Tensor):
            _check_number("max_grad_norm", self.max_grad_norm, "a number > 0", lambda x: x > 0)
        _check_number("ema_decay", self.ema_decay, "a number in [0, 1)", lambda x: 0 <= x < 1)
        if not 0 < self.grad_scale < math.inf:
            raise ValueError(f"grad_scale: found {self.grad_scale}, accepted: a finite number > 0")
        for name in ("skip_nonfinite", "zero_grads", "telemetry"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: found {getattr(self, name)!r}, accepted: True or False")
        check_process_groups(self.norm_process_groups)
        return self


PLAIN = StepOptions()


@torch.no_grad()
def zero(grads: list[Tensor]) -> None:
    """Zeroes gradients, which may be none at all, or part of a graph."""
    if grads:
        torch._foreach_zero_(grads)


def _check_number(name: str, value: Any, accepted: str, accepts: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: found {value!r}, accepted: None or {accepted}")
    if not accepts(float(value)):
        raise ValueError(f"{name}: found {value!r}, accepted: None or {accepted}")


def check_process_groups(groups: Any) -> Sequence[Any]:
    """``norm_process_groups``; raises ``TypeError`` for anything else."""
    if isinstance(groups, tuple | list) and all(map(_is_process_group, groups)):
        return groups
    raise TypeError(
        f"norm_process_groups: found {groups!r}, accepted: a sequence of torch.distributed process "
        "groups"
    )


def _is_process_group(value: Any) -> bool:
    return torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)


def one_number(name: str, value: Any) -> float:
    """`grad_scale` or `found_inf`: a number, or a tensor of one, which the host waits for.

    Raises:
        TypeError: anything else.
        ValueError: a tensor of more than one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name}: found a tensor of shape {tuple(value.shape)}, accepted: one element"
            )
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: found {value!r}, accepted: a number or a tensor of one")
    return float(value)
