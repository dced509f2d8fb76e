"""Memory that changes behind the optimizer's back, and memory that must be freed."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn_training import (
    LOUD,
    MOMENTS,
    Twins,
    assert_same_bits,
    make_params,
    set_grads,
    state_tensors,
    train,
)
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler

from fused_adamw import _C, FusedAdamW, FusedSGD, registration
from fused_adamw.engines import Engine

# --- Memory that changes behind the optimizer's back ---------------------------------------------


def test_new_memory_of_a_parameter_is_what_gets_updated() -> None:
    twins = Twins()
    old = twins.param.data
    before = old.clone()
    new = old.clone()
    twins.param.data = new
    twins.check()
    assert_same_bits([old], [before])
    assert_same_bits([new], [twins.plain_param.detach()])


def test_parameter_is_given_other_strides_of_the_same_memory() -> None:
    """Of a square matrix: neither address nor shape changes."""
    twins = Twins()
    twins.param.data = twins.param.data.t()
    twins.plain_param.data = twins.plain_param.data.t().contiguous()
    twins.check()


def test_parameter_is_given_another_dtype() -> None:
    """As `model.to(bfloat16)` does; the states stay what they are."""
    twins = Twins()
    before = twins.param.detach().clone()
    for model in (twins.param, twins.plain_param):
        model.grad = None
        model.data = model.data.bfloat16()
    twins.check()
    assert twins.param.dtype == torch.bfloat16
    assert not torch.equal(twins.param.float(), before.bfloat16().float())
    assert twins.optimizer.state[twins.param]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("held", ["nothing", "outer dict", "inner dict"])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_state_tensor_is_replaced(held: str, name: str) -> None:
    """Also through a dict that was taken before steps that registered its tensors."""
    twins = Twins()
    outer = twins.optimizer.state
    inner = outer[twins.param]
    twins.train(2)
    if held == "nothing":
        inner = twins.optimizer.state[twins.param]
    elif held == "outer dict":
        inner = outer[twins.param]
    inner[name] = torch.ones_like(inner[name])
    twins.plain.state[twins.plain_param][name].fill_(1)
    twins.check()


def test_whole_state_of_a_parameter_is_replaced() -> None:
    twins = Twins()
    outer = twins.optimizer.state
    twins.train(2)
    outer[twins.param] = {k: torch.ones_like(v) for k, v in outer[twins.param].items()}
    for value in twins.plain.state[twins.plain_param].values():
        value.fill_(1)
    twins.check()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_state_tensor_is_given_other_memory(name: str) -> None:
    twins = Twins()
    value = twins.optimizer.state[twins.param][name]
    value.data = torch.ones_like(value)
    twins.plain.state[twins.plain_param][name].fill_(1)
    twins.check()
    assert twins.optimizer.state[twins.param][name] is value


def test_state_tensor_is_given_other_strides_of_the_same_memory() -> None:
    twins = Twins()
    value = twins.optimizer.state[twins.param]["exp_avg"]
    value.t_()
    plain = twins.plain.state[twins.plain_param]
    plain["exp_avg"] = plain["exp_avg"].t().contiguous()
    twins.check()


@pytest.mark.parametrize("held", [False, True], ids=["fetched", "held over steps"])
def test_cleared_state_starts_anew(held: bool) -> None:
    twins = Twins()
    states = twins.optimizer.state
    if held:
        twins.train(2)
    else:
        states = twins.optimizer.state
    states.clear()
    for value in state_tensors(twins.plain, twins.plain_params):
        value.zero_()
    twins.check()
    assert twins.optimizer.state[twins.param]["step"] == 2


def test_state_is_filled_in_place() -> None:
    """As in torch: who took the empty dict before the first step sees the states in it."""
    (param,) = make_params([(3,)])
    optimizer = FusedAdamW([param])
    state = optimizer.state[param]
    train(optimizer, [param], range(1))
    assert optimizer.state[param] is state
    assert set(state) == {"step", *MOMENTS}


def test_list_of_params_is_changed() -> None:
    params = make_params([(3,), (4,), (5,)])
    optimizer = FusedAdamW(params[:2], **LOUD)
    train(optimizer, params, range(2))
    members = optimizer.param_groups[0]["params"]

    before = [p.detach().clone() for p in params]
    members.append(params[2])
    members.remove(params[0])
    train(optimizer, params, range(2, 4))
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert not torch.equal(params[2], before[2])

    before = [p.detach().clone() for p in params]
    members[0] = params[0]
    train(optimizer, params, range(4, 5))
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0, 4.0, 3.0]

    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["params"] = [params[1]]
    train(optimizer, params, range(5, 6))
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False, True]


def test_autograd_sees_the_writes() -> None:
    """A backward pass through a parameter that has been updated since raises, as in torch."""
    for cls in (AdamW, FusedAdamW):
        params = make_params([(3,), (4,)])
        optimizer = cls(params, **LOUD)
        set_grads(params[:1], 0)
        losses = [(param**2).sum() for param in params]
        versions = [param._version for param in params]
        optimizer.step()
        assert params[0]._version > versions[0]
        assert params[1]._version == versions[1]  # had no gradient
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[0].backward()
        losses[1].backward()


class FreshGradient(nn.Parameter):
    """A parameter whose gradient is made anew whenever it is read, as some wrappers do."""

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        gradient = Tensor.grad.__get__(self)  # type: ignore[attr-defined]
        return None if gradient is None else gradient.clone()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        Tensor.grad.__set__(self, value)  # type: ignore[attr-defined]


def test_gradient_that_lives_only_while_it_is_read() -> None:
    """Of 4 MB, whose memory an allocator gives back to the system at once."""
    expected = make_params([(1 << 20,), (1 << 20,)])
    params = [FreshGradient(param.detach().clone()) for param in expected]
    assert params[0].grad is None
    train(FusedAdamW(expected, **LOUD), expected, range(3))
    train(FusedAdamW(params, **LOUD), params, range(3))
    assert_same_bits([p.detach() for p in params], [p.detach() for p in expected])


def share(value: Tensor) -> None:
    value.share_memory_()


def resize(value: Tensor) -> None:
    """Grows the storage, which moves it, and leaves the numbers at its start."""
    value.untyped_storage().resize_(1 << 24)


def set_data(value: Tensor) -> None:
    value.data = value.detach().clone()


@pytest.mark.parametrize("move", [share, resize, set_data], ids=lambda move: move.__name__)
@pytest.mark.parametrize("held_by", ["state_dict", "outer dict", "inner dicts", "tensors"])
def test_held_state_is_given_other_memory(move: Callable[[Tensor], None], held_by: str) -> None:
    """By someone who has had it since before the steps that registered it."""
    twins = Twins()
    held: Any = {
        "state_dict": lambda: twins.optimizer.state_dict()["state"],
        "outer dict": lambda: twins.optimizer.state,
        "inner dicts": lambda: dict(twins.optimizer.state),
        "tensors": lambda: {p: dict(state) for p, state in twins.optimizer.state.items()},
    }[held_by]()
    twins.train(2)
    for state in held.values():
        for value in state.values():
            before = value.data_ptr()
            move(value)
            assert value.data_ptr() != before
    twins.train(2)
    twins.check()


def test_threads_step_one_optimizer() -> None:
    """What they compute is a race, but memory is whole, and every step is taken."""
    params = make_params([(100,)] * 20)
    optimizer = FusedAdamW(params, lr=1e-3)
    set_grads(params, 0)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(200):
                optimizer.step()
                if i % 20 == 0:
                    optimizer.state_dict()  # makes the next step register anew
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(0 < float(optimizer.state[param]["step"]) <= 800 for param in params)
    assert all(param.isfinite().all() for param in params)
    steps = [float(optimizer.state[param]["step"]) for param in params]
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [n + 1 for n in steps]


def test_values_beside_the_states_do_not_register_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params()
    optimizer = FusedAdamW(params)
    optimizer.state["note"] = "not a dict"  # type: ignore[index, assignment]
    optimizer.state["notes"] = [1]  # type: ignore[index, assignment]
    train(optimizer, params, range(2))
    registrations = []
    register = optimizer._register_and_step
    monkeypatch.setattr(
        optimizer, "_register_and_step", lambda *args: registrations.append(register(*args))
    )
    train(optimizer, params, range(2, 5))
    assert not registrations
    optimizer.state["notes"] = [2]  # type: ignore[index, assignment]
    train(optimizer, params, range(5, 6))
    assert len(registrations) == 1


class EngineFailedError(RuntimeError):
    pass


@pytest.mark.parametrize("cls", [FusedAdamW, FusedSGD])
@pytest.mark.parametrize("first_step", [True, False], ids=["first step", "later step"])
def test_engine_that_fails_on_the_second_bucket(
    cls: Any, first_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has been stepped and counted, of the second there is nothing."""
    options = {"lr": 0.1, "dampening": 0.5, "momentum": 0.9} if cls is FusedSGD else LOUD
    found = []
    for fails in (True, False):
        first, second = make_params([(3,)]), make_params([(4,)], torch.bfloat16)
        optimizer = cls([*first, *second], **options)
        if not first_step:
            train(optimizer, [*first, *second], range(2))
        set_grads([*first, *second], 2)
        if fails:
            before = [second[0].detach().clone(), *state_tensors(optimizer, second)]
            before = [value.clone() for value in before]
            calls: list[int] = []

            def never(bucket: Any, sums: Any) -> None:
                raise AssertionError

            def run(bucket: Any, hyperparameters: Any, calls: list[int] = calls) -> None:
                calls.append(1)
                if len(calls) == 2:
                    raise EngineFailedError
                _C.update_cpu(bucket, 1)

            with monkeypatch.context() as patch:
                patch.setattr(registration, "engine_for", lambda *_, run=run: Engine(run, never))
                optimizer.state  # noqa: B018  registers anew, with this engine
                with pytest.raises(EngineFailedError):
                    optimizer.step()
            optimizer.state  # noqa: B018
            assert_same_bits([second[0].detach(), *state_tensors(optimizer, second)], before)
            done = [first[0].detach().clone(), *map(torch.clone, state_tensors(optimizer, first))]
            second[0].grad, first[0].grad = second[0].grad, None  # the caller makes up for it
            optimizer.step()
        else:
            optimizer.step()
            done = [first[0].detach().clone(), *map(torch.clone, state_tensors(optimizer, first))]
        rest = [second[0].detach(), *state_tensors(optimizer, second)]
        found.append([*done, *rest])
    assert_same_bits(*found)


# --- Memory that must be freed -------------------------------------------------------------------


def test_replaced_state_is_freed() -> None:
    params = make_params()
    optimizer = FusedAdamW(params)
    train(optimizer, params, range(3))
    old = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    optimizer.state[params[0]]["exp_avg"] = torch.zeros_like(params[0])
    gc.collect()
    assert old() is None


def test_replaced_states_are_freed_by_the_next_step() -> None:
    """Where a dict is used that was taken before, the next step is the first to know."""
    params = make_params()
    optimizer = FusedAdamW(params)
    train(optimizer, params, range(1))
    state = optimizer.state[params[0]]
    train(optimizer, params, range(1, 3))
    old = weakref.ref(state["exp_avg"])
    state["exp_avg"] = torch.zeros_like(params[0])
    train(optimizer, params, range(3, 4))
    gc.collect()
    assert old() is None


def test_memory_that_data_was_taken_from_is_freed() -> None:
    (param,) = make_params([(8,)])
    optimizer = FusedAdamW([param])
    train(optimizer, [param], range(1))
    memory = np.zeros((2, 8), np.float32)
    param.data, optimizer.state[param]["exp_avg"].data = map(torch.from_numpy, memory)
    alive = weakref.ref(memory)
    del memory
    train(optimizer, [param], range(1, 3))
    assert alive() is not None
    param.data = torch.zeros(8)
    optimizer.state[param]["exp_avg"].data = torch.zeros(8)
    gc.collect()
    assert alive() is None


def attach_to_parameter(model: nn.Linear, optimizer: Optimizer) -> None:
    model.weight.optimizer = optimizer  # type: ignore


def attach_to_module(model: nn.Linear, optimizer: Optimizer) -> None:
    model.optimizer = optimizer  # type: ignore


def attach_to_group(model: nn.Linear, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["optimizer"] = optimizer


def attach_to_state(model: nn.Linear, optimizer: Optimizer) -> None:
    optimizer.state[model.weight]["optimizer"] = optimizer


def attach_to_state_tensor(model: nn.Linear, optimizer: Optimizer) -> None:
    optimizer.state[model.weight]["exp_avg"].optimizer = optimizer


def backward_hook(model: nn.Linear, optimizer: Optimizer) -> None:
    model.weight.register_hook(lambda grad: optimizer and None)


def post_accumulate_grad_hook(model: nn.Linear, optimizer: Optimizer) -> None:
    model.weight.register_post_accumulate_grad_hook(lambda param: optimizer and None)


def removed_post_accumulate_grad_hook(model: nn.Linear, optimizer: Optimizer) -> None:
    model.weight.register_post_accumulate_grad_hook(lambda param: optimizer and None).remove()


def forward_hook(model: nn.Linear, optimizer: Optimizer) -> None:
    model.register_forward_hook(lambda *_: optimizer and None)


def scheduler(model: nn.Linear, optimizer: Optimizer) -> None:
    lr_scheduler.StepLR(optimizer, 1)


def nothing(model: nn.Linear, optimizer: Optimizer) -> None:
    pass


BONDS = [
    nothing,
    attach_to_module,
    attach_to_parameter,
    attach_to_group,
    attach_to_state,
    attach_to_state_tensor,
    backward_hook,
    post_accumulate_grad_hook,
    removed_post_accumulate_grad_hook,
    forward_hook,
    scheduler,
]


Bond = Callable[[nn.Linear, Optimizer], None]


def train_and_drop(cls: type[Optimizer], bond: Bond, early: bool) -> weakref.ref[Optimizer]:
    """A reference to the optimizer, which refers to the parameters: they are freed together."""
    model = nn.Linear(3, 3)
    optimizer = cls(model.parameters())
    for bond_now in (early, not early):
        if bond_now:
            bond(model, optimizer)
        for _ in range(2):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return weakref.ref(optimizer)


@pytest.mark.parametrize("early", [True, False], ids=["before the first step", "after"])
@pytest.mark.parametrize("bond", BONDS, ids=lambda bond: bond.__name__)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_model_and_optimizer_are_freed(bond: Bond, early: bool) -> None:
    """Whatever cycle there is between them, wherever torch's optimizer is freed."""
    if early and bond in (attach_to_state, attach_to_state_tensor):
        pytest.skip("there is no state before the first step")
    ours, theirs = (train_and_drop(cls, bond, early) for cls in (FusedAdamW, AdamW))
    gc.collect()
    freed, freed_by_torch = ours() is None, theirs() is None
    # Python's collector cannot see through a post-accumulate hook, whatever it refers to.
    assert freed_by_torch == (bond is not post_accumulate_grad_hook)
    assert freed == freed_by_torch


def test_step_from_post_accumulate_grad_hooks() -> None:
    """An optimizer for each parameter that steps in the backward pass and frees the gradient."""
    torch.manual_seed(0)
    hooked = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    plain = copy.deepcopy(hooked)
    optimizers = {param: FusedAdamW([param], **LOUD) for param in hooked.parameters()}

    def update(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(update) for p in hooked.parameters()]
    optimizer = FusedAdamW(plain.parameters(), **LOUD)
    x = torch.randn(5, 4)
    for _ in range(3):
        hooked(x).sum().backward()
        optimizer.zero_grad()
        plain(x).sum().backward()
        optimizer.step()
    assert all(param.grad is None for param in hooked.parameters())
    assert_same_bits(list(hooked.parameters()), list(plain.parameters()))
    for handle in handles:
        handle.remove()
