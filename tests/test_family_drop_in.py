"""Every class in the place of torch's: interface, 100 steps, options, and what users do to both."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from drawn_training import assert_same_bits, make_params, saved, set_grads, train
from family import CASES, DROP_INS, DropIn, assert_as_near_as, in_id, numbers_of, params_in
from torch import Tensor
from torch.optim import SGD, Optimizer

from fused_adamw import FusedAdagrad, FusedAdam, FusedNadam, FusedSGD

STEPS = 100
each = pytest.mark.parametrize("drop_in", DROP_INS, ids=in_id)


class Three:
    """Ours, torch's, and torch's in float64, over parameters of their own with equal values."""

    def __init__(self, drop_in: DropIn, options: dict[str, Any]) -> None:
        self.params = [params_in(dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
        classes = (drop_in.ours, drop_in.theirs, drop_in.theirs)
        arguments = {**drop_in.loud, **options}
        self.optimizers: list[Optimizer] = [
            cls(params, **arguments) for cls, params in zip(classes, self.params, strict=True)
        ]
        self.steps = 0

    def set(self, **values: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0].update(values)

    def train(self, steps: int, without: frozenset[int] = frozenset()) -> None:
        """The same gradients for all three; `without` names the parameters that get none."""
        for step in range(self.steps, self.steps + steps):
            set_grads(self.params[0], step)
            for param in (self.params[0][i] for i in without):
                param.grad = None
            for other in self.params[1:]:
                for param, first in zip(other, self.params[0], strict=True):
                    param.grad = None if first.grad is None else first.grad.to(param.dtype)
            for optimizer in self.optimizers:
                optimizer.step()
        self.steps += steps

    def check(self) -> None:
        pairs = list(zip(self.optimizers, self.params, strict=True))
        keys = [[sorted(o.state.get(p, {})) for p in params] for o, params in pairs]
        assert keys[0] == keys[1]
        assert_as_near_as(*(numbers_of(optimizer, params) for optimizer, params in pairs))


# --- Interface -----------------------------------------------------------------------------------


@each
def test_signature_is_torchs(drop_in: DropIn) -> None:
    """Torch's arguments by position, where torch takes them so, and by keyword; same defaults."""
    ours = inspect.signature(drop_in.ours).parameters
    theirs = inspect.signature(drop_in.theirs).parameters
    by_position = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == by_position
    for name in by_position[1:]:
        assert ours[name].default == theirs[name].default
    given = {name: p.default for name, p in theirs.items() if name != "params"}
    optimizer = drop_in.ours(make_params(), **given)
    assert optimizer.defaults.items() >= drop_in.theirs(make_params(), **given).defaults.items()
    drop_in.ours(make_params(), *(given[name] for name in by_position[1:]))


@each
def test_defaults_and_groups_are_torchs(drop_in: DropIn) -> None:
    ours, theirs = drop_in.ours(make_params()), drop_in.theirs(make_params())
    assert isinstance(ours, Optimizer)
    assert ours.defaults.items() >= theirs.defaults.items()
    expected = {name: value for name, value in theirs.param_groups[0].items() if name != "params"}
    assert ours.param_groups[0].items() >= expected.items()


@pytest.mark.parametrize(("drop_in", "options"), CASES, ids=in_id)
def test_state_dict_looks_like_torchs(drop_in: DropIn, options: dict[str, Any]) -> None:
    """Also in bfloat16: same states, shapes, strides and dtypes, but for the product of mu."""
    found = []
    for cls in (drop_in.ours, drop_in.theirs):
        params = make_params(dtype=torch.bfloat16)
        optimizer = cls(params, **{**drop_in.loud, **options})
        train(optimizer, params, range(2))
        found.append(optimizer.state_dict())
    ours, theirs = found
    assert ours["param_groups"][0].items() >= theirs["param_groups"][0].items()
    assert list(ours["state"]) == list(theirs["state"])
    for index, state in theirs["state"].items():
        assert sorted(ours["state"][index]) == sorted(state)
        for name, value in state.items():
            actual = ours["state"][index][name]
            dtype = torch.float64 if name == "mu_product" else value.dtype
            assert (actual.shape, actual.dtype) == (value.shape, dtype), name
            assert (actual.stride(), actual.device) == (value.stride(), value.device), name
    assert saved(ours)["param_groups"] == ours["param_groups"]


# --- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drop_in", "options"), CASES, ids=in_id)
def test_follows_torch(drop_in: DropIn, options: dict[str, Any]) -> None:
    three = Three(drop_in, options)
    three.train(STEPS)
    three.check()


@each
def test_default_hyperparameters_follow_torch(drop_in: DropIn) -> None:
    three = Three(drop_in._replace(loud={}), {})
    three.train(STEPS)
    three.check()


@pytest.mark.parametrize(("drop_in", "options"), CASES, ids=in_id)
def test_params_without_gradient(drop_in: DropIn, options: dict[str, Any]) -> None:
    """Gradients that come late and stay away; each parameter has its own count of steps."""
    three = Three(drop_in, options)
    for without in ({0, 2}, {0}, {1}, set(), {0, 1, 2, 3, 4}, {3, 4}, set()):
        before = [param.detach().clone() for param in three.params[0]]
        three.train(1, frozenset(without))
        for i in without:
            assert_same_bits([three.params[0][i]], [before[i]])
    # torch's Adagrad has states from the start.
    three.check()


@each
def test_groups_have_their_own_hyperparameters(drop_in: DropIn) -> None:
    three = Three(drop_in, {})
    arguments = {name: value for name, value in drop_in.loud.items() if name != "lr"}
    for i, (optimizer, (a, b, *rest)) in enumerate(
        zip(three.optimizers, three.params, strict=True)
    ):
        groups = [
            {"params": [a], "lr": 0.01, "weight_decay": 0.0},
            {"params": [b], "maximize": True},
        ]
        three.optimizers[i] = type(optimizer)(groups, lr=0.1, **arguments)
        three.optimizers[i].add_param_group({"params": rest, "lr": 0.03})
    three.train(10)
    three.check()


@each
def test_closure(drop_in: DropIn) -> None:
    for cls in (drop_in.ours, drop_in.theirs):
        (param,) = make_params([(5,)])
        optimizer = cls([param], **{**drop_in.loud, "lr": 0.01})

        def closure(optimizer: Optimizer = optimizer, param: Tensor = param) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (param**2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [float(optimizer.step(closure)) for _ in range(8)]
        assert losses[-1] < losses[0]
        assert optimizer.step() is None


@pytest.mark.parametrize("drop_in", DROP_INS[:2] + DROP_INS[3:4], ids=in_id)
def test_group_is_given_torchs_flag(drop_in: DropIn) -> None:
    """Only the flag, as in code for torch, and it means what it means there."""
    three = Three(drop_in, {})
    for flag in (False, True):
        for i, (optimizer, (a, b, *_)) in enumerate(
            zip(three.optimizers, three.params, strict=True)
        ):
            groups = [{"params": [a], "decoupled_weight_decay": flag}, {"params": [b]}]
            three.optimizers[i] = type(optimizer)(groups, **drop_in.loud)
        assert three.optimizers[0].param_groups[0]["decay"] == ("lr" if flag else "l2")
        three.train(10)
        three.check()


# --- Momentum of SGD -----------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_switched_on_later(nesterov: bool) -> None:
    """The buffer starts with the gradient then, whatever the dampening."""
    three = Three(DROP_INS[2], {})
    three.train(3)
    three.set(momentum=0.9, nesterov=nesterov, dampening=0.0 if nesterov else 0.5)
    three.train(1)
    three.check()
    three.train(5)
    three.check()


def test_momentum_is_switched_off_and_on() -> None:
    """The buffer waits in the state, in torch too."""
    three = Three(DROP_INS[2], {"momentum": 0.9, "dampening": 0.5})
    three.train(3)
    for momentum in (0.0, 0.9):
        three.set(momentum=momentum)
        three.train(3)
        three.check()


def test_first_gradient_is_not_dampened() -> None:
    (param,) = make_params([(5,)])
    optimizer = FusedSGD([param], momentum=0.9, dampening=0.75)
    gradients = []
    for step in range(2):
        set_grads([param], step)
        assert param.grad is not None
        gradients.append(param.grad.clone())
        optimizer.step()
        if step == 0:
            assert_same_bits([optimizer.state[param]["momentum_buffer"]], gradients)
    # Of two products and a sum, each rounded.
    torch.testing.assert_close(
        optimizer.state[param]["momentum_buffer"],
        0.9 * gradients[0] + 0.25 * gradients[1],
        rtol=4 * 2.0**-24,
        atol=4 * 2.0**-24,
    )


def test_first_gradient_after_states_were_cleared() -> None:
    three = Three(DROP_INS[2], {"momentum": 0.9, "dampening": 0.5})
    three.train(3)
    for optimizer in three.optimizers:
        optimizer.state.clear()
    three.train(3)
    three.check()


def test_plain_sgd_keeps_no_states() -> None:
    for cls in (FusedSGD, SGD):
        params = make_params()
        optimizer = cls(params, lr=0.1)
        train(optimizer, params, range(2))
        assert optimizer.state_dict()["state"] == {}


# --- What is added to torch ----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FusedAdam, FusedNadam])
def test_flag_and_convention_must_agree(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"decoupled_weight_decay: found True beside decay 'l2'"):
        cls(make_params(), decoupled_weight_decay=True, decay="l2")
    optimizer = cls(make_params(), decoupled_weight_decay=True, decay="decoupled")
    assert optimizer.defaults["decay"] == "decoupled"
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    with pytest.raises(ValueError, match="param group 0: decoupled_weight_decay: found False"):
        optimizer.step()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None])
def test_initial_accumulator_value(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="initial_accumulator_value: found"):
        FusedAdagrad(make_params(), initial_accumulator_value=value)
    a, b = make_params([(3,), (4,)])
    with pytest.raises((TypeError, ValueError), match="group 1: initial_accumulator_value: found"):
        FusedAdagrad([{"params": [a]}, {"params": [b], "initial_accumulator_value": value}])
    optimizer = FusedAdagrad([a])
    optimizer.param_groups[0]["initial_accumulator_value"] = value
    set_grads([a], 0)
    with pytest.raises((TypeError, ValueError), match="initial_accumulator_value: found"):
        optimizer.step()
    assert not optimizer.state
