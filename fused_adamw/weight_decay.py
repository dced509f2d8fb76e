r"""Weight decay between its conventions, and normalized by the length of training.

With alpha = ``lr``, eta = ``schedule_multiplier`` and lambda = ``weight_decay``, a step multiplies
the parameter by the factor d:

============  ======================  ============================================================
"lr"          1 - eta alpha lambda    torch.optim.AdamW
"decoupled"   1 - eta lambda          Loshchilov & Hutter (arXiv 1711.05101), Algorithms 1 and 2
"proximal"    1 / (1 + eta lambda)    AdamProx, Zhuang et al. (arXiv 2202.00089)
"l2"          1 - eta alpha lambda    in plain SGD: theta - eta alpha (g + lambda theta). Elsewhere
                                      lambda theta enters the moments, and there is no factor.
============  ======================  ============================================================
"""

from __future__ import annotations

import math
from typing import overload

from fused_adamw import checks
from fused_adamw.schedules import CosineWarmRestarts

CONVENTIONS = ("lr", "decoupled", "proximal", "l2")


def convert_weight_decay(
    weight_decay: float,
    *,
    source: str,
    target: str,
    lr: float,
    schedule_multiplier: float = 1.0,
    plain_sgd: bool = False,
) -> float:
    """The weight decay that multiplies parameters by the same factor in another convention.

    The factors agree to a few roundings in binary64, at the ``lr`` and the ``schedule_multiplier``
    given: where alpha moves, "lr" and "decoupled" part, where eta moves, "proximal" parts from
    both. "proximal" divides the step as well, not the parameter alone, by 1 + eta lambda.

    Args:
        weight_decay: lambda in the convention `source`, >= 0.
        source: ``"lr"``, ``"decoupled"``, ``"proximal"`` or ``"l2"``.
        target: likewise.
        lr: alpha, >= 0.
        schedule_multiplier: eta, >= 0.
        plain_sgd: whether the rule is SGD without momentum, the only one where "l2" is a factor.

    Returns:
        Lambda in the convention `target`.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range, an unknown convention, or a factor that `target` cannot
            give; the message has the reason.
    """
    weight_decay = checks.number("weight_decay", weight_decay)
    lr = checks.number("lr", lr)
    eta = checks.number("schedule_multiplier", schedule_multiplier)
    for name, convention in (("source", source), ("target", target)):
        if convention not in CONVENTIONS:
            accepted = ", ".join(map(repr, CONVENTIONS))
            raise ValueError(f"{name}: found {convention!r}, accepted: {accepted}")
    if source == target:
        return weight_decay
    if "l2" in (source, target) and not plain_sgd:
        raise ValueError(
            f"source and target: found {source!r} and {target!r}, accepted: 'l2' only with "
            "plain_sgd=True: with momentum or an adaptive rule lambda theta enters the moments, "
            "and no other convention has the same effect"
        )
    if {source, target} == {"lr", "l2"}:
        return weight_decay

    # rate is (1 - d) / eta, which no convention has to divide by eta for.
    if source == "decoupled":
        rate = weight_decay
    elif source == "proximal":
        rate = weight_decay / (1.0 + eta * weight_decay)
    else:
        rate = weight_decay * lr

    found = f"weight_decay: found {weight_decay} in the convention {source!r} with lr = {lr}"
    if target == "decoupled":
        converted = rate
    elif target == "proximal":
        factor = 1.0 - eta * rate
        if factor <= 0.0:
            raise ValueError(
                f"{found}, a factor of {factor}; accepted for 'proximal': a factor above 0, which "
                "is all that 1 / (1 + eta lambda) can be"
            )
        converted = rate / factor
    elif rate == 0.0:
        converted = 0.0
    elif lr == 0.0:
        raise ValueError(f"{found}; accepted for {target!r}: lr > 0, which multiplies lambda there")
    else:
        converted = rate / lr
    if not math.isfinite(converted) or not math.isfinite(eta * weight_decay):
        raise ValueError(f"{found}: the equivalent for {target!r} is beyond the range of numbers")
    return converted


@overload
def normalized_weight_decay(
    lambda_norm: float, *, batch_size: int, dataset_size: int, epochs: float
) -> float: ...


@overload
def normalized_weight_decay(
    lambda_norm: float, *, schedule: CosineWarmRestarts, t: float
) -> float: ...


def normalized_weight_decay(
    lambda_norm: float,
    *,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    epochs: float | None = None,
    schedule: CosineWarmRestarts | None = None,
    t: float | None = None,
) -> float:
    """Lambda = lambda_norm sqrt(b / (B T)): smaller, the longer training is.

    Loshchilov & Hutter (arXiv 1711.05101), normalized weight decay: the best lambda_norm depends
    less on the length of training than the best lambda. With warm restarts T is the
    length of the current cycle, so that lambda falls from cycle to cycle. A cycle of T_i steps has
    T = T_i b / B epochs, hence lambda = lambda_norm / sqrt(T_i) whatever b and B are.

    Args:
        lambda_norm: normalized weight decay, >= 0.
        batch_size: b, points a step, >= 1.
        dataset_size: B, training points, >= 1.
        epochs: T, passes over the training points in all, > 0.
        schedule: in place of these three, restarts to follow.
        t: with `schedule`, the number of completed steps, >= 0.

    Returns:
        The ``weight_decay`` to use, in the convention "decoupled".

    Raises:
        TypeError: neither all of the first three nor both of the last two, or a value of another
            type.
        ValueError: a value out of range.
    """
    lambda_norm = checks.number("lambda_norm", lambda_norm)
    budget = {"batch_size": batch_size, "dataset_size": dataset_size, "epochs": epochs}
    restarts = {"schedule": schedule, "t": t}
    given = [name for name, value in {**budget, **restarts}.items() if value is not None]
    if given == list(budget):
        b = checks.count("batch_size", batch_size)
        total = checks.count("dataset_size", dataset_size)
        return lambda_norm * math.sqrt(b / (total * checks.number("epochs", epochs, positive=True)))
    if given != list(restarts):
        raise TypeError(
            f"found {' and '.join(given) or 'nothing'} beside lambda_norm, "
            f"accepted: {', '.join(budget)}; or {' and '.join(restarts)}"
        )
    if not isinstance(schedule, CosineWarmRestarts):
        raise TypeError(f"schedule: found {schedule!r}, accepted: a CosineWarmRestarts")
    assert t is not None
    return lambda_norm / math.sqrt(schedule.cycle(t).T_i)
