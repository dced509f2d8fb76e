"""A schedule that an optimizer follows: the same bits as eta set by hand, beside torch's LR."""

from __future__ import annotations

from typing import Any

import pytest
from drawn_training import assert_same_bits, make_params, set_grads, state_tensors, train
from family import CLASSES
from torch.optim import lr_scheduler

from fused_adamw import FusedAdamW, FusedSGD, FusedSGDW, schedules

RESTARTS = schedules.CosineWarmRestarts(3, 2, eta_min=0.1)
WARM_UP = schedules.LinearWarmup(4, eta_min=0.25)
LOUD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@each
def test_is_eta_set_by_hand(cls: Any) -> None:
    params, expected = make_params(), make_params()
    scheduled, by_hand = cls(params, **LOUD, schedule=RESTARTS), cls(expected, **LOUD)
    constant = make_params()
    for t in range(12):
        train(scheduled, params, range(t, t + 1))
        assert scheduled.param_groups[0]["schedule_multiplier"] == RESTARTS(t)
        by_hand.param_groups[0]["schedule_multiplier"] = RESTARTS(t)
        train(by_hand, expected, range(t, t + 1))
    assert scheduled.param_groups[0]["schedule_step"] == 12
    assert_same_bits(params, expected)
    assert_same_bits(state_tensors(scheduled, params), state_tensors(by_hand, expected))
    train(cls(constant, **LOUD), constant, range(12))
    assert (constant[0] - params[0]).abs().max() > 1e-3


@each
def test_groups_have_their_own(cls: Any) -> None:
    params, expected = make_params(), make_params()
    schedule_of = (RESTARTS, None, WARM_UP)
    groups = [
        [{"params": own[:1]}, {"params": own[1:2]}, {"params": own[2:]}]
        for own in (params, expected)
    ]
    for group, schedule in zip(groups[0], schedule_of, strict=True):
        group["schedule"] = schedule
    scheduled, by_hand = cls(groups[0], **LOUD), cls(groups[1], **LOUD)
    for t in range(8):
        for group, schedule in zip(by_hand.param_groups, schedule_of, strict=True):
            group["schedule_multiplier"] = 1.0 if schedule is None else schedule(t)
        train(by_hand, expected, range(t, t + 1))
        train(scheduled, params, range(t, t + 1))
    assert_same_bits(params, expected)


@each
def test_works_beside_torchs_schedulers_of_lr(cls: Any) -> None:
    """They move alpha, the schedule moves eta."""
    params, expected = make_params(), make_params()
    scheduled, by_hand = cls(params, **LOUD, schedule=RESTARTS), cls(expected, **LOUD)
    scheduler = lr_scheduler.CosineAnnealingLR(scheduled, 10)
    other = lr_scheduler.CosineAnnealingLR(cls(make_params(), **LOUD), 10)
    for t in range(8):
        (group,) = by_hand.param_groups
        (alpha,) = other.get_last_lr()
        group.update(lr=alpha, schedule_multiplier=RESTARTS(t))
        set_grads(params, t)
        scheduled.step()
        scheduler.step()
        train(by_hand, expected, range(t, t + 1))
        other.optimizer.step()
        other.step()
    assert scheduled.param_groups[0]["lr"] == other.get_last_lr()[0] < 0.1
    assert_same_bits(params, expected)


def test_group_added_later_starts_its_own() -> None:
    a, b = make_params([(3,), (4,)])
    optimizer = FusedAdamW([a], schedule=RESTARTS)
    train(optimizer, [a], range(2))
    optimizer.add_param_group({"params": [b]})
    train(optimizer, [a, b], range(2, 3))
    assert [g["schedule_multiplier"] for g in optimizer.param_groups] == [RESTARTS(2), RESTARTS(0)]


def test_schedule_is_set_and_taken_away_in_training() -> None:
    params = make_params()
    optimizer = FusedAdamW(params)
    (group,) = optimizer.param_groups
    train(optimizer, params, range(2))
    assert group["schedule_multiplier"] == 1.0
    group["schedule"] = WARM_UP
    train(optimizer, params, range(2, 3))
    assert group["schedule_multiplier"] == WARM_UP(2)
    group["schedule"] = None
    group["schedule_multiplier"] = 0.5
    train(optimizer, params, range(3, 4))
    assert group["schedule_multiplier"] == 0.5


def test_eta_within_the_papers_buffer() -> None:
    """Under a schedule the buffer with eta lr in it is not the one without."""
    ends = []
    for cls, options in (
        (FusedSGDW, {}),
        (FusedSGDW, {"lr_in_momentum": False}),
        (FusedSGD, {"momentum": 0.9, "decay": "decoupled"}),
    ):
        params = make_params()
        train(cls(params, **LOUD, **options, schedule=RESTARTS), params, range(6))
        ends.append(params)
    assert_same_bits(ends[1], ends[2])
    assert (ends[0][0] - ends[1][0]).abs().max() > 1e-3
