"""Updates in the backward pass: the bits of a step after it, and few gradients at a time."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from drawn_training import LOUD, assert_same_bits, saved, state_tensors
from family import CLASSES
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.utils.checkpoint import checkpoint

from bench.gradient_release import GradientBytes
from fused_adamw import FusedAdamW, FusedLion, FusedSGD, registration, schedules, step_in_backward
from fused_adamw.step_in_backward import StepInBackward

RESTARTS = schedules.CosineWarmRestarts(3, 2, eta_min=0.1)
EVERY: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same at every call; the middle layer is used twice."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.Linear(5, 5)
        layers = [nn.Linear(4, 5), nn.Tanh(), middle, nn.Tanh(), middle, nn.Linear(5, 1)]
        return nn.Sequential(*layers).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(t)).to(dtype)


def backward(model: nn.Module, t: int) -> None:
    dtype = next(model.parameters()).dtype
    model(batch(t, dtype)).square().mean().backward()


def two_groups(model: nn.Sequential) -> list[dict[str, Any]]:
    """The last layer, with a rate of its own, and the rest."""
    last = list(model[-1].parameters())
    rest = [p for p in model.parameters() if all(p is not other for other in last)]
    return [{"params": rest}, {"params": last, "lr": 0.03}]


class Twins:
    """A model that is updated in the backward pass, and one that is stepped after it."""

    def __init__(self, cls: Any = FusedAdamW, dtype: torch.dtype = torch.float32, **options: Any):
        options = options or (LOUD if cls is FusedAdamW else EVERY)
        self.models = make_model(dtype), make_model(dtype)
        self.ours, self.plain = (cls(two_groups(model), **options) for model in self.models)
        self.handle = step_in_backward(self.models[0], self.ours)
        self.t = 0

    def both(self) -> Iterator[tuple[nn.Sequential, Any]]:
        yield self.models[0], self.ours
        yield self.models[1], self.plain

    def train(self, steps: int, also_step: bool = False) -> None:
        for t in range(self.t, self.t + steps):
            self.plain.zero_grad()
            for model, _ in self.both():
                backward(model, t)
            assert all(param.grad is None for param in self.models[0].parameters())
            self.plain.step()
            if also_step:
                self.ours.step()
        self.t += steps

    def check(self) -> None:
        """Parameters, states and param groups are equal."""
        params = [list(model.parameters()) for model, _ in self.both()]
        assert_same_bits(*params)
        assert_same_bits(state_tensors(self.ours, params[0]), state_tensors(self.plain, params[1]))
        groups = [optimizer.state_dict()["param_groups"] for _, optimizer in self.both()]
        assert groups[0] == groups[1]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_a_step(cls: Any, dtype: torch.dtype) -> None:
    twins = Twins(cls, dtype)
    before = twins.models[0][2].weight.detach().clone()
    twins.train(4)
    twins.check()
    assert not torch.equal(twins.models[0][2].weight, before)


@each
def test_follows_schedules(cls: Any) -> None:
    """Eta of the paper by the group's schedule, alpha by torch's."""
    twins = Twins(cls, **EVERY, schedule=RESTARTS)
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.5) for _, optimizer in twins.both()]
    for t in range(5):
        twins.train(1)
        for group in twins.ours.param_groups:
            assert group["schedule_multiplier"] == RESTARTS(t)
            assert group["schedule_step"] == t + 1
        for scheduler in schedulers:
            scheduler.step()
    twins.check()


def test_torchs_schedulers_see_the_steps(recwarn: pytest.WarningsRecorder) -> None:
    """They warn where none precedes theirs."""
    model = make_model()
    optimizer = FusedAdamW(model.parameters())
    step_in_backward(model, optimizer)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    backward(model, 0)
    scheduler.step()
    assert not recwarn.list


@each
def test_averages(cls: Any) -> None:
    """They begin as those of a step, also of a layer that the first pass does not reach."""
    twins = Twins(cls, **EVERY, ema_decay=0.75)
    for model, optimizer in twins.both():
        model[:-1](batch(0)).square().mean().backward()
        if optimizer is twins.plain:
            optimizer.step()
    for steps in (0, 1, 2):
        twins.train(steps)
        params = [list(model.parameters()) for model, _ in twins.both()]
        ours, plain = state_tensors(twins.ours, params[0]), state_tensors(twins.plain, params[1])
        assert_same_bits([*params[0], *ours], [*params[1], *plain])


def test_step_meanwhile_does_no_harm() -> None:
    """As in a loop that was written for optimizers that need it."""
    twins = Twins(**LOUD, schedule=RESTARTS)
    twins.train(5, also_step=True)
    twins.check()


def test_one_call_for_a_parameter_that_is_used_twice() -> None:
    twins = Twins()
    twins.train(1)
    assert twins.models[0][2] is twins.models[0][4]
    assert float(twins.ours.state[twins.models[0][2].weight]["step"]) == 1
    twins.check()


@pytest.mark.parametrize("last_outside", [True, False], ids=["pass outside", "step"])
def test_accumulation(last_outside: bool) -> None:
    twins = Twins(**LOUD, schedule=RESTARTS)
    for t in range(0, 9, 3):
        for model, _ in twins.both():
            for i in (t, t + 1):
                if model is twins.models[0]:
                    with twins.handle.accumulate(), twins.handle.accumulate():
                        backward(model, i)
                    assert all(param.grad is not None for param in model.parameters())
                else:
                    backward(model, i)
        if last_outside:
            for model, _ in twins.both():
                backward(model, t + 2)
        else:
            twins.ours.step()
            twins.ours.zero_grad()
        assert all(param.grad is None for param in twins.models[0].parameters())
        twins.plain.step()
        twins.plain.zero_grad()
        twins.check()


def test_checkpoint_in_the_middle() -> None:
    twins = Twins(**LOUD, schedule=RESTARTS)
    twins.train(2)
    checkpoint_of_ours = saved(twins.ours.state_dict())
    checkpoint_of_model = copy.deepcopy(twins.models[0].state_dict())
    twins.train(2)
    twins.ours.load_state_dict(checkpoint_of_ours)
    twins.models[0].load_state_dict(checkpoint_of_model)
    for t in (2, 3):
        backward(twins.models[0], t)
    twins.check()


def test_states_that_change_behind_the_lists() -> None:
    """Each parameter's list is registered anew where its state or memory is another."""
    twins = Twins()
    twins.train(2)
    held = [optimizer.state for _, optimizer in twins.both()]
    for (model, _), states in zip(twins.both(), held, strict=True):
        weight, bias = model[0].weight, model[0].bias
        states[weight]["exp_avg"] = torch.ones_like(weight)
        states[bias]["exp_avg_sq"].data = torch.full_like(bias, 2.0)
        model[2].weight.data = model[2].weight.data.t()
        states[model[-1].weight].clear()
    twins.train(2)
    twins.check()
    del held
    twins.train(1)
    for _, optimizer in twins.both():
        optimizer.state.clear()
    twins.train(2)
    twins.check()


def test_lists_are_kept_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins()
    twins.train(1)
    new: list[Any] = []
    step_anew = twins.ours._step_anew
    monkeypatch.setattr(
        twins.ours, "_step_anew", lambda *x, **y: new.append(x) or step_anew(*x, **y)
    )
    twins.train(3)
    assert not new
    twins.ours.state  # noqa: B018  gives them up
    twins.train(1)
    assert len(new) == len(list(twins.models[0].parameters()))


def test_parameters_that_a_pass_does_not_reach() -> None:
    """As in a step, they keep what they are, and a group of such parameters counts no step."""
    twins = Twins(**LOUD, schedule=RESTARTS)
    twins.train(1)
    before = [param.detach().clone() for param in twins.models[0][-1].parameters()]
    hidden = twins.models[0][:-1]
    hidden(batch(1)).square().mean().backward()
    assert_same_bits(list(twins.models[0][-1].parameters()), before)
    assert [group["schedule_step"] for group in twins.ours.param_groups] == [2, 1]


def test_other_groups_need_a_step() -> None:
    """Two models in one optimizer, of which one is updated in the backward pass."""
    first, second = make_model(), make_model()
    optimizer = FusedAdamW(
        [{"params": first.parameters()}, {"params": second.parameters()}], **LOUD
    )
    step_in_backward(first.parameters(), optimizer)
    expected = make_model()
    plain = FusedAdamW(expected.parameters(), **LOUD)
    for t in range(3):
        for model in (first, second, expected):
            backward(model, t)
        assert [p.grad is None for p in second.parameters()] == [False] * 6
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
        plain.zero_grad()
    for model in (first, second):
        assert_same_bits(list(model.parameters()), list(expected.parameters()))
    assert [group["schedule_step"] for group in optimizer.param_groups] == [3, 3]


def test_frozen_parameters_are_left_out() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = FusedAdamW(model.parameters(), **LOUD)
    step_in_backward(model, optimizer)
    before = model[0].weight.clone()
    backward(model, 0)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state
    assert len(optimizer.state) == 5


def test_parameter_that_is_taken_out_of_its_group_keeps_its_gradient() -> None:
    twins = Twins()
    twins.train(1)
    weight = twins.ours.param_groups[0]["params"].pop(0)
    before = weight.detach().clone()
    backward(twins.models[0], 1)
    assert torch.equal(weight, before)
    assert weight.grad is not None


def test_removed() -> None:
    twins = Twins(**LOUD, schedule=RESTARTS)
    twins.train(2)
    for _ in range(2):
        twins.handle.remove()
    for t in (2, 3):
        for model, optimizer in twins.both():
            optimizer.zero_grad()
            backward(model, t)
            assert all(param.grad is not None for param in model.parameters())
            optimizer.step()
    twins.check()
    twins.ours.zero_grad()
    twins.handle = step_in_backward(twins.models[0], twins.ours)
    twins.t = 4
    twins.train(2)
    twins.check()


def test_copies_step_for_themselves() -> None:
    twins = Twins()
    twins.train(1)
    model, optimizer = copy.deepcopy((twins.models[0], twins.ours))
    backward(model, 1)
    assert all(param.grad is not None for param in model.parameters())
    optimizer.step()
    twins.train(1)
    assert_same_bits(list(model.parameters()), list(twins.models[0].parameters()))


# --- Errors --------------------------------------------------------------------------------------


class EngineFailedError(RuntimeError):
    pass


@pytest.mark.parametrize("cls", [FusedAdamW, FusedSGD, FusedLion], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("first", [True, False], ids=["first pass", "later pass"])
@pytest.mark.parametrize("reached", [0, 3], ids=["first parameter", "fourth"])
def test_error_in_a_hook(
    cls: Any, first: bool, reached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was updated before is whole; the rest is as it was, and can go on."""
    twins = Twins(cls, **EVERY, schedule=RESTARTS)
    if not first:
        twins.train(1)
    model, optimizer = twins.models[0], twins.ours
    optimizer.state  # noqa: B018  registers anew, with the engine below
    params = list(model.parameters())
    former = {p: (p.detach().clone(), copy.deepcopy(dict(optimizer.state[p]))) for p in params}
    for param in params:
        if not optimizer.state[param]:
            del optimizer.state[param]
    groups = [dict(group) for group in optimizer.param_groups]
    engine_for, runs = registration.engine_for, []

    def failing(*arguments: Any) -> Any:
        engine = engine_for(*arguments)

        def update_or_fail(*arguments: Any) -> None:
            if len(runs) == reached:
                raise EngineFailedError
            runs.append(engine.update(*arguments))

        return engine._replace(update=update_or_fail)

    with monkeypatch.context() as patch:
        patch.setattr(registration, "engine_for", failing)
        with pytest.raises(EngineFailedError):
            backward(model, twins.t)
    changed = [not torch.equal(param, former[param][0]) for param in params]
    assert sum(changed) == reached
    assert sum(param.grad is not None for param in params) == 1
    for param, was_updated in zip(params, changed, strict=True):
        if was_updated:
            assert param.grad is None
        else:
            assert_same_bits([param.detach()], [former[param][0]])
            state = optimizer.state.get(param, {})
            assert state.keys() == former[param][1].keys()
            assert_same_bits(list(state.values()), list(former[param][1].values()))
    updated = {param for param, was_updated in zip(params, changed, strict=True) if was_updated}
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        counts = any(param in updated for param in group["params"])
        assert group["schedule_step"] == before["schedule_step"] + counts
        if not counts:
            assert group == before
    optimizer.zero_grad()
    optimizer.state  # noqa: B018
    backward(model, twins.t)
    assert not any(torch.equal(param, former[param][0]) for param in params)


def test_gradient_that_is_refused_is_named() -> None:
    model = nn.Sequential(nn.Embedding(3, 4, sparse=True), nn.Linear(4, 1))
    optimizer = FusedAdamW(model.named_parameters(), **LOUD)
    step_in_backward(model, optimizer)
    wrong = model[0].weight
    before = wrong.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 \('0\.weight'\) has a gradient that is"):
        model(torch.arange(3)).sum().backward()
    assert torch.equal(wrong, before)
    assert wrong not in optimizer.state


def test_value_of_a_group_that_is_refused() -> None:
    twins = Twins()
    before = [param.detach().clone() for param in twins.models[0].parameters()]
    twins.ours.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="param group 1: lr"):
        backward(twins.models[0], 0)
    assert_same_bits(list(twins.models[0].parameters()), before)
    assert not twins.ours.state
    assert [group["schedule_step"] for group in twins.ours.param_groups] == [0, 0]


def test_optimizers_of_others_are_refused() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="optimizer: found AdamW, accepted: an optimizer of fused"):
        step_in_backward(model, AdamW(model.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [3, torch.zeros(2), ["weight"]], ids=["int", "tensor", "strings"])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"model_or_params: found .* accepted: a torch.nn.Module or"
    ):
        step_in_backward(wrong, FusedAdamW(make_model().parameters()))


def test_model_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match="model_or_params: has no parameter that needs a gradient"):
        step_in_backward(make_model(), FusedAdamW(make_model().parameters()))


def test_part_of_a_group_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="has 2 of the 6 parameters of param group 0; accepted"):
        step_in_backward(model[0], FusedAdamW(model.parameters()))


def test_second_registration_is_refused() -> None:
    twins = Twins()
    with pytest.raises(RuntimeError, match="optimizer: steps in the backward pass already"):
        step_in_backward(twins.models[0], twins.ours)
    other = FusedAdamW(two_groups(twins.models[0]))
    with pytest.raises(RuntimeError, match="a parameter of param group 0 is updated"):
        step_in_backward(twins.models[0], other)
    twins.train(2)
    twins.check()


OPTIONS = [
    ("max_grad_norm", 1.0),
    ("skip_nonfinite", True),
    ("collect_telemetry", True),
    ("grad_scale", torch.ones(())),
    ("found_inf", torch.zeros(())),  # as a scaler that has unscaled leaves it alone
]


@pytest.mark.parametrize(("option", "value"), OPTIONS, ids=lambda value: str(value))
@pytest.mark.parametrize("when", ["before", "backward", "step"])
def test_options_that_need_all_gradients_are_refused(option: str, value: Any, when: str) -> None:
    model = make_model()
    optimizer = FusedAdamW(model.parameters())
    if when != "before":
        step_in_backward(model, optimizer)
    setattr(optimizer, option, value)
    before = [param.detach().clone() for param in model.parameters()]
    act: dict[str, Callable[[], Any]] = {
        "before": lambda: step_in_backward(model, optimizer),
        "backward": lambda: backward(model, 0),
        "step": optimizer.step,
    }
    name = option.removeprefix("collect_")
    with pytest.raises(RuntimeError, match=f"step_in_backward: found {name} .*accepted: without"):
        act[when]()
    assert_same_bits(list(model.parameters()), before)
    if when == "before":
        delattr(optimizer, option)
        backward(model, 0)
        assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("when", ["before", "backward", "step"])
def test_capturable_is_refused(when: str) -> None:
    model = make_model()
    optimizer = FusedAdamW(model.parameters(), capturable=when == "before")
    if when != "before":
        step_in_backward(model, optimizer)
    optimizer.param_groups[0]["capturable"] = True
    act: dict[str, Callable[[], Any]] = {
        "before": lambda: step_in_backward(model, optimizer),
        "backward": lambda: backward(model, 0),
        "step": optimizer.step,
    }
    with pytest.raises(RuntimeError, match="found capturable=True in param group 0; accepted: F"):
        act[when]()


def test_after_steps_on_the_device() -> None:
    """Which left their counts there, and one of which was skipped."""
    models, optimizers = [], []
    for on_device in (False, True):
        model = make_model()
        optimizer = FusedAdamW(
            model.parameters(),
            **LOUD,
            schedule=schedules.StepDecay(1),
            capturable=on_device,
            ema_decay=0.5,
            engine="cuda-on-host" if on_device else "cpu",
        )
        if on_device:
            optimizer.found_inf = torch.ones(())
            backward(model, 0)
            optimizer.step()
            optimizer.zero_grad()
            del optimizer.found_inf
        backward(model, 1)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["capturable"] = False
        step_in_backward(model, optimizer)
        for t in (2, 3):
            backward(model, t)
        assert optimizer.param_groups[0]["schedule_step"] == 3
        models.append(list(model.parameters()))
        optimizers.append([value for s in optimizer.state.values() for value in s.values()])
    assert_same_bits(*models)
    assert_same_bits(*optimizers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(reentrant: bool) -> None:
    """A pass within a pass would count, and update what both use, twice."""
    twins = Twins()
    x = batch(0).requires_grad_()
    for model, _ in twins.both():
        if reentrant and model is twins.models[0]:
            with pytest.raises(RuntimeError, match="a backward pass within a backward pass"):
                checkpoint(model, x, use_reentrant=True).square().mean().backward()
            assert not twins.ours.state
            return
        checkpoint(model, x, use_reentrant=False).square().mean().backward()
    twins.plain.step()
    twins.check()


# --- Memory --------------------------------------------------------------------------------------


def test_one_gradient_is_alive_at_a_time() -> None:
    """Of equal layers, whose backward computes the gradients of weight and bias."""
    layers = 12
    peaks = []
    for hooked in (False, True):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        optimizer = FusedAdamW(model.parameters(), **LOUD)
        with GradientBytes(model) as grads:
            if hooked:
                step_in_backward(model, optimizer)
            model(torch.ones(3, 16)).sum().backward()
        peaks.append(grads.peak)
    layer = 4 * (16 * 16 + 16)
    assert peaks[0] == layers * layer
    assert peaks[1] <= layer


class Dropped:
    """What a model and its optimizer leave when the last references go."""

    def __init__(self) -> None:
        self.model = make_model()
        self.optimizer: Optimizer | None = FusedAdamW(self.model.parameters(), **LOUD)
        self.handle: StepInBackward | None = step_in_backward(self.model, self.optimizer)
        backward(self.model, 0)


def test_model_and_optimizer_are_freed() -> None:
    dropped = Dropped()
    optimizer, param = weakref.ref(dropped.optimizer), weakref.ref(dropped.model[0].weight)
    del dropped
    gc.collect()
    assert optimizer() is None
    assert param() is None


@pytest.mark.parametrize("kept", ["optimizer", "handle"])
def test_one_reference_is_enough(kept: str) -> None:
    dropped = Dropped()
    setattr(dropped, {"optimizer": "handle", "handle": "optimizer"}[kept], None)
    gc.collect()
    backward(dropped.model, 1)
    assert all(param.grad is None for param in dropped.model.parameters())


def test_optimizer_that_is_gone_is_missed() -> None:
    dropped = Dropped()
    dropped.optimizer = dropped.handle = None
    gc.collect()
    with pytest.raises(RuntimeError, match="the optimizer of step_in_backward is gone"):
        backward(dropped.model, 1)
    dropped.model.zero_grad()
    handle = step_in_backward(dropped.model, FusedAdamW(dropped.model.parameters()))
    backward(dropped.model, 1)
    handle.remove()
    backward(dropped.model, 2)
    assert all(param.grad is not None for param in dropped.model.parameters())
