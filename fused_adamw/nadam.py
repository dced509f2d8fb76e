"""Nadam and NadamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw.adam import as_numbers
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options, decay_of_flag


class FusedNadamW(FusedOptimizer):
    """NadamW in one pass: Adam with Nesterov's momentum and decoupled weight decay.

    Dozat, Incorporating Nesterov Momentum into Adam (2016), with the decay of Loshchilov & Hutter
    (arXiv 1711.05101). With eta the schedule multiplier, d the factor of decay and g the gradient
    (plus lambda theta for decay="l2")::

        mu_t = beta1 (1 - 0.96^(t psi) / 2)          Pi_t = mu_1 mu_2 ... mu_t
        m = beta1 m + (1 - beta1) g                  scheduled_average: with mu_t for beta1
        n = beta2 n + (1 - beta2) g^2
        theta = d theta - eta lr ((1 - mu_t) g / (1 - Pi_t) + mu_{t+1} m / (1 - Pi_{t+1}))
                          / (sqrt(n / (1 - beta2^t)) + eps)

    A drop-in for `torch.optim.NAdam` with ``decoupled_weight_decay=True``. The paper averages the
    first moment with mu_t, torch with beta1.

    State of a parameter, as in torch: ``step``, ``mu_product`` (Pi_t, here in float64), ``exp_avg``
    (m), ``exp_avg_sq`` (n).

    Args:
        params: see `FusedAdamW`.
        lr: alpha, >= 0.
        betas: beta1 and beta2, each in [0, 1).
        eps: >= 0.
        weight_decay: lambda, >= 0.
        momentum_decay: psi, >= 0.
        scheduled_average: whether the first moment is averaged with mu_t.
        maximize: whether to go up the gradient.
        foreach: accepted and kept for checkpoints; every engine works on the whole list at once.
        capturable: whether steps may be captured in a CUDA graph; see `FusedOptimizer`.
        differentiable: must be False: the update is not recorded by autograd.
        decay: the convention of weight decay, one of the four of `FusedAdamW`.
        options: those of every optimizer; see `FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FusedAdamW`.
    """

    _rule = "nadam"
    _group_keys = frozenset({"lr", "betas", "eps", "weight_decay", "momentum_decay"})
    _known_states = frozenset({"exp_avg", "exp_avg_sq"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum_decay: float = 4e-3,
        *,
        scheduled_average: bool = False,
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
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "scheduled_average": scheduled_average,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "decay": decay,
            "decoupled_weight_decay": decay != "l2",
        }
        super().__init__(params, defaults, **options)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


class FusedNadam(FusedNadamW):
    """Nadam in one pass: a drop-in for `torch.optim.NAdam`.

    `FusedNadamW` with ``decay="l2"`` and no weight decay by default.

    Args:
        params: see `FusedAdamW`.
        lr: alpha, >= 0.
        betas: beta1 and beta2, each in [0, 1).
        eps: >= 0.
        weight_decay: lambda, >= 0.
        momentum_decay: psi, >= 0.
        decoupled_weight_decay: as in torch: True is ``decay="lr"``.
        decay: the convention of weight decay, instead of the flag.
        options: the other keywords of `FusedNadamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        decay: str | None = None,
        **options: Any,
    ) -> None:
        decay = decay_of_flag(decoupled_weight_decay, decay)
        super().__init__(
            params, lr, betas, eps, weight_decay, momentum_decay, decay=decay, **options
        )
