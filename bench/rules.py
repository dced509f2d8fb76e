"""The update rules that can be measured: one entry each.

An entry says how every library spells the rule, so that to add one is to add one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: what the command line calls it.
        ours: its class in `fused_adamw`.
        states: arrays it keeps for each parameter.
        options: hyperparameters, under the names that we and torch share. They are loud, a learning
            rate and a decay of which every step shows: what is timed is also checked, and a decay
            that is missing or in the wrong place must not hide within the rounding.
        torch: its class in `torch.optim`.
        torch_kinds: the forms that torch has it in: of "fused", "foreach" and "compiled".
        peers: its name in the other libraries, by the name of the peer; see `peers`.
        has_eps: whether "eps" is one of its hyperparameters.
    """

    name: str
    ours: str
    states: int
    options: Mapping[str, Any]
    torch: str
    torch_kinds: tuple[str, ...] = ("fused", "foreach", "compiled")
    peers: Mapping[str, str] = field(default_factory=dict)
    has_eps: bool = True

    def bytes_per_param(self, dtype: torch.dtype) -> int:
        """Bytes that a step must move for each parameter, with every array of `dtype`.

        It reads the parameter, the gradient and the states and writes all but the gradient.
        """
        return (3 + 2 * self.states) * dtype.itemsize

    def sensitive(self) -> Rule:
        """Itself with a large eps, without which many an update is blind to the gradients' scale.

        It is also without the leap that an update makes where a small denominator is rounded.
        """
        return replace(self, options={**self.options, "eps": 1.0}) if self.has_eps else self


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="adamw",
            ours="FusedAdamW",
            states=2,
            options={"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1.0},
            torch="AdamW",
            peers={
                "optimi": "AdamW",
                "flashoptim": "FlashAdamW",
                "flashoptim-8bit": "FlashAdamW",
                "bitsandbytes": "AdamW32bit",
                "bitsandbytes-8bit": "AdamW8bit",
                "torchao": "_AdamW",
                "torchao-8bit": "AdamW8bit",
                "torchao-stochastic": "_AdamW",
                "deepspeed": "Adam",
            },
        ),
        Rule(
            name="adam",
            ours="FusedAdam",
            states=2,
            options={"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
            torch="Adam",
            peers={"optimi": "Adam", "deepspeed": "Adam"},
        ),
        Rule(
            name="nadamw",
            ours="FusedNadam",
            states=2,
            options={
                "lr": 0.1,
                "betas": (0.9, 0.99),
                "weight_decay": 1.0,
                "decoupled_weight_decay": True,
            },
            torch="NAdam",
            torch_kinds=("foreach", "compiled"),
        ),
        Rule(
            name="sgd",
            ours="FusedSGD",
            states=1,
            options={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
            torch="SGD",
            has_eps=False,
        ),
        Rule(  # without decay and with a constant learning rate it is torch's SGD
            name="sgdw",
            ours="FusedSGDW",
            states=1,
            options={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
            torch="SGD",
            has_eps=False,
        ),
        Rule(
            name="rmsprop",
            ours="FusedRMSprop",
            states=1,
            options={"lr": 0.1, "alpha": 0.9, "weight_decay": 0.1},
            torch="RMSprop",
            torch_kinds=("foreach", "compiled"),
        ),
        Rule(
            name="adagrad",
            ours="FusedAdagrad",
            states=1,
            options={"lr": 0.1, "weight_decay": 0.1, "eps": 1e-8},
            torch="Adagrad",
        ),
        Rule(
            name="adadelta",
            ours="FusedAdadelta",
            states=2,
            options={"lr": 1.0, "weight_decay": 0.1},
            torch="Adadelta",
            torch_kinds=("foreach", "compiled"),
        ),
        Rule(
            name="adamax",
            ours="FusedAdamax",
            states=2,
            options={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1},
            torch="Adamax",
            torch_kinds=("foreach", "compiled"),
        ),
    )
}
