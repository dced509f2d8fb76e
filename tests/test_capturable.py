"""Steps that are worked out on the device: the tick of csrc/cuda/tick.h, played on the host.

What a GPU has to itself (capture, replay, streams) is in tests/gpu/test_gpu_whole_step.py.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family import CLASSES
from problems import same_bits
from torch import Tensor, nn

import fused_adamw
from fused_adamw import FusedAdamW, FusedSGD, FusedSGDW, device_step, schedules
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.schedules import CosineWarmRestarts, LinearWarmup, Product, Schedule

all_classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
RESTARTS = Product((LinearWarmup(4, eta_min=0.1), CosineWarmRestarts(3, T_mult=2)))
WHOLE = {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True}


class Run:
    """A small model in training, with its optimizer's decisions on the host or on the device."""

    def __init__(
        self,
        cls: Any,
        on_device: bool,
        *,
        dtype: torch.dtype = torch.float32,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(13, 30), nn.ReLU(), nn.Linear(30, 7)).to(dtype)
        self.t = 0
        options = {"lr": 0.05, "weight_decay": 0.1, **options}
        if on_device:
            options["lr"] = torch.tensor(options["lr"], dtype=torch.float64)
        self.optimizer: FusedOptimizer = cls(
            [
                {"params": self.model[0].parameters(), "weight_decay": 0.2},
                {"params": self.model[2].parameters()},
            ],
            capturable=on_device,
            engine="cuda-on-host" if on_device else "cpu",
            schedule=schedule,
            **options,
        )

    def backward(self, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(self.t)
        weight = self.model[0].weight
        inputs = torch.randn(16, 13, generator=generator).to(weight.dtype)
        (self.model(inputs).square().sum() * scale).backward()
        self.t += 1

    def train(self, steps: int) -> None:
        for _ in range(steps):
            if not self.optimizer.zero_grads:
                self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()

    def spoil(self) -> None:
        grad = self.model[2].bias.grad
        assert grad is not None
        grad[3] = torch.inf

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def tensors(self) -> dict[str, Tensor]:
        found = {name: param.detach() for name, param in self.model.named_parameters()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state[param].items():
                found[f"{name} {key}"] = value
        return found


def assert_alike(host: Run, device: Run) -> None:
    want, got = host.tensors(), device.tensors()
    if not any(host.optimizer.state.values()):  # skipped so far; on the device there are zeros
        got = {name: got[name] for name in want}
    assert want.keys() == got.keys()
    for name, value in want.items():
        if value.dtype == torch.float64:
            assert value == got[name], name
        else:
            assert same_bits(value, got[name]), name
    for a, b in zip(host.optimizer.param_groups, device.optimizer.param_groups, strict=True):
        assert int(a["schedule_step"]) == int(b["schedule_step"])


def pair(cls: Any, **options: Any) -> tuple[Run, Run]:
    return Run(cls, False, **options), Run(cls, True, **options)


# --- The same bits as on the host ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [*((cls, torch.float32) for cls in CLASSES), (FusedAdamW, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_rule_with_every_option(cls: Any, dtype: torch.dtype) -> None:
    runs = pair(cls, dtype=dtype, schedule=RESTARTS, **WHOLE)
    for t in range(8):
        for run in runs:
            run.backward()
            if t in (0, 1, 5):
                run.spoil()
            if t == 4:
                run.set_lr(0.02)
            run.optimizer.step()
        assert_alike(*runs)
        host, device = (run.optimizer.grad_norm for run in runs)
        assert host is not None
        assert device is not None
        assert same_bits(host, device)


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        schedules.StepDecay(2),
        schedules.Sequential((LinearWarmup(3), schedules.CosineAnnealing(5)), (3,)),
        schedules.Polynomial(7, 2.0),
    ],
    ids=str,
)
def test_schedules_are_evaluated_on_the_device(schedule: Schedule | None) -> None:
    host, device = pair(FusedAdamW, schedule=schedule)
    for _ in range(9):
        host.train(1)
        device.train(1)
        assert_alike(host, device)
    assert all(g["schedule_multiplier"] == 1.0 for g in device.optimizer.param_groups)


@all_classes
def test_overflow_leaves_every_byte(cls: Any) -> None:
    for steps in (0, 2):
        host, device = pair(cls, schedule=RESTARTS, ema_decay=0.9)
        for run in (host, device):
            run.train(steps)
            run.backward(scale=4.0)
            run.optimizer.grad_scale = torch.tensor(4.0)
            run.optimizer.found_inf = torch.tensor(1.0)
            before = {name: value.clone() for name, value in run.tensors().items()}
            run.optimizer.step()
            after = run.tensors()
            for name, value in before.items():
                assert torch.equal(value, after[name]), name
            run.optimizer.zero_grad()
            run.backward(scale=4.0)
            run.optimizer.found_inf = torch.tensor(0.0)
            run.optimizer.step()
        assert_alike(host, device)


def test_telemetry() -> None:
    runs = pair(FusedAdamW, telemetry=True, max_grad_norm=0.1)
    for run in runs:
        run.train(3)
    found = [run.optimizer.telemetry() for run in runs]
    assert found[0] is not None
    assert found[0] == found[1]


def test_values_on_the_device_are_read_when_a_step_runs() -> None:
    """Every number of a group, of either dtype, and the limit of the norm."""
    host, device = pair(FusedSGDW, momentum=0.9, max_grad_norm=0.5)
    names = ("weight_decay", "momentum", "schedule_multiplier")
    held = {name: torch.tensor(0.0) for name in names}
    limit = device.optimizer.max_grad_norm = torch.tensor(0.0)
    device.optimizer.param_groups[0].update(held)
    for t in range(4):
        values = {
            "weight_decay": 0.25 * t,
            "momentum": 0.5 + t / 16,
            "schedule_multiplier": 1 - t / 8,
        }
        host.optimizer.param_groups[0].update(values)
        host.optimizer.max_grad_norm = 1 + t
        limit.fill_(1 + t)
        for name, value in values.items():
            held[name].fill_(value)
        host.train(1)
        device.train(1)
        assert_alike(host, device)


@all_classes
def test_a_gradient_that_comes_late_and_one_that_pauses(cls: Any) -> None:
    host, device = pair(cls, ema_decay=0.5)
    for t in range(6):
        for run in (host, device):
            run.optimizer.zero_grad()
            run.backward()
            if t in (0, 1, 4):
                run.model[0].bias.grad = None
            if t == 3:
                run.optimizer.zero_grad()
            run.optimizer.step()
        assert_alike(host, device)


def test_registered_anew() -> None:
    """Reading the state gives the list up; what only the device counts stays."""
    host, device = pair(FusedSGDW, momentum=0.9, dampening=0.5, ema_decay=0.5, decay="l2")
    for _ in range(5):
        for run in (host, device):
            run.train(1)
            run.optimizer.state  # noqa: B018
        assert_alike(host, device)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_without_any_gradient(overflow: bool) -> None:
    """It counts, and its norm is 0; unless the scaler has found an overflow elsewhere."""
    runs = pair(FusedAdamW, schedule=RESTARTS, max_grad_norm=0.5)
    for run in runs:
        run.train(2)
        run.optimizer.zero_grad()
        run.optimizer.found_inf = torch.tensor(float(overflow))
        run.optimizer.step()
        del run.optimizer.found_inf
    assert_alike(*runs)
    assert runs[1].optimizer.param_groups[0]["schedule_step"] == 3 - overflow
    if not overflow:
        assert all(run.optimizer.grad_norm == 0 for run in runs)
    for run in runs:
        run.train(1)
    assert_alike(*runs)


def test_scaler_without_any_gradient() -> None:
    """Whose sum of no overflows is a number."""
    run = Run(FusedAdamW, True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(run.optimizer)
    assert run.optimizer.param_groups[0]["schedule_step"] == 1


def test_an_infinite_limit() -> None:
    """As torch's: nothing is clipped, and of an infinite norm a NaN is left."""
    for spoiled in (False, True):
        runs = pair(FusedAdamW, max_grad_norm=math.inf)
        for run in runs:
            run.backward()
            if spoiled:
                run.spoil()
            run.optimizer.step()
        assert_alike(*runs)
        assert runs[1].model[0].weight.isnan().all() == spoiled


def test_a_momentum_on_the_device_may_be_zero() -> None:
    """Whether there is one is known before its value is."""
    device = Run(FusedSGD, True, momentum=torch.tensor(0.0))
    device.train(2)
    device.optimizer.param_groups[0]["momentum"].fill_(0.5)
    device.train(2)
    host = Run(FusedSGD, False, momentum=0.0)
    host.train(2)
    for param in host.model.parameters():  # torch has no buffer for a momentum of 0
        param.grad = None
    buffers = [device.optimizer.state[p]["momentum_buffer"] for p in device.model.parameters()]
    assert all(buffer.any() for buffer in buffers)
    other = Run(FusedSGD, True, momentum=torch.tensor(0.0))
    other.train(2)
    for want, got in zip(host.model.parameters(), other.model.parameters(), strict=True):
        assert same_bits(want.detach(), got.detach())


def test_rules_that_keep_nothing_share_no_count() -> None:
    """The device's threads would all write it."""
    run = Run(FusedSGD, True)
    run.train(2)
    registered = run.optimizer._registered
    assert registered is not None
    assert registered.device_step is not None
    assert registered.device_step._steps == [None] * 4


def test_numbers_on_the_cpu_are_read_when_a_step_is_enqueued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An lr, say, that a scheduler writes on the CPU beside parameters on a GPU."""
    monkeypatch.setattr(device_step, "_capturing", lambda device: False)
    gpu, check = torch.device("cuda:0"), FusedAdamW([torch.zeros(2)])._hyperparameters
    group = {**FusedAdamW([torch.zeros(2)]).param_groups[0], "lr": torch.tensor(0.25)}
    plan = device_step.plan_group("adam", group, gpu, check)
    assert plan.sources == (None,) * len(plan.sources)
    assert plan.hyperparameters.values["lr"] == 0.25
    optimizer = FusedAdamW([torch.zeros(2)], lr=torch.tensor(0.25), max_grad_norm=torch.tensor(2.0))
    assert optimizer._step_options(gpu).max_grad_norm == 2.0
    optimizer.max_grad_norm = torch.tensor(-1.0)
    with pytest.raises(ValueError, match="max_grad_norm: found -1"):
        optimizer._step_options(gpu)
    assert not device_step.is_read_on_host(torch.tensor(0.25), torch.device("cpu"))
    monkeypatch.setattr(device_step, "_capturing", lambda device: True)
    with pytest.raises(ValueError, match=r"lr: found .* on cpu, accepted: .* on cuda:0"):
        device_step.plan_group("adam", group, gpu, check)


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cuda:0", "cpu")])
def test_several_devices_leave_decisions_to_the_host(devices: tuple[str, str]) -> None:
    optimizer = FusedAdamW([torch.zeros(2)], max_grad_norm=1.0)
    optimizer.engine = "cuda-on-host"
    for chosen in (devices, (devices[0], devices[0])):
        params = [
            SimpleNamespace(device=torch.device(name), is_cuda=name.startswith("cuda"))
            for name in chosen
        ]
        optimizer.param_groups[0]["params"] = params
        wanted = torch.device("cuda:0") if chosen[0] == chosen[1] else None
        assert optimizer._device_of_decisions() == wanted


# --- Checkpoints ---------------------------------------------------------------------------------


def by_state_dict(run: Run) -> None:
    saved = copy.deepcopy(run.optimizer.state_dict())
    assert saved["state"] == {}
    run.optimizer.load_state_dict(saved)


def by_pickle(run: Run) -> None:
    saved = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    run.model, run.optimizer = saved
    assert not any(run.optimizer.state.values())


def by_the_host(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["capturable"] = False
    run.optimizer.engine = "cpu"


def by_nothing(run: Run) -> None:
    """Goes on."""


@pytest.mark.parametrize("across", [by_state_dict, by_pickle, by_the_host, by_nothing])
@pytest.mark.parametrize("late", [False, True], ids=["", "with a gradient that comes late"])
def test_overflow_in_the_first_step(across: Callable[[Run], None], late: bool) -> None:
    """What the device has not begun is in no checkpoint."""
    runs = pair(FusedSGD, momentum=0.9, dampening=0.5, ema_decay=0.5, skip_nonfinite=True)
    for run in runs:
        run.backward()
        run.spoil()
        if late:
            run.model[0].bias.grad = None
        run.optimizer.step()
    across(runs[1])
    for run in runs:
        run.train(2)
    assert_alike(*runs)


def test_average_that_is_added_after_an_overflow() -> None:
    """The states that the overflow left have not begun either."""
    runs = pair(FusedSGD, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    for run in runs:
        run.backward()
        run.spoil()
        run.optimizer.step()
        run.optimizer.ema_decay = 0.5
        run.train(2)
    assert_alike(*runs)


@all_classes
@pytest.mark.parametrize("source", [False, True], ids=["from the host", "from the device"])
def test_checkpoints_load_across(cls: Any, source: bool) -> None:
    options = {"schedule": RESTARTS, "ema_decay": 0.9}
    first = Run(cls, source, **options)
    first.train(4)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(type(group["schedule_step"]) is int for group in saved["param_groups"])
    others = []
    for on_device in (False, True):
        run = Run(cls, on_device, **options)
        run.model.load_state_dict(first.model.state_dict())
        run.t = first.t
        for group in (loaded := copy.deepcopy(saved))["param_groups"]:
            group["capturable"] = on_device
            group["lr"] = torch.tensor(0.05, dtype=torch.float64) if on_device else 0.05
        run.optimizer.load_state_dict(loaded)
        run.train(3)
        others.append(run)
    first.train(3)
    for run in others:
        assert_alike(first, run)


def test_back_to_the_host() -> None:
    host, device = pair(FusedAdamW, schedule=RESTARTS)
    host.train(3)
    device.train(3)
    for group in device.optimizer.param_groups:
        group["capturable"] = False
    host.train(3)
    device.train(3)
    assert_alike(host, device)


# --- What captured graphs use --------------------------------------------------------------------


def memory_of(held: Any) -> Iterator[Tensor]:
    """Every tensor that is reached from an object through tuples, lists, dicts and attributes."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, tuple | list):
        for item in held:
            yield from memory_of(item)
    elif isinstance(held, dict):
        yield from memory_of(list(held.values()))
    elif isinstance(held, device_step.DeviceStep | device_step._Table | device_step.GroupPlan):
        yield from memory_of(vars(held))


def take_captured_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(device_step, "_capturing", lambda device: True)
        run.train(1)


@pytest.mark.parametrize("captured", [False, True])
def test_a_captured_step_keeps_its_memory(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    """As long as the optimizer lives, though reading its state gives up what is registered."""
    run = Run(FusedSGDW, True, schedule=RESTARTS, momentum=0.9, **WHOLE)
    run.optimizer.found_inf = torch.tensor(0.0)
    run.train(1)
    if captured:
        take_captured_step(run, monkeypatch)
    registered = run.optimizer._registered
    assert registered is not None
    assert registered.device_step is not None
    tables = registered.device_step._tables
    assert tables.keys() == {"ends", "groups", "parameters", "schedule 0", "schedule 1"}
    own = {id(tensor): weakref.ref(tensor) for tensor in memory_of(vars(registered.device_step))}
    assert len(own) >= 4 + len(tables)
    shared = {id(tensor) for tensor in memory_of([*map(list, run.optimizer._positions.values())])}
    del registered, tables
    run.optimizer.found_inf = torch.tensor(0.0)
    run.optimizer.state_dict()
    run.optimizer.param_groups[0]["eps"] = 0.5
    run.train(1)
    gc.collect()
    alive = [reference() is not None for key, reference in own.items() if key not in shared]
    assert alive == [captured] * len(alive)
    copied = copy.deepcopy(run.optimizer)
    assert copied._captured == []


def test_steps_outside_leave_the_tables_of_a_captured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same length, with other values or gradients."""
    run = Run(FusedAdamW, True, schedule=RESTARTS, **WHOLE)
    bias = run.model[0].bias
    run.train(1)
    for weight_decay in (0.3, 0.4):
        take_captured_step(run, monkeypatch)
        registered = run.optimizer._registered
        assert registered is not None
        assert registered.device_step is not None
        tables = dict(registered.device_step._tables)
        content = {name: table.memory.clone() for name, table in tables.items()}
        for _ in range(2):
            run.optimizer.param_groups[0]["weight_decay"] = weight_decay
            run.optimizer.param_groups[1]["schedule"] = schedules.StepDecay(3)
            run.backward()
            bias.grad, kept = None, bias.grad
            run.optimizer.step()
            bias.grad = kept
            run.train(1)
        for name, table in tables.items():
            assert torch.equal(table.memory, content[name]), name
        again = registered.device_step._tables
        assert again["groups"].memory is not tables["groups"].memory
        before = again["groups"].memory
        run.optimizer.param_groups[0]["weight_decay"] = 2 * weight_decay
        run.train(1)
        assert again["groups"].memory is before  # no graph's: written over


def test_first_step_under_capture_creates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for steps, found in ((0, "a first step of a param group"), (1, "parameters that are not")):
        run = Run(FusedAdamW, True)
        run.train(steps)
        run.optimizer.state.clear()
        run.backward()
        monkeypatch.setattr(device_step, "_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=f"under CUDA graph capture: found {found}"):
            run.optimizer.step()
        monkeypatch.undo()
        assert not run.optimizer._state
        assert isinstance(run.optimizer.param_groups[0]["schedule_step"], Tensor) == bool(steps)


# --- Bad input -----------------------------------------------------------------------------------


def refused(run: Run, error: type[Exception], message: str) -> None:
    run.backward()
    before = {name: value.clone() for name, value in run.tensors().items()}
    with pytest.raises(error, match=message):
        run.optimizer.step()
    after = run.tensors()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda o: o.param_groups[1].update(lr=torch.zeros(2)),
            ValueError,
            r"param group 1: lr: found a tensor of shape \(2,\)",
        ),
        (
            lambda o: o.param_groups[0].update(lr=torch.tensor(1)),
            TypeError,
            "param group 0: lr: .*int64.*accepted: one element of torch.float32 or torch.float64",
        ),
        (
            lambda o: o.param_groups[0].update(lr=torch.tensor(1.0, device="meta")),
            ValueError,
            "param group 0: lr: .*on meta, accepted: .*on cpu",
        ),
        (
            lambda o: setattr(o, "found_inf", torch.zeros(2)),
            ValueError,
            r"found_inf: found a tensor of shape \(2,\)",
        ),
        (
            lambda o: setattr(o, "grad_scale", torch.tensor(1.0, dtype=torch.float64)),
            TypeError,
            "grad_scale: .*float64",
        ),
        (
            lambda o: o.param_groups[0].update(schedule=schedules.Polynomial(5, 0.5)),
            ValueError,
            "param group 0: schedule: .*integer power",
        ),
        (
            lambda o: o.param_groups[0].update(betas=(2.0, 0.9)),
            ValueError,
            r"param group 0: betas\[0\]",
        ),
    ],
)
def test_refused_by_name(
    change: Callable[[Any], None], error: type[Exception], message: str
) -> None:
    for steps in (0, 2):
        run = Run(FusedAdamW, True)
        run.train(steps)
        change(run.optimizer)
        refused(run, error, message)


def test_capture_refuses_what_a_replay_would_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph must find its tables written, and they are not written while it is captured."""
    run = Run(FusedAdamW, True)
    run.train(2)
    with monkeypatch.context() as patch:
        patch.setattr(device_step, "_capturing", lambda device: True)
        run.train(1)  # as the last step
        run.optimizer.param_groups[0]["eps"] = 0.5
        run.backward()
        with pytest.raises(RuntimeError, match=r"graph capture: found param groups, .* changed"):
            run.optimizer.step()
        refused(run, RuntimeError, "parameters that are not registered: .* state_dict.. was read;")
    run.train(1)
    first = Run(FusedAdamW, True)
    with monkeypatch.context() as patch:
        patch.setattr(device_step, "_capturing", lambda device: True)
        refused(first, RuntimeError, "accepted: as at a step before the capture")
    assert not any(first.optimizer.state.values())


def test_engines_that_decide_on_the_host_take_capturable_too() -> None:
    """As torch's checkpoints may have it; the CPU engine reads the values at every step."""
    host = Run(FusedAdamW, False)
    capturable = Run(FusedAdamW, False)
    for group in capturable.optimizer.param_groups:
        group.update(capturable=True, lr=torch.tensor(0.05, dtype=torch.float64))
    host.train(3)
    capturable.train(3)
    assert_alike(host, capturable)
    assert "cpu" in fused_adamw.available_engines()
