"""SGD with momentum, and SGDW."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw import _C
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options


class FusedSGD(FusedOptimizer):
    """SGD in one pass: a drop-in for `torch.optim.SGD`.

    Algorithm 1 of Loshchilov & Hutter (arXiv 1711.05101). With mu the momentum, tau the dampening,
    eta the schedule multiplier, d the factor of decay and g the gradient (plus lambda theta for
    decay="l2")::

        m = g in the first step, then mu m + (1 - tau) g
        u = m;   with Nesterov's momentum g + mu m;   without momentum g
        theta = d theta - eta lr u

    ``lr_in_momentum=True`` is the paper's line 8: every g above is multiplied by eta lr, and the
    step is u itself. Under a constant eta lr both are the same, under a schedule they are not.

    State of a parameter, as in torch: with momentum ``momentum_buffer`` (m), otherwise nothing.

    Args:
        params: see `FusedAdamW`.
        lr: alpha, >= 0.
        momentum: mu, >= 0; beta1 in the paper.
        dampening: tau.
        weight_decay: lambda, >= 0.
        nesterov: needs a momentum, and a dampening of 0.
        lr_in_momentum: whether eta lr is inside the buffer.
        fused: accepted and kept for checkpoints; every engine is fused.
        maximize: whether to go up the gradient.
        foreach: accepted and kept for checkpoints; every engine works on the whole list at once.
        capturable: whether steps may be captured in a CUDA graph; see `FusedOptimizer`.
        differentiable: must be False: the update is not recorded by autograd.
        decay: the convention of weight decay, one of the four of `FusedAdamW`; torch's is "l2".
        options: those of every optimizer; see `FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FusedAdamW`.
    """

    _rule = "sgd"
    _group_keys = frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"})
    _known_states = frozenset({"momentum_buffer"})
    _torch_values = MappingProxyType({"lr_in_momentum": False})  # of its buffer
    _counts = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        lr_in_momentum: bool = False,
        fused: bool | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        decay: str = "l2",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "lr_in_momentum": lr_in_momentum,
            "fused": fused,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "decay": decay,
        }
        super().__init__(params, defaults, **options)

    def _hyperparameters(self, group: dict[str, Any]) -> _C.Hyperparameters:
        found = super()._hyperparameters(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov: found True with momentum {group['momentum']} and dampening "
                f"{group['dampening']}, accepted: with a momentum > 0 and no dampening"
            )
        return found

    def _is_plain_sgd(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] == 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()


class FusedSGDW(FusedSGD):
    """SGDW in one pass: SGD with momentum and decoupled weight decay.

    Algorithm 1 of Loshchilov & Hutter (arXiv 1711.05101), as in the paper: eta lr is inside the
    buffer and lambda is multiplied by eta alone. ``lr_in_momentum=False`` is torch's buffer,
    ``decay="lr"`` torch's product of the learning rate and lambda. `FusedSGD` has the equations.

    Args:
        params: see `FusedAdamW`.
        lr: alpha, >= 0.
        momentum: beta1, >= 0.
        dampening: see `FusedSGD`.
        weight_decay: lambda, >= 0.
        nesterov: needs a momentum, and a dampening of 0.
        lr_in_momentum: whether eta lr is inside the buffer.
        decay: the convention of weight decay, one of the four of `FusedAdamW`.
        options: the other keywords of `FusedSGD`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        *,
        lr_in_momentum: bool = True,
        decay: str = "decoupled",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            lr_in_momentum=lr_in_momentum,
            decay=decay,
            **options,
        )
