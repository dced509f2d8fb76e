"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw import _C, checks
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options

_INITIAL = "initial_accumulator_value"


class FusedAdagrad(FusedOptimizer):
    """Adagrad in one pass: a drop-in for `torch.optim.Adagrad`.

    Duchi, Hazan & Singer, Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization (2011), with eps outside the root as in torch. With eta the schedule multiplier, d
    the factor of decay and g the gradient (plus lambda theta for decay="l2")::

        n = n + g^2
        theta = d theta - eta lr / (1 + (t - 1) lr_decay) g / (sqrt(n) + eps)

    State of a parameter, as in torch: ``step`` and ``sum``; here they are created at the first
    step. Sparse gradients are refused.

    Args:
        params: see `FusedAdamW`.
        lr: >= 0.
        lr_decay: >= 0.
        weight_decay: lambda, >= 0.
        initial_accumulator_value: what ``sum`` starts from, >= 0.
        eps: >= 0.
        foreach: accepted and kept for checkpoints; every engine works on the whole list at once.
        fused: accepted and kept for checkpoints; every engine is fused.
        maximize: whether to go up the gradient.
        capturable: whether steps may be captured in a CUDA graph; see `FusedOptimizer`.
        differentiable: must be False: the update is not recorded by autograd.
        decay: the convention of weight decay, one of the four of `FusedAdamW`; torch's is "l2".
        options: those of every optimizer; see `FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FusedAdamW`.
    """

    _rule = "adagrad"
    _group_keys = frozenset({"lr", "lr_decay", "eps", "weight_decay"})
    _known_states = frozenset({"sum"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        decay: str = "l2",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "fused": fused,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "decay": decay,
        }
        super().__init__(params, defaults, **options)

    def _hyperparameters(self, group: dict[str, Any]) -> _C.Hyperparameters:
        if _INITIAL in group:  # torch's checkpoints of old lack it
            checks.number(_INITIAL, group[_INITIAL])
        return super()._hyperparameters(group)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def _initial_value(self, name: str, group: dict[str, Any]) -> float:
        return checks.number(_INITIAL, group[_INITIAL])
