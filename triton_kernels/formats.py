"""The storage formats: what they are called, and what a kernel is compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from . import beside, codes
from .storage import STORAGE_DTYPES


class Format(NamedTuple):
    """How a parameter, its gradient and its states live in memory.

    Attributes:
        param: dtype of the parameter: "float32", "bfloat16" or "float16".
        grad: dtype of the gradient.
        state: dtype of the states, or "code8".
        beside: what the parameter's lower bits are kept in; see `beside`.
        stochastic: whether parameter and states are rounded to bfloat16 stochastically.
        kinds: of states that are coded what each is; see `codes`. Empty where they are not.
    """

    param: str
    grad: str
    state: str
    beside: str = ""
    stochastic: bool = False
    kinds: tuple[str, ...] = ()

    @property
    def draws(self) -> bool:
        """Whether it takes random bits."""
        return self.stochastic or self.beside == "remainder8"


class Layout(NamedTuple):
    """What a kernel is compiled for, beside its rule. Constants of kernels are in capitals.

    Attributes:
        DTYPES: of the arrays that have an element for each of the parameter's: param, grad, the
            states, what is beside the param, its moving average.
        BESIDE: see `Format`.
        STOCHASTIC: see `Format`.
        KINDS: see `Format`.
        DRAWS: whether it takes random bits.
        RUNS: whether a tensor's elements are in runs of the whole one; see `TensorList`.
        EMA: whether there is a moving average.
        ZERO_GRADS: whether the gradient is overwritten with zeros.
    """

    DTYPES: tuple[Any, ...]
    BESIDE: str
    STOCHASTIC: bool
    KINDS: tuple[str, ...]
    DRAWS: bool
    RUNS: bool
    EMA: bool
    ZERO_GRADS: bool


def layout(
    format: Format,
    states: int,
    runs: bool = False,
    ema: bool = False,
    zero_grads: bool = False,
) -> Layout:
    """The layout of a format.

    Args:
        format: the format.
        states: how many the rule has.
        runs: whether elements that take random bits are in runs of the whole tensor.
        ema: whether there is a moving average.
        zero_grads: whether the gradient is overwritten with zeros.
    """
    if format.kinds:
        of_states = [codes.DTYPES[kind] for kind in format.kinds]
    else:
        of_states = [STORAGE_DTYPES[format.state] for _ in range(states)]
    dtypes = [STORAGE_DTYPES[format.param], STORAGE_DTYPES[format.grad], *of_states]
    if format.beside:
        dtypes.append(beside.DTYPES[format.beside])
    if ema:
        dtypes.append(tl.float32)
    return Layout(
        tuple(dtypes),
        format.beside,
        format.stochastic,
        format.kinds,
        format.draws,
        runs,
        ema,
        zero_grads,
    )
