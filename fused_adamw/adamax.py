"""Adamax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw.adam import as_numbers
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options


class FusedAdamax(FusedOptimizer):
    """Adamax in one pass: a drop-in for `torch.optim.Adamax`.

    Kingma & Ba, Adam (arXiv 1412.6980), Algorithm 2, with eps added to the gradient's magnitude as
    in torch. With eta the schedule multiplier, d the factor of decay and g the gradient (plus
    lambda theta for decay="l2")::

        m = beta1 m + (1 - beta1) g
        u = max(beta2 u, |g| + eps)
        theta = d theta - eta lr / (1 - beta1^t) m / u

    State of a parameter, as in torch: ``step``, ``exp_avg`` (m) and ``exp_inf`` (u).

    Args:
        params: see `FusedAdamW`.
        lr: >= 0.
        betas: beta1 and beta2, each in [0, 1).
        eps: >= 0.
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

    _rule = "adamax"
    _group_keys = frozenset({"lr", "betas", "eps", "weight_decay"})
    _known_states = frozenset({"exp_avg", "exp_inf"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
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
            "betas": as_numbers(betas),
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
        return ("exp_avg", "exp_inf")
