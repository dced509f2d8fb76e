"""Steps in compiled functions: in the graph where it must not end, and after it elsewhere."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from drawn_training import (
    LOUD,
    assert_same_bits,
    make_params,
    saved,
    set_grads,
    state_tensors,
    train,
)
from family import CLASSES
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.library import opcheck
from torch.optim import Optimizer, lr_scheduler

from fused_adamw import FusedAdamW, compiled, schedules

BACKENDS = ["eager", "aot_eager", "inductor"]
RESTARTS = schedules.CosineWarmRestarts(3, 2, eta_min=0.1)
EVERY: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Twins:
    """An optimizer whose step is one compiled graph, and one that is stepped as ever."""

    def __init__(self, cls: Any = FusedAdamW, backend: str = "aot_eager", **options: Any) -> None:
        options = options or (LOUD if cls is FusedAdamW else EVERY)
        self.params, self.plain_params = make_params(), make_params()
        self.ours, self.plain = (
            cls([{"params": p[:2]}, {"params": p[2:], "lr": 0.03}], **options)
            for p in (self.params, self.plain_params)
        )
        self.graphs = CompileCounterWithBackend(backend)
        self.step = torch.compile(self.iteration, backend=self.graphs, fullgraph=True)
        self.t = 0

    def iteration(self) -> Tensor:
        """Reads a parameter before and after the step."""
        with torch.no_grad():
            before = self.params[0] * 2
            self.ours.step()
            return before + self.params[0]

    def train(self, steps: int, without: int | None = None) -> None:
        """Steps both; one parameter may be without a gradient."""
        for t in range(self.t, self.t + steps):
            before = self.plain_params[0].detach().clone()
            for params in (self.params, self.plain_params):
                set_grads(params, t)
                if without is not None:
                    params[without].grad = None
            self.plain.step()
            found = self.step()
            assert_same_bits([found], [before * 2 + self.plain_params[0]])
        self.t += steps

    def check(self) -> None:
        assert_same_bits(self.params, self.plain_params)
        assert_same_bits(
            state_tensors(self.ours, self.params), state_tensors(self.plain, self.plain_params)
        )
        groups = [optimizer.state_dict()["param_groups"] for optimizer in (self.ours, self.plain)]
        assert groups[0] == groups[1]


@each
def test_same_bits_while_values_change(cls: Any) -> None:
    """Nothing is compiled for new values: only for the first step, which makes the states."""
    twins = Twins(cls)
    for t in range(5):
        for optimizer in (twins.ours, twins.plain):
            optimizer.param_groups[0].update(lr=0.1 / (t + 1), schedule_multiplier=1 - 0.1 * t)
            optimizer.param_groups[1].update(weight_decay=0.02 * t)
        torch.compiler.set_stance("fail_on_recompile" if t >= 2 else "default")
        try:
            twins.train(1)
        finally:
            torch.compiler.set_stance("default")
    twins.check()
    assert not counters["graph_break"]


@each_backend
def test_backends(backend: str) -> None:
    """Of which some give the operator copies of what it writes."""
    twins = Twins(FusedAdamW, backend, **LOUD, schedule=RESTARTS)
    for t in range(5):
        for optimizer in (twins.ours, twins.plain):
            optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        twins.train(1)
    twins.check()
    assert twins.ours.param_groups[0]["schedule_step"] == 5
    assert twins.graphs.frame_count == 2


@pytest.mark.xfail(reason="torch 2.13: inductor moves the read behind any operator that writes")
def test_inductor_reads_a_parameter_before_the_step() -> None:
    """Elementwise and for a result that has a gradient; torch's own functions are spared."""
    params = make_params()
    set_grads(params, 0)
    optimizer = FusedAdamW(params, **LOUD)

    def iteration() -> Tensor:
        before = params[0] * 2
        optimizer.step()
        return before + params[0]

    at_first = params[0].detach() * 2
    found = torch.compile(iteration, fullgraph=True)()
    assert_same_bits([found.detach()], [at_first + params[0].detach()])


def test_schedulers_of_torch() -> None:
    """They replace the optimizer's step by a wrapper that ends the graph, whoever's it is."""
    twins = Twins()
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (twins.ours, twins.plain)]
    twins.step = torch.compile(twins.iteration, backend=twins.graphs)
    for _ in range(5):
        twins.train(1)
        for scheduler in schedulers:
            scheduler.step()
    twins.check()
    assert twins.graphs.frame_count == 2  # before and after


def test_compiled_and_plain_steps_alternate() -> None:
    """What is registered for a graph's copies is not used for the tensors themselves."""
    twins = Twins()
    for t in range(0, 8, 2):
        twins.train(1)
        train(twins.ours, twins.params, range(t + 1, t + 2))
        train(twins.plain, twins.plain_params, range(t + 1, t + 2))
        twins.t = t + 2
    twins.check()


def test_states_and_gradients_come_and_go() -> None:
    twins = Twins()
    twins.train(2, without=1)
    assert twins.params[1] not in twins.ours.state
    twins.train(2)
    graphs = twins.graphs.frame_count
    checkpoint = saved(twins.ours.state_dict())
    at = [param.detach().clone() for param in twins.params]
    twins.train(2)
    twins.ours.load_state_dict(checkpoint)
    with torch.no_grad():
        for param, old in zip(twins.params, at, strict=True):
            param.copy_(old)
    for t in (4, 5):
        set_grads(twins.params, t)
        twins.step()
    twins.check()
    assert twins.graphs.frame_count == graphs
    for optimizer in (twins.ours, twins.plain):
        optimizer.state.clear()
    twins.train(2)
    twins.check()


def test_copies_step_for_themselves() -> None:
    twins = Twins()
    twins.train(1)
    params, optimizer = copy.deepcopy((twins.params, twins.ours))
    set_grads(params, 1)
    torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    twins.train(1)
    twins.check()
    assert_same_bits(params, twins.params)


def test_error_in_a_graph_leaves_everything() -> None:
    twins = Twins()
    twins.train(2)
    for optimizer in (twins.ours, twins.plain):
        lr, optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"], -1.0
    grads = [param.grad for param in twins.params]
    with pytest.raises(ValueError, match="param group 1: lr"):
        twins.step()
    assert all(param.grad is grad for param, grad in zip(twins.params, grads, strict=True))
    for optimizer in (twins.ours, twins.plain):
        optimizer.param_groups[1]["lr"] = lr
    twins.check()
    twins.train(2)
    twins.check()


# --- The operator --------------------------------------------------------------------------------


def arguments(optimizer: FusedAdamW, params: list[nn.Parameter]) -> tuple[Any, ...]:
    states = [value for p in params for value in optimizer.state[p].values()]
    plain = [param.detach() for param in params]
    grads = [param.grad for param in params]
    return plain, grads, states, list(range(len(params))), optimizer._number


@pytest.mark.parametrize("amsgrad", [False, True])
def test_operator_is_what_it_says(amsgrad: bool) -> None:
    params = make_params()
    optimizer = FusedAdamW(params, **LOUD, amsgrad=amsgrad)
    train(optimizer, params, range(1))
    results = opcheck(torch.ops.fused_adamw.step.default, arguments(optimizer, params))
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


def test_operator_of_an_optimizer_that_is_gone() -> None:
    params = make_params()
    optimizer = FusedAdamW(params, **LOUD)
    train(optimizer, params, range(1))
    given = arguments(optimizer, params)
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match=r"number: found \d+, accepted: that of an optimizer"):
        torch.ops.fused_adamw.step(*given)


# --- Graphs that may end -------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", ["before", "after"])
def test_training_in_a_function(zero_grad: str) -> None:
    """The graph ends at the backward pass and at the step; new rates compile nothing."""
    results = []
    for is_compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = FusedAdamW(model.parameters(), **LOUD, schedule=RESTARTS)
        x = torch.randn(5, 4)

        def iteration(
            optimizer: Optimizer = optimizer, model: nn.Linear = model, x: Tensor = x
        ) -> Tensor:
            if zero_grad == "before":
                optimizer.zero_grad()
            loss = model(x).pow(2).sum()
            loss.backward()
            optimizer.step()
            if zero_grad == "after":
                optimizer.zero_grad()
            return loss * 2

        run: Callable[[], Tensor] = iteration
        if is_compiled:
            run = torch.compile(iteration, backend="eager")
        losses = []
        for t in range(5):
            optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
            if is_compiled and t == 2:
                torch.compiler.set_stance("fail_on_recompile")
            try:
                losses.append(run().detach())
            finally:
                torch.compiler.set_stance("default")
        results.append([*losses, *(param.detach() for param in model.parameters())])
        assert all(state["step"] == 5 for state in optimizer.state.values())
    assert_same_bits(*results)


def test_step_that_is_compiled_itself() -> None:
    """With a hook, of which the tracer knows nothing."""
    params, expected = make_params(), make_params()
    optimizer, plain = FusedAdamW(params, **LOUD), FusedAdamW(expected, **LOUD)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        set_grads(params, i)
        step()
        train(plain, expected, range(i, i + 1))
    assert calls == ["hook"] * 3
    assert_same_bits(params, expected)


def test_step_with_a_hook_or_closure_is_no_graph() -> None:
    params = make_params()
    set_grads(params, 0)
    optimizer = FusedAdamW(params, **LOUD)
    closure = torch.compile(lambda: optimizer.step(lambda: 3.0), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        closure()
    optimizer.register_step_pre_hook(lambda *_: None)
    hooked = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        hooked()
    assert not optimizer.state


def test_outside_of_the_tracer_nothing_is_known() -> None:
    """As where torch's private interface is another: the operator then serves in any graph."""
    assert compiled.graph_must_not_end()
