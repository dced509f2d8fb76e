"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options


class FusedRMSprop(FusedOptimizer):
    """RMSprop in one pass: a drop-in for `torch.optim.RMSprop`.

    Hinton, Neural Networks for Machine Learning, lecture 6 (2012); centered: Graves, arXiv
    1308.0850. With eta the schedule multiplier, d the factor of decay and g the gradient (plus
    lambda theta for decay="l2")::

        n = alpha n + (1 - alpha) g^2
        centered:  mu = alpha mu + (1 - alpha) g,   n' = max(n - mu^2, 0);   otherwise n' = n
        momentum:  b = momentum b + g / (sqrt(n') + eps),   theta = d theta - eta lr b
        otherwise  theta = d theta - eta lr g / (sqrt(n') + eps)

    torch has no maximum: where rounding takes n - mu^2 below zero its parameters become NaN.

    State of a parameter, as in torch: ``step``, ``square_avg``, with momentum ``momentum_buffer``,
    if centered ``grad_avg``.

    Args:
        params: see `FusedAdamW`.
        lr: >= 0.
        alpha: smoothing of both averages, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: lambda, >= 0.
        momentum: of the buffer of quotients, >= 0.
        centered: whether the square of the mean gradient is subtracted.
        capturable: whether steps may be captured in a CUDA graph; see `FusedOptimizer`.
        foreach: accepted and kept for checkpoints; every engine works on the whole list at once.
        maximize: whether to go up the gradient.
        differentiable: must be False: the update is not recorded by autograd.
        decay: the convention of weight decay, one of the four of `FusedAdamW`; torch's is "l2".
        options: those of every optimizer; see `FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FusedAdamW`.
    """

    _rule = "rmsprop"
    _group_keys = frozenset({"lr", "alpha", "eps", "weight_decay", "momentum", "centered"})
    _known_states = frozenset({"square_avg", "grad_avg", "momentum_buffer"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        decay: str = "l2",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "decay": decay,
        }
        super().__init__(params, defaults, **options)

    def _is_codable(self, group: dict[str, Any]) -> bool:
        return not group["centered"]  # the variance is a difference of states, which codes blur

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        centered = ("grad_avg",) if group["centered"] else ()
        momentum = ("momentum_buffer",) if group["momentum"] else ()
        return ("square_avg", *centered, *momentum)
