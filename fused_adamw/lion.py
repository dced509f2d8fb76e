"""Lion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw.adam import as_numbers
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options


class FusedLion(FusedOptimizer):
    """Lion in one pass.

    Chen et al., Symbolic Discovery of Optimization Algorithms (arXiv 2302.06675), Algorithm 2. With
    eta the schedule multiplier, d the factor of decay and g the gradient (plus lambda theta for
    decay="l2")::

        theta = d theta - eta lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

    State of a parameter: ``exp_avg`` (m).

    Args:
        params: see `FusedAdamW`.
        lr: >= 0.
        betas: beta1 and beta2, each in [0, 1).
        weight_decay: lambda, >= 0; in the paper it is multiplied by ``lr``: decay="lr".
        maximize: whether to go up the gradient.
        foreach: accepted and kept for checkpoints; every engine works on the whole list at once.
        capturable: whether steps may be captured in a CUDA graph; see `FusedOptimizer`.
        differentiable: must be False: the update is not recorded by autograd.
        decay: the convention of weight decay, one of the four of `FusedAdamW`.
        options: those of every optimizer; see `FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FusedAdamW`.
    """

    _rule = "lion"
    _group_keys = frozenset({"lr", "betas", "weight_decay"})
    _known_states = frozenset({"exp_avg"})
    _counts = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        decay: str = "lr",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": as_numbers(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "decay": decay,
        }
        super().__init__(params, defaults, **options)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)
