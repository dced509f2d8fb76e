"""The optimizers that stand in for torch's, with the options in which these can differ: data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from drawn_training import make_params
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import fused_adamw
from fused_adamw.optimizer import FusedOptimizer


class DropIn(NamedTuple):
    """A class of ours, torch's, and hyperparameters that each change parameters by 1e-4 or more."""

    ours: type[FusedOptimizer]
    theirs: type[Optimizer]
    loud: dict[str, Any]
    options: Sequence[dict[str, Any]]

    def __str__(self) -> str:
        return self.theirs.__name__


_ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
_UP = {"maximize": True}
_NO_DECAY = {"weight_decay": 0.0}
_MOMENTUM = {"momentum": 0.9}
_NESTEROV = {**_MOMENTUM, "nesterov": True}

DROP_INS = [
    DropIn(
        fused_adamw.FusedAdamW,
        optim.AdamW,
        _ADAM,
        [{}, _UP, _NO_DECAY, {"amsgrad": True}, {"amsgrad": True, **_UP}],
    ),
    DropIn(
        fused_adamw.FusedAdam,
        optim.Adam,
        _ADAM,
        [{}, _UP, _NO_DECAY, {"amsgrad": True}, {"decoupled_weight_decay": True, **_UP}],
    ),
    DropIn(
        fused_adamw.FusedSGD,
        optim.SGD,
        {"lr": 0.1, "weight_decay": 0.1},
        [
            {},
            _UP,
            _NO_DECAY,
            _MOMENTUM,
            {**_MOMENTUM, "dampening": 0.5},
            {**_MOMENTUM, "dampening": -0.5, **_UP},
            _NESTEROV,
            {**_NESTEROV, **_UP},
            {**_NESTEROV, **_NO_DECAY},
        ],
    ),
    DropIn(
        fused_adamw.FusedNadam,
        optim.NAdam,
        {**_ADAM, "momentum_decay": 0.1},
        [
            {},
            _UP,
            _NO_DECAY,
            {"momentum_decay": 4e-3},
            {"momentum_decay": 0.0},
            {"decoupled_weight_decay": True},
            {"decoupled_weight_decay": True, **_UP},
        ],
    ),
    DropIn(
        fused_adamw.FusedRMSprop,
        optim.RMSprop,
        {"lr": 0.1, "alpha": 0.9, "eps": 1e-2, "weight_decay": 0.1},
        [
            {},
            _UP,
            _NO_DECAY,
            {"centered": True},
            {**_MOMENTUM, "lr": 0.01},
            {**_MOMENTUM, "lr": 0.01, "centered": True, **_UP},
        ],
    ),
    DropIn(
        fused_adamw.FusedAdagrad,
        optim.Adagrad,
        {"lr": 0.5, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-2},
        [{}, _UP, _NO_DECAY, {"lr_decay": 0.0}, {"initial_accumulator_value": 0.5}],
    ),
    DropIn(
        fused_adamw.FusedAdadelta,
        optim.Adadelta,
        {"lr": 1.0, "rho": 0.9, "eps": 1e-3, "weight_decay": 0.1},
        [{}, _UP, _NO_DECAY],
    ),
    DropIn(fused_adamw.FusedAdamax, optim.Adamax, _ADAM, [{}, _UP, _NO_DECAY]),
]
CLASSES: list[Any] = [
    *(drop_in.ours for drop_in in DROP_INS),
    fused_adamw.FusedAdamProx,
    fused_adamw.FusedLion,
    fused_adamw.FusedNadamW,
    fused_adamw.FusedSGDW,
]
CASES = [(drop_in, options) for drop_in in DROP_INS for options in drop_in.options]


def in_id(value: Any) -> str:
    """Short names for test ids."""
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items()) or "plain"
    return str(value)


def params_in(dtype: torch.dtype) -> list[nn.Parameter]:
    """The float32 values of `make_params`, in a dtype that holds them."""
    return [nn.Parameter(param.detach().to(dtype)) for param in make_params()]


def numbers_of(optimizer: Optimizer, params: Sequence[Tensor]) -> dict[str, Tensor]:
    """All parameters, and all states of a name, each as one float64 vector."""
    found = {"params": list(params)}
    for param in params:
        for name, value in optimizer.state[param].items():
            found.setdefault(name, []).append(value)
    return {
        name: torch.cat([value.detach().double().flatten() for value in values])
        for name, values in found.items()
    }


def assert_as_near_as(
    actual: dict[str, Tensor], other: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Rounding in float32 takes `actual` no farther from `truth` than it takes `other`.

    Both round about as often, but at other places, hence a factor of 3 between the largest errors
    and four units in the last place of the largest number. What a wrong formula does to loud
    hyperparameters is a hundred times as much.
    """
    assert actual.keys() == other.keys() == truth.keys()
    for name, expected in truth.items():
        allowed = 3 * (other[name] - expected).abs().max()
        units = 4
        if name == "mu_product":  # torch rounds it to float32 at every step whatever the parameter
            units = int(truth["step"].max())
        allowed = allowed + units * 2.0**-24 * expected.abs().max()
        assert (actual[name] - expected).abs().max() <= allowed, name
