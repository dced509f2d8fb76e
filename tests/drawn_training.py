"""Training on gradients that are drawn, not computed, so that parameters do not influence them.

Two optimizers that differ by rounding then get the same gradients, and stay as near to each other
as rounding keeps them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fused_adamw import FusedAdamW

# So large that decay on the wrong side of the step, a missing bias correction or eps inside the
# root changes a parameter by 1e-4 and more.
LOUD: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
SHAPES = [(7, 5), (33,), (), (0, 4), (2, 3, 4, 5)]
DECAYS = ("lr", "decoupled", "l2", "proximal")
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """The same values at every call."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    """The gradients of one step, the same at every call."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer: Optimizer, params: Sequence[Tensor], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def state_tensors(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return [value for p in params for _, value in sorted(optimizer.state[p].items())]


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict after a way through a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def assert_same_to_rounding(
    actual: Sequence[Tensor], expected: Sequence[Tensor], steps: int
) -> None:
    """Equal as far as two float32 computations of `steps` loud steps can be.

    Parameters are below 8, updates below 10 lr = 1. A step rounds the former four times and the
    latter some 16 times by a factor 1 + 2^-24, in both computations: 2 (4 * 8 + 16) < 128.
    """
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=steps * 128 * 2.0**-24)


class Pair:
    """FusedAdamW and an optimizer of torch, on parameters of their own with equal values."""

    def __init__(
        self,
        torchs: type[Optimizer] = AdamW,
        only_ours: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        arguments = {**LOUD, **arguments}
        self.our_params, self.their_params = make_params(), make_params()
        self.ours = FusedAdamW(self.our_params, **arguments, **(only_ours or {}))
        self.theirs = torchs(self.their_params, **arguments)
        self.steps = 0

    def both(self) -> list[tuple[Optimizer, list[nn.Parameter]]]:
        return [(self.ours, self.our_params), (self.theirs, self.their_params)]

    def train(self, steps: int) -> None:
        for optimizer, params in self.both():
            train(optimizer, params, range(self.steps, self.steps + steps))
        self.steps += steps

    def check(self) -> None:
        """Parameters and states are as near as rounding keeps them."""
        assert_same_to_rounding(self.our_params, self.their_params, self.steps)
        names = [[list(optimizer.state[p]) for p in params] for optimizer, params in self.both()]
        assert names[0] == names[1]
        states = [state_tensors(optimizer, params) for optimizer, params in self.both()]
        assert_same_to_rounding(states[0], states[1], self.steps)


class Twins:
    """Two equal FusedAdamW: one is tampered with, to the other the same is done plainly."""

    def __init__(self) -> None:
        self.params, self.plain_params = (make_params([(6, 6), (5,)]) for _ in range(2))
        self.optimizer = FusedAdamW(self.params, **LOUD)
        self.plain = FusedAdamW(self.plain_params, **LOUD)
        self.param, self.plain_param = self.params[0], self.plain_params[0]
        self.steps = 0
        self.train(2)

    def train(self, steps: int) -> None:
        now = range(self.steps, self.steps + steps)
        train(self.optimizer, self.params, now)
        train(self.plain, self.plain_params, now)
        self.steps += steps

    def check(self) -> None:
        """Further steps leave the same bits in parameters and states."""
        self.train(2)
        assert_same_bits(self.params, self.plain_params)
        assert_same_bits(
            state_tensors(self.optimizer, self.params), state_tensors(self.plain, self.plain_params)
        )
