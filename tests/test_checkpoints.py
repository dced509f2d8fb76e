"""Checkpoints: to and from torch, own ones, old ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn_training import (
    LOUD,
    MOMENTS,
    assert_same_bits,
    assert_same_to_rounding,
    make_params,
    saved,
    set_grads,
    state_tensors,
    train,
)
from torch.optim import Adam, AdamW, Optimizer

from fused_adamw import FusedAdamW


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [(AdamW, FusedAdamW), (FusedAdamW, AdamW)], ids=["from torch", "to torch"]
)
def test_checkpoints_are_exchanged_with_torch(
    first: type[Optimizer], second: type[Optimizer], amsgrad: bool
) -> None:
    params, expected = make_params(), make_params()
    uninterrupted = AdamW(expected, **LOUD, amsgrad=amsgrad)
    train(uninterrupted, expected, range(8))

    begun = first(params, **LOUD, amsgrad=amsgrad)
    train(begun, params, range(4))
    continued = second(params)  # the hyperparameters come with the checkpoint
    continued.load_state_dict(saved(begun.state_dict()))
    train(continued, params, range(4, 8))

    assert_same_to_rounding(params, expected, 8)
    assert_same_to_rounding(
        state_tensors(continued, params), state_tensors(uninterrupted, expected), 8
    )
    assert all(continued.state[p]["step"] == 8 for p in params)
    for name, value in LOUD.items():
        assert continued.param_groups[0][name] == value


def test_checkpoint_survives_the_way_through_torch() -> None:
    """What torch does not know of comes back as it went."""
    params = make_params()
    ours = FusedAdamW(params, **LOUD, decay="decoupled", schedule_multiplier=0.5)
    train(ours, params, range(2))
    torchs = AdamW(params)
    torchs.load_state_dict(saved(ours.state_dict()))
    back = FusedAdamW(params, decay="decoupled")
    back.load_state_dict(saved(torchs.state_dict()))
    assert back.param_groups[0]["schedule_multiplier"] == 0.5
    assert back.param_groups[0]["decay"] == "decoupled"


def test_adams_checkpoint_belongs_to_l2() -> None:
    params, expected = make_params(), make_params()
    train(Adam(expected, **LOUD), expected, range(6))
    begun = Adam(params, **LOUD)
    train(begun, params, range(3))
    continued = FusedAdamW(params, decay="l2")
    continued.load_state_dict(saved(begun.state_dict()))
    train(continued, params, range(3, 6))
    assert_same_to_rounding(params, expected, 6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decay": "proximal"}])
def test_own_checkpoint_continues_with_the_same_bits(options: dict[str, Any]) -> None:
    params, expected = make_params(), make_params()
    train(FusedAdamW(expected, **LOUD, **options), expected, range(6))
    begun = FusedAdamW(params, **LOUD, **options)
    train(begun, params, range(3))
    continued = FusedAdamW(params, decay=options.get("decay", "lr"))
    continued.load_state_dict(saved(begun.state_dict()))
    train(continued, params, range(3, 6))
    assert_same_bits(params, expected)


def test_checkpoint_after_amsgrad_was_turned_off() -> None:
    """The maximum stays among the states, in torch too: such a checkpoint must load again."""
    params, expected = make_params(), make_params()
    for own in (params, expected):
        optimizer = FusedAdamW(own, **LOUD, amsgrad=True)
        train(optimizer, own, range(2))
        optimizer.param_groups[0]["amsgrad"] = False
        train(optimizer, own, range(2, 3))
        if own is params:
            state_dict = saved(optimizer.state_dict())
            optimizer = FusedAdamW(own)
            optimizer.load_state_dict(state_dict)
        train(optimizer, own, range(3, 5))
    assert_same_bits(params, expected)


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda n: torch.tensor([float(n)])])
def test_old_checkpoints_of_torch(kind: Callable[[int], Any]) -> None:
    """Their step was a number, and their groups had fewer keys."""
    params, expected = make_params(), make_params()
    train(FusedAdamW(expected, **LOUD), expected, range(5))
    begun = FusedAdamW(params, **LOUD)
    train(begun, params, range(3))
    old = saved(begun.state_dict())
    for state in old["state"].values():
        state["step"] = kind(int(state["step"]))
    known = {*LOUD, "amsgrad", "params"}
    old["param_groups"] = [{k: group[k] for k in known} for group in old["param_groups"]]
    continued = FusedAdamW(params)
    continued.load_state_dict(old)
    step = continued.state[params[0]]["step"]
    assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 3.0)
    train(continued, params, range(3, 5))
    assert_same_bits(params, expected)


def test_loaded_states_are_not_shared() -> None:
    params = make_params()
    optimizer = FusedAdamW(params, **{**LOUD, "lr": torch.tensor(0.1)})
    train(optimizer, params, range(2))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    loaded = FusedAdamW(make_params())
    loaded.load_state_dict(state_dict)
    train(loaded, loaded.param_groups[0]["params"], range(2, 4))
    loaded.param_groups[0]["lr"].fill_(7.0)
    assert state_dict["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(state_dict["state"][index][name], value)


def test_params_without_a_saved_state_start_anew() -> None:
    a, b = make_params([(3,), (4,)])
    optimizer = FusedAdamW([a, b], **LOUD)
    set_grads([a], 0)
    optimizer.step()
    state_dict = saved(optimizer.state_dict())
    assert list(state_dict["state"]) == [0]
    optimizer.load_state_dict(state_dict)
    train(optimizer, [a, b], range(1, 3))
    assert [float(optimizer.state[p]["step"]) for p in (a, b)] == [3.0, 2.0]


def test_checkpoint_of_other_strides() -> None:
    (plain,), (transposed,) = make_params([(4, 6)]), make_params([(4, 6)])
    transposed.data = transposed.detach().t().contiguous().t()
    begun = FusedAdamW([transposed], **LOUD)
    train(begun, [transposed], range(2))
    expected = FusedAdamW([plain], **LOUD)
    train(expected, [plain], range(4))
    (continued,) = make_params([(4, 6)])
    continued.data = transposed.detach().contiguous()
    optimizer = FusedAdamW([continued])
    optimizer.load_state_dict(saved(begun.state_dict()))
    train(optimizer, [continued], range(2, 4))
    assert_same_bits([continued], [plain])


@pytest.mark.parametrize(
    ("param_dtype", "state_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_state_dtype(param_dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    params = make_params(dtype=param_dtype)
    optimizer = FusedAdamW(params, **LOUD, amsgrad=True, state_dtype=state_dtype)
    train(optimizer, params, range(2))
    state_dict = saved(optimizer.state_dict())
    for state in optimizer.state.values():
        assert {state[name].dtype for name in (*MOMENTS, "max_exp_avg_sq")} == {state_dtype}
        assert state["step"].dtype == torch.float32

    same = FusedAdamW(params, state_dtype=state_dtype)
    same.load_state_dict(state_dict)
    assert_same_bits(state_tensors(same, params), state_tensors(optimizer, params))
    other = FusedAdamW(params)
    other.load_state_dict(state_dict)
    for param in params:
        for name in MOMENTS:
            expected = optimizer.state[param][name].to(param_dtype)
            assert_same_bits([other.state[param][name]], [expected])
    train(other, params, range(2, 3))
