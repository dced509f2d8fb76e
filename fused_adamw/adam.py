"""AdamW, Adam with L2 and AdamProx: one rule, three conventions of decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Options, decay_of_flag


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

    State may be changed in place, replaced or moved to other memory at any time. Only a state's
    storage must not be moved through a view of it: a step would not see that.

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
        capturable: whether steps may be captured in a CUDA graph; see `FusedOptimizer`.
        differentiable: must be False: the update is not recorded by autograd.
        fused: accepted and kept for checkpoints; every engine is fused.
        decay: the convention of weight decay, one of the four above. One for all groups of a
            checkpoint; kept in it.
        options: those of every optimizer; see `FusedOptimizer`.

    Raises:
        ValueError: a value out of range, an unknown engine or decay, no or repeated parameters.
        TypeError: a dtype that is not accepted.
        RuntimeError: an engine that is absent here, with the reason; ``differentiable=True``.
    """

    _rule = "adam"
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
        decay: str = "lr",
        **options: Unpack[Options],
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(
                f"lr: found a tensor of shape {tuple(lr.shape)}, accepted: one element"
            )
        defaults = {
            "lr": lr,
            "betas": as_numbers(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decay != "l2",
            "decay": decay,
        }
        super().__init__(params, defaults, **options)

    def _torch_decay(self, group: dict[str, Any]) -> str:
        return "l2" if group["decay"] == "l2" else "lr"  # Adam's or AdamW's: they look the same

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names


class FusedAdam(FusedAdamW):
    """Adam in one pass: a drop-in for `torch.optim.Adam`.

    `FusedAdamW` with ``decay="l2"`` and no weight decay by default: Algorithm 2 of Loshchilov &
    Hutter, arXiv 1711.05101, without its line 12. Checkpoints of `torch.optim.Adam` load here and
    the other way round.

    Args:
        params: see `FusedAdamW`, as for all others.
        lr: alpha, >= 0.
        betas: beta1 and beta2, each in [0, 1).
        eps: >= 0.
        weight_decay: lambda, >= 0.
        amsgrad: whether the largest second moment so far divides.
        decoupled_weight_decay: as in torch: True is ``decay="lr"``.
        decay: the convention of weight decay, instead of the flag.
        options: the other keywords of `FusedAdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        decay: str | None = None,
        **options: Any,
    ) -> None:
        decay = decay_of_flag(decoupled_weight_decay, decay)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decay=decay, **options)


class FusedAdamProx(FusedAdamW):
    """AdamProx in one pass: `FusedAdamW` with ``decay="proximal"``.

    Zhuang, Liu, Cutkosky & Orabona, Understanding AdamW through Proximal Methods and
    Scale-Freeness (arXiv 2202.00089)::

        theta_t = (theta_{t-1} - eta p_t) / (1 + eta lambda)

    Args:
        params: see `FusedAdamW`, as for all others.
        lr: alpha, >= 0.
        betas: beta1 and beta2, each in [0, 1).
        eps: >= 0.
        weight_decay: lambda, >= 0; not multiplied by ``lr``.
        amsgrad: whether the largest second moment so far divides.
        options: the other keywords of `FusedAdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        options.setdefault("decay", "proximal")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


def as_numbers(betas: Any) -> Any:
    """Betas as torch keeps them: a tuple, with numbers in place of tensors."""
    if not isinstance(betas, tuple | list):
        return betas  # refused with the group
    return tuple(
        beta.item() if isinstance(beta, Tensor) and beta.numel() == 1 else beta for beta in betas
    )
