"""Adadelta."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options


class FusedAdadelta(FusedOptimizer):
    """Adadelta in one pass: a drop-in for `torch.optim.Adadelta`.

    Zeiler, Adadelta: An Adaptive Learning Rate Method (arXiv 1212.5701), Algorithm 1. With eta the
    schedule multiplier, d the factor of decay and g the gradient (plus lambda theta for
    decay="l2")::

        n = rho n + (1 - rho) g^2
        delta = sqrt(a + eps) / sqrt(n + eps) g
        a = rho a + (1 - rho) delta^2
        theta = d theta - eta lr delta

    State of a parameter, as in torch: ``step``, ``square_avg`` (n) and ``acc_delta`` (a).

    Args:
        params: see `FusedAdamW`.
        lr: >= 0; 1 in the paper.
        rho: decay of both averages, in [0, 1).
        eps: inside both roots, >= 0.
        weight_decay: lambda, >= 0.
        foreach: accepted and kept for checkpoints; every engine works on the whole list at once.
        maximize: whether to go up the gradient.
        capturable: whether steps may be captured in a CUDA graph; see `FusedOptimizer`.
        differentiable: must be False: the update is not recorded by autograd.
        decay: the convention of weight decay, one of the four of `FusedAdamW`; torch's is "l2".
        options: those of every optimizer; see `FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FusedAdamW`.
    """

    _rule = "adadelta"
    _group_keys = frozenset({"lr", "rho", "eps", "weight_decay"})
    _known_states = frozenset({"square_avg", "acc_delta"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        decay: str = "l2",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "decay": decay,
        }
        super().__init__(params, defaults, **options)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")
