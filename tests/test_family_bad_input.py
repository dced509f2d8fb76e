"""Every class refuses bad hyperparameters and schedules by name, and has written nothing then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drawn_training import make_params, set_grads, train
from family import CLASSES
from test_bad_input import INF, NAN, assert_clear, content, in_id, refused

from fused_adamw import _C, FusedAdam, FusedAdamW, FusedNadam, FusedSGD, schedules
from fused_adamw.hyperparameters import group_keys


def bad_values(cls: Any) -> list[tuple[str, Any]]:
    """For each hyperparameter of a class, values of the wrong range and type."""
    found: list[tuple[str, Any]] = [("differentiable", True), ("schedule", "cosine")]
    found += [("schedule", math.cos), ("schedule_step", -1), ("schedule_step", 0.5)]
    kinds = {argument.split("[")[0]: kind for _, argument, kind in _C.RULES[cls._rule][0]}
    for name in group_keys(cls._rule):
        if name == "betas":
            wrong: list[Any] = [(-0.1, 0.9), (1.0, 0.9), (0.9, NAN), (0.9, 1.0), (0.9,), 0.9, None]
            wrong += [(0.9, 0.9, 0.9), ("0.9", 0.9)]
        elif kinds[name] == "number":
            wrong = [NAN, INF, "0.1", None, torch.ones(2)]
            wrong += [] if name == "dampening" else [-0.1]  # torch's, too, may be negative
            wrong += [1.0, 1.5] if name in ("alpha", "rho") else []
        elif kinds[name] == "flag":
            wrong = ["yes", None, 2]
        else:
            assert kinds[name] == "decay"
            wrong = ["none", None, 1, True]
        found += [(name, value) for value in wrong]
    return found


CASES = [(cls, name, value) for cls in CLASSES for name, value in bad_values(cls)]


@pytest.mark.parametrize(("cls", "name", "value"), CASES, ids=in_id)
def test_bad_value(cls: Any, name: str, value: Any) -> None:
    """At construction, of a group, and set between steps."""
    kinds = (TypeError, ValueError, RuntimeError)
    a, b = make_params([(3,), (4,)])
    by_flag = cls in (FusedAdam, FusedNadam) and (name, value) == ("decay", None)
    if name != "schedule_step" and not by_flag:
        with pytest.raises(kinds) as caught:
            cls([a], **{name: value})
        assert_clear(caught.value, rf"\b{name}\b", "found", "accepted")
    with pytest.raises(kinds) as caught:
        cls([{"params": [a]}, {"params": [b], name: value}])
    assert_clear(caught.value, "group 1", rf"\b{name}\b", "found", "accepted")

    # The first group's schedule must not have moved either.
    schedule = schedules.CosineAnnealing(9)
    optimizer = cls([{"params": [a], "schedule": schedule}, {"params": [b], "schedule": schedule}])
    train(optimizer, [a, b], range(2))
    set_grads([a, b], 2)
    good = optimizer.param_groups[1][name]
    if name == "schedule_multiplier":
        optimizer.param_groups[1]["schedule"] = None  # which would set it
    optimizer.param_groups[1][name] = value
    with refused(optimizer, kinds, "group 1", rf"\b{name}\b", "found", "accepted"):
        optimizer.step()
    optimizer.param_groups[1][name] = good
    optimizer.step()
    assert optimizer.param_groups[1]["schedule_step"] == 3


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_refused_gradient_leaves_eta(cls: Any) -> None:
    params = make_params([(3,), (4,)])
    optimizer = cls(params, schedule=schedules.StepDecay(1, 0.5))
    train(optimizer, params, range(2))
    set_grads(params, 2)
    assert params[1].grad is not None
    params[1].grad.data = torch.ones(9)
    assert optimizer.param_groups[0]["schedule_multiplier"] == 0.5
    with refused(optimizer, ValueError, "parameter 1", "gradient"):
        optimizer.step()
    assert optimizer.param_groups[0]["schedule_multiplier"] == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "dampening": -0.1},
    ],
    ids=in_id,
)
def test_nesterov_needs_momentum_without_dampening(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nesterov: found True with momentum"):
        FusedSGD(make_params(), nesterov=True, **options)
    params = make_params()
    optimizer = FusedSGD(params, momentum=0.9, nesterov=True)
    train(optimizer, params, range(1))
    optimizer.param_groups[0].update(options)
    with refused(optimizer, ValueError, "group 0: nesterov: found True with momentum"):
        optimizer.step()


def test_schedule_beyond_numbers() -> None:
    """A product of multipliers is not kept finite by itself."""
    params = make_params()
    huge = schedules.Constant(1e200)
    optimizer = FusedAdamW(params, schedule=schedules.Product((huge, huge)))
    set_grads(params, 0)
    with refused(optimizer, ValueError, "group 0: schedule_multiplier: found inf, accepted"):
        optimizer.step()


@pytest.mark.parametrize("value", [INF, NAN, -1.0])
@pytest.mark.parametrize("cls", [c for c in CLASSES if c._counts], ids=lambda cls: cls.__name__)
def test_step_count_written_in_place(cls: Any, value: float) -> None:
    """Of the last parameter, in the memory that was registered: nothing has been replaced."""
    params = make_params()
    optimizer = cls(params)
    train(optimizer, params, range(2))
    count = optimizer.state[params[-1]]["step"]
    train(optimizer, params, range(2, 3))
    set_grads(params, 3)
    count.fill_(value)
    before = content([[param, param.grad] for param in params])
    with pytest.raises(ValueError, match=r"parameter 4 has a state 'step' of .*accepted") as caught:
        optimizer.step()
    assert_clear(caught.value, str(value)[:3])
    assert content([[param, param.grad] for param in params]) == before
    count.fill_(3.0)
    optimizer.step()
    assert count == 4
