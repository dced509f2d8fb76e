"""The optimizers as functions of lists of tensors, like `torch.optim.adamw.adamw`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_adamw.engines import check_engine
from fused_adamw.hyperparameters import hyperparameters
from fused_adamw.registration import Member, RegisteredList


def adamw(
    params: list[Tensor],
    grads: list[Tensor | None] | list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    amsgrad: bool,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
    schedule_multiplier: float = 1.0,
    decay: str = "lr",
    engine: str = "auto",
) -> None:
    """One step of AdamW in place, over a whole list in one pass; `FusedAdamW` has the equations.

    The class registers its lists once; this registers them at every call, which costs some
    microseconds a tensor. Lists are of equal length, tensors at one index of equal shape.

    Args:
        params: parameters, float32, bfloat16 or float16, dense in any order of dimensions; written.
        grads: their gradients; strides may differ from the parameter's. A parameter whose gradient
            is None is left alone.
        exp_avgs: first moments; written.
        exp_avg_sqs: second moments, of the same dtype; written.
        max_exp_avg_sqs: running maxima of the second moments; written. Empty without ``amsgrad``.
        state_steps: steps taken so far, float32 tensors of one element on the CPU; written.
        amsgrad: whether the maximum of the second moment divides.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        lr: learning rate, >= 0. A tensor is read on the host, which waits for its device.
        weight_decay: >= 0; what it means is said by ``decay``.
        eps: added to the root of the second moment, >= 0.
        maximize: whether to go up the gradient.
        schedule_multiplier: eta, >= 0.
        decay: ``"lr"``, ``"decoupled"``, ``"l2"`` or ``"proximal"``.
        engine: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: lists of different lengths, a hyperparameter out of range, an unknown engine,
            tensors of different shapes, memory that overlaps.
        TypeError: a combination of dtypes outside the table.
        RuntimeError: an engine that is absent, tensors on different devices.
    """
    check_engine(engine)
    group = {
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": weight_decay,
        "schedule_multiplier": schedule_multiplier,
        "decay": decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
    }
    checked = hyperparameters("adam", group)
    states: dict[str, list[Tensor]] = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
    if amsgrad:
        states["max_exp_avg_sq"] = max_exp_avg_sqs
    lengths = {"grads": grads, **{f"{name}s": tensors for name, tensors in states.items()}}
    for name, tensors in {**lengths, "state_steps": state_steps}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name}: found {len(tensors)} tensors for {len(params)} params")

    names = tuple(states)
    members = []
    for i, param in enumerate(params):
        state: dict[str, Any] = {name: tensors[i] for name, tensors in states.items()}
        state["step"] = state_steps[i]
        members.append(Member(param, state, names, 0, f"parameter {i}"))
    registered = RegisteredList(members, engine)
    for i, member in enumerate(members):
        assert member.state is not None
        for name, tensors in states.items():
            if member.state[name] is not tensors[i]:
                raise ValueError(
                    f"parameter {i} has strides {tuple(params[i].stride())}, its state '{name}' "
                    f"{tuple(tensors[i].stride())}; accepted: the same strides"
                )
    registered.step([checked], list(grads))
