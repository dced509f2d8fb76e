"""The CUDA engine's storage formats that are more than dtypes, played on the host beside the CPU's.

What the formats store is tested against the reference elsewhere; here two engines that share its
arithmetic, but neither its loads and stores nor its way through blocks, must leave the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    ADAGRAD,
    ADAM,
    ADAMAX,
    BF16,
    DRAWS,
    F16,
    F32,
    LION,
    NADAM,
    RMSPROP,
    SGD,
    Group,
    Rule,
    same_bits,
)
from torch import Tensor

from fused_adamw import _C, engines, shards
from fused_adamw.device_step import Amp, DeviceInputs, DeviceStep, GroupPlan
from fused_adamw.measurements import GroupTelemetry, Measurements
from fused_adamw.registration import Member, RegisteredList
from fused_adamw.shards import Extent
from fused_adamw.whole_step import EMA, PLAIN, Outcome, StepOptions

CODES = "code8"
BLOCK = 64  # codes with one scale
CHUNK = 16384  # elements that one block of threads updates
# What keeps a parameter's lower bits: its key in the state and its dtype.
BESIDE = {
    "master": ("param_master", F32),
    "remainder16": ("param_remainder", "int16"),
    "remainder8": ("param_remainder", "int8"),
    "compensation": ("param_compensation", BF16),
}
KINDS = {
    "exp_avg": "signed",
    "momentum_buffer": "signed",
    "grad_avg": "signed",
    "exp_avg_sq": "square",
    "max_exp_avg_sq": "square",
    "square_avg": "square",
    "acc_delta": "square",
    "sum": "square",
    "exp_inf": "magnitude",
}


@dataclass(frozen=True)
class Format:
    """Dtypes of param, gradient and states; what is beside the param; how numbers are rounded."""

    param: str
    grad: str
    state: str
    beside: str = ""
    stochastic: bool = False

    def __str__(self) -> str:
        dtypes = f"{self.param}-{self.grad}-{self.state}"
        return "-".join(filter(None, (dtypes, self.beside, "stochastic" * self.stochastic)))


FORMATS = (
    *[Format(F32, grad, CODES) for grad in (F32, BF16, F16)],
    *[Format(BF16, grad, state, "", True) for grad in (BF16, F32) for state in (BF16, F32)],
    *[Format(param, grad, F32, "master") for param in (BF16, F16) for grad in (param, F32)],
    *[
        Format(BF16, grad, state, "remainder16")
        for grad in (BF16, F32)
        for state in (F32, BF16, CODES)
    ],
    *[Format(BF16, grad, CODES, "remainder8") for grad in (BF16, F32)],
    *[Format(BF16, grad, BF16, "compensation") for grad in (BF16, F32)],
)
DRAWING = [fmt for fmt in FORMATS if fmt.stochastic or fmt.beside == "remainder8"]
RULES: dict[str, tuple[Rule, Group]] = {
    "adam": (ADAM, {"decay": "lr", "amsgrad": False}),
    "adam amsgrad": (ADAM, {"decay": "l2", "amsgrad": True}),
    "nadam": (NADAM, {"decay": "lr", "scheduled_average": False}),
    "sgd": (SGD, {"decay": "lr", "momentum": 0.0, "nesterov": False}),
    "sgd momentum": (SGD, {"decay": "lr", "momentum": 0.9, "nesterov": True}),
    "rmsprop": (RMSPROP, {"decay": "lr", "centered": False, "momentum": 0.9}),
    "lion": (LION, {"decay": "lr"}),
    "adamax": (ADAMAX, {"decay": "lr"}),
    "adagrad": (ADAGRAD, {"decay": "lr"}),
}
RAGGED = (*range(1, 200, 13), 64, 128, 512, 4096 + 37, CHUNK + 1)
WHOLE = StepOptions(ema_decay=0.9, zero_grads=True, telemetry=True)

all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)
all_rules = pytest.mark.parametrize("rule", RULES)


@dataclass(frozen=True)
class Case:
    """A list of parameters in one format.

    Attributes:
        fmt: the format.
        rule: a key of `RULES`.
        numels: of the parameters.
        values: a key of `DRAWS`.
        misaligned: by how many elements arrays lie off a 64-byte boundary, one after the other.
        extent: where the elements of each parameter are in the whole tensor.
        options: what steps do beside the rule.
        device: whether coefficients are worked out as on a device.
        found_inf: whether the scaler tells such a step of an overflow.
    """

    fmt: Format
    rule: str = "adam"
    numels: Sequence[int] = (200, 64)
    values: str = "normal"
    misaligned: Sequence[int] = (0,)
    extent: Extent = shards.WHOLE
    options: StepOptions = PLAIN
    device: bool = False
    found_inf: bool = False


@dataclass
class Run:
    """A case's memory on its way through the steps of one engine."""

    case: Case
    engine: str
    measurements: Measurements = field(default_factory=Measurements)

    def __post_init__(self) -> None:
        self.rule, options = RULES[self.case.rule]
        self.group: Group = {**self.rule.loud, "maximize": False, **options}
        self.names = self.rule.states(self.group)
        self.memory: list[Tensor] = []
        self.rng = np.random.default_rng(5)
        self.params, self.grads, self.states = [], [], []
        for numel in self.case.numels:
            param, grad, state = self._arrays(numel)
            self.params.append(param)
            self.grads.append(grad)
            self.states.append(state)
        self.taken = 3
        self.count = torch.tensor(self.taken)

    def _arrays(self, numel: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fmt, codes = self.case.fmt, self.case.fmt.state == CODES
        param, grad = self._array(fmt.param, numel), self._array(fmt.grad, numel)
        state: dict[str, Tensor] = {}
        for name in self.names:
            square = name in self.rule.squares
            if codes:
                state[name] = self._array("int8" if KINDS[name] == "signed" else "uint8", numel)
                state[f"{name}_scale"] = self._array("scale", -(-numel // BLOCK))
            else:
                state[name] = self._array(fmt.state, numel, square)
        if fmt.beside:
            key, dtype = BESIDE[fmt.beside]
            state[key] = self._array(dtype, numel)
        if self.case.options.ema_decay is not None:
            state[EMA] = self._array(F32, numel)
        if self.rule.counts:
            state["step"] = torch.tensor(3.0)
        if self.rule.scalar is not None:
            state[self.rule.scalar] = torch.tensor(0.5, dtype=torch.float64)
        return param, grad, state

    def _array(self, dtype: str, numel: int, square: bool = False) -> Tensor:
        """A view of memory with guards before and behind, where nothing may be written."""
        off = self.case.misaligned[len(self.memory) % len(self.case.misaligned)]
        if dtype == "scale":
            some = np.array([0, 1e-38, 2**-126, 1e-20, 1, 3e38, np.nan], np.float32)
            values = np.abs(self.rng.standard_normal(numel, np.float32))
            if self.case.values != "normal":
                values = self.rng.choice(some, numel)
            dtype, off = F32, 0
        elif dtype in (F32, BF16, F16):
            values = DRAWS[self.case.values](self.rng, numel, dtype, square)
        else:
            low, high = {"int8": (-127, 128), "uint8": (0, 256), "int16": (-(2**15), 2**15)}[dtype]
            values = self.rng.integers(low, high, numel, dtype)
        kind = getattr(torch, dtype)
        guard = 64 // kind.itemsize
        memory = torch.zeros(guard + off + numel + guard, dtype=kind)
        memory.view(torch.uint8).fill_(0x2A)
        self.memory.append(memory)
        array = memory[guard + off : guard + off + numel]
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
        raw = np.ascontiguousarray(values).view({1: "u1", 2: "i2", 4: "i4"}[kind.itemsize])
        array.view(bits).copy_(torch.from_numpy(raw.copy()))
        return array

    @cached_property
    def registered(self) -> RegisteredList:
        """The list as the library keeps it."""
        fmt, averages = self.case.fmt, self.case.options.ema_decay is not None
        members = [
            Member(
                param,
                dict[str, Any](state),
                self.names,
                0,
                f"parameter {i}",
                counts=self.rule.counts,
                scalar=self.rule.scalar,
                beside=(fmt.beside, BESIDE[fmt.beside][0]) if fmt.beside else None,
                scales=tuple(f"{n}_scale" for n in self.names) if fmt.state == CODES else (),
                stochastic=fmt.stochastic,
                random_key=_C.random_key(7, i),
                averaged=averages,
            )
            for i, (param, state) in enumerate(zip(self.params, self.states, strict=True))
        ]
        device_step = None
        if self.case.device:
            begun = [torch.tensor(1.0) for _ in members]
            steps = [s.get("step", torch.tensor(3.0)) for s in self.states]
            device_step = DeviceStep(torch.device("cpu"), steps, begun, 1, [])
        registered = RegisteredList(members, "auto", averages, device_step)
        engine = engines._BY_NAME[self.engine]

        def update(bucket: _C.Bucket, hyperparameters: Sequence[_C.Hyperparameters]) -> None:
            bucket.extents = np.array([self.case.extent] * len(members))
            engine.update(bucket, hyperparameters)

        registered._engine = lambda bucket: engine._replace(update=update)
        return registered

    def step(self) -> None:
        """One step."""
        hyperparameters = self.rule.hyperparameters(**self.group)
        inputs = None
        if self.case.device:
            found_inf = torch.tensor([1.0]) if self.case.found_inf else None
            fields = len(_C.RULES[self.rule.name][0])
            plan = GroupPlan(hyperparameters, (None,) * fields, (), self.count, self.group)
            inputs = DeviceInputs([plan], Amp(None, found_inf))
        outcome = self.registered.step(
            [hyperparameters],
            list(self.grads),
            steps=[self.taken],
            options=self.case.options,
            measurements=self.measurements,
            inputs=inputs,
        )
        assert outcome is Outcome.DONE
        self.taken += 1


def assert_same(case: Case, steps: int = 2, by: Case | None = None) -> tuple[Run, Run]:
    """Both engines over one case, or the CPU over another one, and the comparison of all bits."""
    expected, found = Run(by or case, "cpu"), Run(case, "cuda-on-host")
    for _ in range(steps):
        expected.step()
        found.step()
        for i, (x, y) in enumerate(zip(expected.memory, found.memory, strict=True)):
            assert equal(x, y), f"array {i}, {x.dtype}: {differing(x, y)}"
    return expected, found


def equal(x: Tensor, y: Tensor) -> bool:
    return same_bits(x, y) if x.dtype.is_floating_point else torch.equal(x, y)


def differing(x: Tensor, y: Tensor) -> list[int]:
    """Places of the first elements that differ, guards counted."""
    places: list[int] = torch.nonzero((x != y) & ~((x != x) & (y != y))).flatten().tolist()
    return places[:8]


@all_formats
@all_rules
def test_ragged_lists(fmt: Format, rule: str) -> None:
    assert_same(Case(fmt, rule, RAGGED))


@all_formats
@all_rules
def test_special_values(fmt: Format, rule: str) -> None:
    assert_same(Case(fmt, rule, (2049, 4096), "special", options=WHOLE), steps=3)


@all_formats
@pytest.mark.parametrize("values", ["bits", "special"])
@pytest.mark.parametrize("misaligned", [(0,), (1,), (0, 0, 1), (8, 3)])
def test_views_off_a_boundary(fmt: Format, values: str, misaligned: tuple[int, ...]) -> None:
    numels = (1, 15, 16, 17, 63, 64, 65, 511, 513, 4096 + 37)
    assert_same(Case(fmt, "adam amsgrad", numels, values, misaligned, options=WHOLE))


@all_formats
@pytest.mark.parametrize(
    "offset", [1, 16, 5 * 2**32, 2**32 - 1, 2**32 - 8, 2**32 - 16, 2**32 - 4096, 2**33 - 4099]
)
def test_shards(fmt: Format, offset: int) -> None:
    numels = (7, 48, 4096 + 37, CHUNK + 70)
    for misaligned in ((0,), (1,)):
        assert_same(Case(fmt, "adam", numels, misaligned=misaligned, extent=Extent(offset)))


@pytest.mark.parametrize("fmt", DRAWING, ids=str)
@pytest.mark.parametrize(
    "extent",
    [
        Extent(64, 64, 256),
        Extent(2**33 - 4099, 192, 1001),  # of numbers that do not begin a word
        Extent(128, 64, 2**33 + 3),  # each run draws from streams of its own
        Extent(5, CHUNK + 64, 2**34),
        Extent(3, 2**33, 2**35),  # longer than the shard
    ],
)
def test_shards_of_columns(fmt: Format, extent: Extent) -> None:
    numels = (64, 192 * 3, CHUNK + 2 * 4096)
    for misaligned in ((0,), (1,)):
        case = Case(fmt, "adam", numels, misaligned=misaligned, extent=extent, options=WHOLE)
        expected, found = (run.measurements.telemetry() for run in assert_same(case))
        assert expected is not None
        assert found is not None
        assert_same_telemetry(expected[0], found[0])


@pytest.mark.parametrize("fmt", [f for f in DRAWING if f.state != CODES], ids=str)
@pytest.mark.parametrize("run", [1, 2, 3, 7, 20])
def test_shards_of_few_columns(fmt: Format, run: int) -> None:
    """Fewer than a thread holds, and never coded: the runs of codes are whole blocks."""
    assert_same(Case(fmt, "adam", (run * 3, 4200), extent=Extent(1, run, 1001)))


@all_formats
@pytest.mark.parametrize("misaligned", [(0,), (1,)])
def test_telemetry(fmt: Format, misaligned: tuple[int, ...]) -> None:
    """Its sums are the CPU's, but for their order; its counts are the same."""
    numels = (33, 4096 + 37, CHUNK + 1)
    for values in ("normal", "special"):
        case = Case(fmt, "adam", numels, values, misaligned, options=WHOLE)
        expected, found = (run.measurements.telemetry() for run in assert_same(case, steps=1))
        assert expected is not None
        assert found is not None
        assert_same_telemetry(expected[0], found[0])


def assert_same_telemetry(expected: GroupTelemetry, found: GroupTelemetry) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, equal_nan=True)  # float64, reordered
    assert found[3:] == expected[3:]


@all_formats
@pytest.mark.parametrize("options", [PLAIN, WHOLE], ids=["plain", "whole"])
def test_coefficients_of_the_device(fmt: Format, options: StepOptions) -> None:
    """The random bits follow the count of steps that is on the device."""
    host = Case(fmt, "adam", (200, 4096 + 37), options=options)
    assert_same(replace(host, device=True), by=host)


@all_formats
def test_a_step_that_the_device_skips(fmt: Format) -> None:
    case = Case(fmt, "adam", (200, CHUNK + 70), options=WHOLE, device=True, found_inf=True)
    untouched, run = Run(case, "cuda-on-host"), Run(case, "cuda-on-host")
    run.step()
    for grad in untouched.grads:
        grad.zero_()
    assert all(map(equal, untouched.memory, run.memory))


@all_formats
def test_launches_of_many_tensors(fmt: Format) -> None:
    """More than the argument block of one launch can hold."""
    case = Case(fmt, "adam", (70,) * 700)
    _, run = assert_same(case, steps=1)
    run.registered.native.gather(
        [run.rule.hyperparameters(**run.group)], list(run.grads), steps=[run.taken]
    )
    (bucket,) = run.registered.native.buckets()
    assert _C.count_cuda_launches(bucket) > 1
    run.registered.native.release()
