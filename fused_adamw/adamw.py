"""AdamW."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fused_adamw import _C
from fused_adamw.hyperparameters import adam_hyperparameters
from fused_adamw.optimizer import FusedOptimizer


class FusedAdamW(FusedOptimizer):
    r"""AdamW in one pass: a drop-in for `torch.optim.AdamW`, with the same bits on every engine.

    Algorithm 2 of Loshchilov & Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101).
    With t counted from 1, alpha = ``lr``, eta = ``schedule_multiplier`` and
    lambda = ``weight_decay``::

        g_t = grad of f_t at theta_{t-1}             + lambda theta_{t-1} for decay="l2"
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2      w_t = v_t, or max(w_{t-1}, v_t) for amsgrad
        p_t = alpha (m_t / (1 - beta1^t)) / (sqrt(w_t / (1 - beta2^t)) + eps)

        decay="lr"         theta_t = (1 - eta alpha lambda) theta_{t-1} - eta p_t    as in torch
        decay="decoupled"  theta_t = (1 - eta lambda) theta_{t-1} - eta p_t          as in the paper
        decay="l2"         theta_t = theta_{t-1} - eta p_t                           Adam
        decay="proximal"   theta_t = (theta_{t-1} - eta p_t) / (1 + eta lambda)      AdamProx

    AdamProx is from Zhuang et al. (arXiv 2202.00089), AMSGrad from Reddi et al. (ICLR 2018). All
    arithmetic is in float32 whatever the dtypes, and coefficients are rounded once, from float64.

    State of a parameter, as in torch: ``step``, a float32 tensor without dimensions on the CPU;
    ``exp_avg``, ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq``, of the parameter's shape.
    Checkpoints of `torch.optim.AdamW` load here and the other way round (``decay="lr"``).

    State may be changed in place or replaced at any time, through ``optimizer.state``. Only a state
    tensor that was held across a step must not be given other memory by its ``.data``: the step
    would not see it.

    Args:
        params: tensors, (name, tensor) pairs or param groups; float32, bfloat16 or float16, dense
            in any order of dimensions.
        lr: alpha, >= 0. A tensor is read on the host at every step.
        betas: beta1 and beta2, each in [0, 1).
        eps: >= 0.
        weight_decay: lambda, >= 0; its meaning is given by ``decay``.
        amsgrad: whether the largest second moment so far divides.
        maximize: whether to go up the gradient.
        foreach: accepted and kept for checkpoints; every engine works on the whole list at once.
        capturable: accepted and kept for checkpoints; a step under CUDA graph capture is refused.
        differentiable: must be False: the update is not recorded by autograd.
        fused: accepted and kept for checkpoints; every engine is fused.
        engine: ``"auto"`` (``"cpu"`` for host memory; ``"cuda"``, else ``"triton"``, on a GPU) or
            one of ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``.
        decay: the convention of weight decay, one of the four above. One for all groups of a
            checkpoint; kept in it.
        schedule_multiplier: eta, >= 0; a value of the param group that a schedule may set.
        state_dtype: dtype of the states; by default the parameter's.

    Raises:
        ValueError: a value out of range, an unknown engine or decay, no or repeated parameters.
        TypeError: a dtype that is not accepted.
        RuntimeError: an engine that is absent here, with the reason; ``differentiable=True``.
    """

    _group_keys = frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"})
    _known_states = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        engine: str = "auto",
        decay: str = "lr",
        schedule_multiplier: float = 1.0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(
                f"lr: found a tensor of shape {tuple(lr.shape)}, accepted: one element"
            )
        defaults = {
            "lr": lr,
            "betas": _as_numbers(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decay != "l2",  # the convention in torch's terms
            "decay": decay,
            "schedule_multiplier": schedule_multiplier,
        }
        super().__init__(params, defaults, engine=engine, state_dtype=state_dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch; refused whole if anything in it cannot be used."""
        if isinstance(param_group, dict):
            decay = param_group.get("decay", self.defaults["decay"])
            param_group["decoupled_weight_decay"] = decay != "l2"
        super().add_param_group(param_group)

    _values = operator.itemgetter(
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "schedule_multiplier",
        "decay",
        "amsgrad",
        "maximize",
        "differentiable",
    )

    def _hyperparameters(self, group: dict[str, Any]) -> _C.AdamHyperparameters:
        *values, differentiable = self._values(group)
        if differentiable:
            raise RuntimeError(
                "differentiable: found True, accepted: False (a fused update has no derivative)"
            )
        return adam_hyperparameters(*values)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def _adopt_group(self, where: str, group: dict[str, Any], new: dict[str, Any]) -> None:
        if "decay" not in new:  # a checkpoint of torch, whose flag is younger than its AdamW
            decoupled = new.get("decoupled_weight_decay", group["decay"] != "l2")
            new["decay"] = "lr" if decoupled else "l2"
        if new["decay"] != group["decay"]:
            raise ValueError(
                f"{where} has decay {new['decay']!r}, this optimizer {group['decay']!r}: "
                "the same weight_decay means something else; accepted: the same convention"
            )
        super()._adopt_group(where, group, new)


def _as_numbers(betas: Any) -> Any:
    """Betas as torch keeps them: a tuple, with numbers in place of tensors."""
    if not isinstance(betas, tuple | list):
        return betas  # refused with the group
    return tuple(
        beta.item() if isinstance(beta, Tensor) and beta.numel() == 1 else beta for beta in betas
    )
