"""A step within a graph of torch.compile: one operator, which runs the ordinary step.

[note: what is traced] The graph gets the tensors that a step reads and writes, and the number of
the optimizer. Everything else (learning rate, schedules, options) is read by the ordinary step on
the host when the operator runs, so that no change of it compiles anew. What is compiled for is
which parameters have gradients and states: the first step, which makes the states, is another
graph.

[note: graph or no graph] An operator costs time: torch checks each tensor before it runs the graph,
and counts each as written. For 200 small parameters on a CPU that was over 10 us each, and 70 ms
to compile, where a step outside the graph takes 0.3 us and compiles nothing. Nothing in a step can
be fused with its neighbours either. So the operator is used only where the graph must not end:
fullgraph=True.

[note: inductor] That of torch 2.13 moves an elementwise read of a tensor behind a custom operator
that writes to it, where a result of the graph has a gradient. So a function that does that before
its step, and has no backward pass, must be compiled without fullgraph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fused_adamw.optimizer import FusedOptimizer

_optimizers: weakref.WeakValueDictionary[int, FusedOptimizer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(optimizer: FusedOptimizer) -> int:
    """The number by which the operator finds an optimizer: another for every copy."""
    number: int | None = optimizer.__dict__.get("_number")
    if number is None or _optimizers.get(number) is not optimizer:
        number = next(_numbers)
        _optimizers[number] = optimizer
    return number


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def graph_must_not_end() -> bool:
    """Whether what is being traced was asked to be one graph; asked by the tracer itself."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        return bool(tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError):
        return True  # not torch's public interface; the operator serves either way


def step(optimizer: FusedOptimizer) -> None:
    """``optimizer.step()``, written for the tracer of torch.compile."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    states: list[Tensor] = []
    places: list[int] = []
    count = 0
    # Of an attribute of this name the tracer would compile for every value of every group.
    for group in optimizer.__dict__["param_groups"]:
        for param in group["params"]:
            if param.grad is not None:
                params.append(param)
                grads.append(param.grad)
                places.append(count)
            count += 1
    # Only now: where it comes upon a parameter as a key first, it compiles for every new gradient.
    for param in params:
        states.extend(_tensors(optimizer, param))
    with torch.no_grad():
        _step(params, grads, states, places, optimizer._number)


def _tensors(optimizer: FusedOptimizer, param: Tensor) -> list[Tensor]:
    """The states of a parameter; none before its first step, in which the operator makes them."""
    state = optimizer._state.get(param)
    return [value for value in state.values() if isinstance(value, Tensor)] if state else []


@torch.library.custom_op("fused_adamw::step", mutates_args=("params", "states"))
def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    places: Sequence[int],
    number: int,
) -> None:
    """Steps parameters with the gradients given; those that are not given keep what they are.

    Args:
        params: parameters of the optimizer, or tensors in their place, which are written.
        grads: their gradients.
        states: the states of all of them, one after the other; likewise.
        places: the number of each parameter among those of the optimizer.
        number: the optimizer's.
    """
    optimizer = _optimizers.get(number)
    if optimizer is None:
        raise RuntimeError(
            f"number: found {number}, accepted: that of an optimizer that has not been freed"
        )
    if optimizer.zero_grads:
        raise RuntimeError(
            "zero_grads: found True in a compiled graph, which takes gradients to be read only; "
            "accepted: False, or a step outside the graph (fullgraph=False)"
        )
    own = [param for group in optimizer.param_groups for param in group["params"]]
    given = dict(zip(places, grads, strict=True))
    written = list(zip((own[place] for place in places), params, strict=True))
    if states:
        own_states = [value for place in places for value in _tensors(optimizer, own[place])]
        written += zip(own_states, states, strict=True)
    # A graph may work on copies, which it writes back when it is done.
    copied = [
        (mine, copy)
        for mine, copy in written
        if mine is not copy and mine.data_ptr() != copy.data_ptr()
    ]
    with ExitStack() as restore:
        for i, param in enumerate(own):
            if param.grad is not given.get(i):
                restore.callback(setattr, param, "grad", param.grad)
                param.grad = given.get(i)
        if copied:
            restore.callback(optimizer._give_up_registered)
            optimizer._give_up_registered()
        for mine, copy in copied:
            restore.callback(setattr, mine, "data", mine.data)
            mine.data = copy.detach()
        optimizer.step()


@_step.register_fake
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    places: Sequence[int],
    number: int,
) -> None:
    """Nothing is returned, and nothing is known beforehand of what is written."""
