"""Random problems for the engines, described by data, and the comparison of what they leave.

A problem is a rule, its param groups and a list of parameters. All its arrays lie in one piece of
memory for each dtype, with guard bytes in between, so that comparing the pieces compares every
array, every gradient (which nobody may write but to zero it) and every byte around them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from fused_adamw import _C, reference
from fused_adamw.engines import Engine, device_of, engine_for
from fused_adamw.engines.triton import interpreted, unavailable_reason
from fused_adamw.measurements import Measurements
from fused_adamw.registration import Member, RegisteredList
from fused_adamw.whole_step import EMA, PLAIN, Outcome, StepOptions

Array: TypeAlias = NDArray[Any]
Format: TypeAlias = tuple[str, str, str]  # dtypes of param, grad, states
Group: TypeAlias = Mapping[str, Any]  # hyperparameters of a param group

F32, BF16, F16 = "float32", "bfloat16", "float16"
FORMATS: tuple[Format, ...] = _C.FORMATS
UNIFORM_FORMATS: tuple[Format, ...] = ((F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16))

# --- Rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A rule as the tests see it: a later rule is one more entry of `RULES`.

    Attributes:
        name: what the extension and the reference call it.
        states: names of the states that a group's options ask for.
        options: values of each option; their combinations are the variants.
        compiled: the options that the engines are compiled for; the rest are coefficients.
        loud: hyperparameters so large that an operation in the wrong place shows.
        changes: what a run changes of them, one after the other, between steps.
        numbers: draws hyperparameters from all that is accepted.
        squares: those of the states that are never negative.
        counts: whether its state has a step.
        scalar: name of what it carries from step to step, if anything.
        carry: from the scalar before a step, its number and the group, the scalar after it.
    """

    name: str
    states: Callable[[Group], tuple[str, ...]]
    options: Mapping[str, Sequence[Any]]
    compiled: Mapping[str, Sequence[Any]]
    loud: Group
    changes: Sequence[Group]
    numbers: st.SearchStrategy[dict[str, Any]]
    squares: frozenset[str] = frozenset()
    counts: bool = True
    scalar: str | None = None
    carry: Callable[[float, int, Group], float] = lambda scalar, step, group: scalar

    def hyperparameters(self, **group: Any) -> _C.Hyperparameters:
        """What a step takes of a group."""
        return _C.Hyperparameters(self.name, group)

    def position(self, step: int, scalar: float) -> dict[str, Any]:
        """What the reference takes of a parameter beside its arrays."""
        return {"step": step} | ({} if self.scalar is None else {"scalar": scalar})

    def variants(self) -> list[dict[str, Any]]:
        """Every combination of options."""
        return list(_combinations(self.options))

    def groups(self, options: Mapping[str, Sequence[Any]] | None = None) -> list[Group]:
        """A loud group for each combination of options, by default of all; no two alike."""
        variants = list(_combinations(self.options if options is None else options))
        return [
            {**self.loud, **variant, "lr": self.loud["lr"] * (1 + i / 16)}
            for i, variant in enumerate(variants)
        ]


def _combinations(options: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def _any_size(most: float) -> st.SearchStrategy[float]:
    """Mostly of a reasonable size, sometimes of any that float64 has."""
    return st.floats(0, most) | st.floats(0, allow_infinity=False)


_COMMON = {"weight_decay": 0.1, "schedule_multiplier": 0.75, "lr": 0.1}
_BETAS = {"beta1": 0.9, "beta2": 0.99}
_DECAYS_AND_SIGNS = {"decay": _C.DECAYS, "maximize": (False, True)}
_DECAYS_COMPILED = {"decay": ("lr", "l2"), "maximize": (False,)}
_SIZES = {
    "lr": _any_size(1),
    "weight_decay": st.just(0.0) | _any_size(1),
    "schedule_multiplier": _any_size(1),
}
_EPS = {"eps": st.sampled_from([0.0, 1e-8]) | _any_size(1e-3)}


def _below_one(*often: float) -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, *often]) | st.floats(0, 1, exclude_max=True)


_DRAWN_BETAS = {"beta1": _below_one(0.9), "beta2": _below_one(0.999)}

ADAM = Rule(
    name="adam",
    states=lambda group: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + group["amsgrad"]],
    squares=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
    options={"decay": _C.DECAYS, "amsgrad": (False, True), "maximize": (False, True)},
    compiled={"decay": ("lr", "l2"), "amsgrad": (False, True), "maximize": (False,)},
    loud={**_COMMON, **_BETAS, "eps": 1e-3},
    changes=(
        {},
        {"lr": 0.03, "schedule_multiplier": 1.0},
        {"beta1": 0.5, "beta2": 0.9},
        {"eps": 1e-8, "weight_decay": 0.0},
    ),
    numbers=st.fixed_dictionaries({**_SIZES, **_DRAWN_BETAS, **_EPS}),
)
NADAM = Rule(
    name="nadam",
    states=lambda group: ("exp_avg", "exp_avg_sq"),
    squares=frozenset({"exp_avg_sq"}),
    scalar="mu_product",
    carry=lambda scalar, step, group: (
        scalar * reference.momentum_schedule(group["beta1"], group["momentum_decay"], step)
    ),
    options={**_DECAYS_AND_SIGNS, "scheduled_average": (False, True)},
    compiled={**_DECAYS_COMPILED, "scheduled_average": (False,)},
    loud={**_COMMON, **_BETAS, "eps": 1e-3, "momentum_decay": 0.3},
    changes=(
        {},
        {"lr": 0.03, "schedule_multiplier": 1.0},
        {"beta1": 0.5, "beta2": 0.9, "momentum_decay": 4e-3},
        {"eps": 1e-8, "weight_decay": 0.0},
    ),
    numbers=st.fixed_dictionaries(
        {**_SIZES, **_DRAWN_BETAS, **_EPS, "momentum_decay": st.just(4e-3) | _any_size(1)}
    ),
)
SGD = Rule(
    name="sgd",
    states=lambda group: ("momentum_buffer",) if group["momentum"] else (),
    counts=False,
    options={**_DECAYS_AND_SIGNS, "momentum": (0.0, 0.9), "nesterov": (False, True)},
    compiled={"momentum": (0.0, 0.9), **_DECAYS_COMPILED, "nesterov": (False, True)},
    loud={**_COMMON, "dampening": 0.25, "lr_in_momentum": True},
    changes=(
        {},
        {"lr": 0.03, "schedule_multiplier": 1.0, "lr_in_momentum": False},
        {"dampening": 0.0, "schedule_multiplier": 0.0},
        {"weight_decay": 0.0},
    ),
    numbers=st.fixed_dictionaries(
        {**_SIZES, "dampening": st.floats(-2, 2), "lr_in_momentum": st.booleans()}
    ),
)
RMSPROP = Rule(
    name="rmsprop",
    states=lambda group: (
        "square_avg",
        *(["grad_avg"] if group["centered"] else []),
        *(["momentum_buffer"] if group["momentum"] else []),
    ),
    squares=frozenset({"square_avg"}),
    options={**_DECAYS_AND_SIGNS, "centered": (False, True), "momentum": (0.0, 0.9)},
    compiled={**_DECAYS_COMPILED, "centered": (False, True), "momentum": (0.0, 0.9)},
    loud={**_COMMON, "alpha": 0.9, "eps": 0.25},
    changes=(
        {},
        {"lr": 0.03, "schedule_multiplier": 1.0},
        {"alpha": 0.5},
        {"eps": 1e-8, "weight_decay": 0.0},
    ),
    numbers=st.fixed_dictionaries({**_SIZES, **_EPS, "alpha": _below_one(0.99)}),
)
ADAGRAD = Rule(
    name="adagrad",
    states=lambda group: ("sum",),
    squares=frozenset({"sum"}),
    options=_DECAYS_AND_SIGNS,
    compiled=_DECAYS_COMPILED,
    loud={**_COMMON, "lr_decay": 0.1, "eps": 1e-3},
    changes=({}, {"lr": 0.03, "schedule_multiplier": 1.0}, {"eps": 1e-8, "weight_decay": 0.0}),
    numbers=st.fixed_dictionaries({**_SIZES, **_EPS, "lr_decay": _any_size(1)}),
)
ADADELTA = Rule(
    name="adadelta",
    states=lambda group: ("square_avg", "acc_delta"),
    squares=frozenset({"square_avg", "acc_delta"}),
    options=_DECAYS_AND_SIGNS,
    compiled=_DECAYS_COMPILED,
    loud={**_COMMON, "rho": 0.9, "eps": 1e-3},
    changes=({}, {"lr": 0.5, "schedule_multiplier": 1.0}, {"rho": 0.5, "weight_decay": 0.0}),
    numbers=st.fixed_dictionaries({**_SIZES, **_EPS, "rho": _below_one(0.9)}),
)
ADAMAX = Rule(
    name="adamax",
    states=lambda group: ("exp_avg", "exp_inf"),
    squares=frozenset({"exp_inf"}),
    options=_DECAYS_AND_SIGNS,
    compiled=_DECAYS_COMPILED,
    loud={**_COMMON, **_BETAS, "eps": 1e-3},
    changes=(
        {},
        {"lr": 0.03, "schedule_multiplier": 1.0},
        {"beta1": 0.5, "beta2": 0.9},
        {"eps": 1e-8, "weight_decay": 0.0},
    ),
    numbers=st.fixed_dictionaries({**_SIZES, **_DRAWN_BETAS, **_EPS}),
)
LION = Rule(
    name="lion",
    states=lambda group: ("exp_avg",),
    counts=False,
    options=_DECAYS_AND_SIGNS,
    compiled=_DECAYS_COMPILED,
    loud={**_COMMON, **_BETAS},
    changes=({}, {"lr": 0.03, "schedule_multiplier": 1.0}, {"beta1": 0.5, "weight_decay": 0.0}),
    numbers=st.fixed_dictionaries({**_SIZES, **_DRAWN_BETAS}),
)

RULES = (ADAM, NADAM, SGD, RMSPROP, ADAGRAD, ADADELTA, ADAMAX, LION)

# --- Values --------------------------------------------------------------------------------------

Draw: TypeAlias = Callable[[np.random.Generator, int, str, bool], Array]
"""(generator, numel, dtype, whether these are squares) -> an array as stored in that dtype."""


def draw_normal(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Array:
    """Normal numbers, or their squares."""
    values = rng.standard_normal(numel, np.float32)
    return reference.store(values * values if square else values, dtype)


def draw_bits(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Array:
    """Any pattern of bits, which spreads the exponents evenly."""
    storage = np.dtype(reference.STORAGE_DTYPES[dtype])
    return np.frombuffer(rng.bytes(numel * storage.itemsize), storage)


def special_values(dtype: str) -> Array:
    """Zeros, denormals, the ends of the range, infinities and NaNs of both signs, as stored."""
    infinity = {F32: 0x7F800000, BF16: 0x7F80, F16: 0x7C00}[dtype]
    smallest_normal = {F32: 0x00800000, BF16: 0x0080, F16: 0x0400}[dtype]
    one = {F32: 0x3F800000, BF16: 0x3F80, F16: 0x3C00}[dtype]
    bits = np.uint32 if dtype == F32 else np.uint16
    positive = np.array(
        [
            *(0, 1, 3, smallest_normal // 2, smallest_normal - 1, smallest_normal),
            *(one // 4, one // 2, one - 1, one, one + 1, one + one // 2),
            *(infinity - 2, infinity - 1, infinity, infinity + 1, np.iinfo(bits).max // 2),
        ],
        bits,
    )
    sign = np.array(np.iinfo(bits).max // 2 + 1, bits)
    return np.concatenate([positive, positive | sign]).view(reference.STORAGE_DTYPES[dtype])


def draw_special(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Array:
    """Special values: of many elements, nearly all combinations that the slots can have."""
    return rng.choice(special_values(dtype), numel)


DRAWS: dict[str, Draw] = {"normal": draw_normal, "bits": draw_bits, "special": draw_special}

# --- Problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One parameter of a problem.

    Attributes:
        numel: number of elements.
        dtypes: of the parameter, its gradient and its states.
        group: index of its param group.
        step: steps it has taken before; after none, its average begins with the first.
        offsets: by how many elements param, states, gradients and average, in this order and from
            the start again, lie off a 64-byte boundary.
        has_grad: whether it has a gradient.
    """

    numel: int
    dtypes: Format = (F32, F32, F32)
    group: int = 0
    step: int = 0
    offsets: tuple[int, ...] = (0,)
    has_grad: bool = True


@dataclass(frozen=True)
class Slot:
    """Where an array lies: `numel` elements from `begin` of the memory of `dtype`."""

    name: str
    dtype: str
    begin: int
    numel: int


_GUARD_BYTES = 64
_PATTERN = 0x2A2A  # of guard bytes, in either width: an ordinary number
_BITS = {F32: torch.int32, BF16: torch.int16, F16: torch.int16}


@dataclass(eq=False)
class Problem:
    """Parameters of one rule, with values drawn for all their arrays.

    Attributes:
        rule: the rule.
        groups: hyperparameters of each param group.
        parameters: the list.
        draw: draws the values.
        seed: of the values.
        gradients: how many gradients each parameter has; the steps take them in turn.
        options: what steps do beside their rule.
    """

    rule: Rule
    groups: Sequence[Group]
    parameters: Sequence[Parameter]
    draw: Draw = draw_normal
    seed: int = 0
    gradients: int = 1
    options: StepOptions = PLAIN
    slots: list[dict[str, Slot]] = field(init=False)
    memory: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(_BITS, 0)
        self.slots = [self._place(parameter, sizes) for parameter in self.parameters]
        self.memory = {
            dtype: torch.full((size,), _PATTERN, dtype=_BITS[dtype])
            for dtype, size in sizes.items()
        }
        rng = np.random.default_rng(self.seed)
        for slot in itertools.chain.from_iterable(slots.values() for slots in self.slots):
            values = self.draw(rng, slot.numel, slot.dtype, slot.name in self.rule.squares)
            array(self.memory, slot)[...] = values

    def _place(self, parameter: Parameter, sizes: dict[str, int]) -> dict[str, Slot]:
        param, grad, state = parameter.dtypes
        dtypes = {"param": param}
        dtypes |= dict.fromkeys(self.rule.states(self.groups[parameter.group]), state)
        dtypes |= {f"grad {k}": grad for k in range(self.gradients)}
        if self.options.ema_decay is not None:
            dtypes[EMA] = F32
        slots = {}
        for (name, dtype), offset in zip(
            dtypes.items(), itertools.cycle(parameter.offsets), strict=False
        ):
            guard = _GUARD_BYTES // _BITS[dtype].itemsize
            begin = sizes[dtype] + guard + offset
            slots[name] = Slot(name, dtype, begin, parameter.numel)
            sizes[dtype] = -(-(begin + parameter.numel) // guard) * guard + guard
        return slots

    def name(self, index: int) -> str:
        """What messages call a parameter."""
        parameter = self.parameters[index]
        return f"parameter {index}, {parameter} of group {self.groups[parameter.group]}"


def array(memory: Mapping[str, torch.Tensor], slot: Slot) -> Array:
    """The elements of a slot in host memory, as stored."""
    bits = memory[slot.dtype][slot.begin : slot.begin + slot.numel].numpy()
    return bits.view(reference.STORAGE_DTYPES[slot.dtype])


class State:
    """A copy of a problem's memory on its way through the steps of one engine."""

    def __init__(self, problem: Problem, device: str = "cpu") -> None:
        self.problem = problem
        self.memory = {dtype: bits.to(device, copy=True) for dtype, bits in problem.memory.items()}
        self.steps = [torch.tensor(float(parameter.step)) for parameter in problem.parameters]
        self.scalars = [
            torch.tensor(0.5 if parameter.step else 1.0, dtype=torch.float64)
            for parameter in problem.parameters
        ]
        self.taken = 0
        self.averaged = [parameter.step > 0 for parameter in problem.parameters]
        self.measurements = Measurements()
        self._grads = [
            [
                self._tensor(slots[f"grad {k}"]) if parameter.has_grad else None
                for parameter, slots in zip(problem.parameters, problem.slots, strict=True)
            ]
            for k in range(problem.gradients)
        ]

    @cached_property
    def registered(self) -> RegisteredList:
        """The list as the library keeps it."""
        members = []
        averages = self.problem.options.ema_decay is not None
        for i, (parameter, slots) in enumerate(
            zip(self.problem.parameters, self.problem.slots, strict=True)
        ):
            names = self.problem.rule.states(self.problem.groups[parameter.group])
            state: dict[str, Any] = {name: self._tensor(slots[name]) for name in names}
            rule = self.problem.rule
            if averages:
                state[EMA] = self._tensor(slots[EMA])
            if rule.counts:
                state["step"] = self.steps[i]
            if rule.scalar is not None:
                state[rule.scalar] = self.scalars[i]
            member = Member(
                self._tensor(slots["param"]),
                state,
                names,
                parameter.group,
                f"parameter {i}",
                counts=rule.counts,
                scalar=rule.scalar,
                fresh=parameter.step == 0,
                averaged=averages,
                unaveraged=not self.averaged[i],
            )
            members.append(member)
        return RegisteredList(members, "auto", averages)

    def _tensor(self, slot: Slot) -> torch.Tensor:
        bits = self.memory[slot.dtype][slot.begin : slot.begin + slot.numel]
        return bits.view(getattr(torch, slot.dtype))

    def gather(self, groups: Sequence[Group] | None = None) -> list[_C.Hyperparameters]:
        """Fills the buckets for the next step."""
        hyperparameters = self._hyperparameters(groups)
        assert self.registered.native.gather(hyperparameters, self._grads_of_step())
        return hyperparameters

    def _hyperparameters(self, groups: Sequence[Group] | None) -> list[_C.Hyperparameters]:
        return [
            self.problem.rule.hyperparameters(**group)
            for group in (self.problem.groups if groups is None else groups)
        ]

    def _grads_of_step(self) -> list[torch.Tensor | None]:
        return self._grads[self.taken % len(self._grads)]

    def step(self, engine: Engine, groups: Sequence[Group] | None = None) -> None:
        """One step by an engine; `groups` replaces the problem's hyperparameters."""
        self.registered._engine = lambda bucket: engine
        outcome = self.registered.step(
            self._hyperparameters(groups),
            self._grads_of_step(),
            options=self.problem.options,
            measurements=self.measurements,
        )
        assert outcome is not Outcome.STALE
        self.taken += 1

    def step_by_reference(self, groups: Sequence[Group] | None = None) -> None:
        """One step by the float32 reference, with nothing of the library's between; host only."""
        rule, options = self.problem.rule, self.problem.options
        groups = self.problem.groups if groups is None else groups
        grad_name = f"grad {self.taken % self.problem.gradients}"
        norm, grad_factor = self._clipped(grad_name)
        if options.measures_norm:
            self.measurements.grad_norm = torch.tensor(norm, dtype=torch.float32)
        skipped = options.skip_nonfinite and not np.isfinite(norm)
        for i, (parameter, slots) in enumerate(
            zip(self.problem.parameters, self.problem.slots, strict=True)
        ):
            if not parameter.has_grad:
                continue
            grad = self.read(i, grad_name)
            if options.zero_grads:
                array(self.memory, slots[grad_name])[...] = 0
            if skipped:
                continue
            group = groups[parameter.group]
            written = ("param", *rule.states(group))
            param, *states = (self.read(i, name) for name in written)
            step, scalar = int(self.steps[i]) + 1, float(self.scalars[i])
            position = rule.position(step, scalar)
            updated = reference.update(
                rule.name, param, grad, *states, grad_factor=grad_factor, **position, **group
            )
            for name, values in zip(written, updated, strict=True):
                array(self.memory, slots[name])[...] = reference.store(values, slots[name].dtype)
            self.steps[i].fill_(step)
            self.scalars[i].fill_(rule.carry(scalar, step, group))
            if options.ema_decay is not None:
                weight = 1.0 - options.ema_decay if self.averaged[i] else 1.0
                ema, stored = self.read(i, EMA), self.read(i, "param")
                array(self.memory, slots[EMA])[...] = reference.ema(ema, stored, weight)
            self.averaged[i] = True
        self.taken += 1

    def _clipped(self, grad_name: str) -> reference.Clipped:
        """The norm of the gradients of that name, if it is measured, and the factor of each."""
        options = self.problem.options
        if not options.measures_norm:
            return reference.clip([], None, options.grad_scale)
        partials: list[list[Array]] = [[np.zeros(0)] for _ in self.problem.groups]
        for parameter, slots in zip(self.problem.parameters, self.problem.slots, strict=True):
            if parameter.has_grad:
                slot = slots[grad_name]
                grad = array(self.memory, slot)
                partials[parameter.group].append(reference.squared_norm_partials(grad, slot.dtype))
        squares = [reference.squared_norm(np.concatenate(of_group)) for of_group in partials]
        return reference.clip(squares, options.max_grad_norm, options.grad_scale)

    def read(self, index: int, name: str) -> NDArray[np.float32]:
        """One array of a parameter, widened: "param", a state's name or "grad 0"."""
        slot = self.problem.slots[index][name]
        return reference.load(array({slot.dtype: self.memory[slot.dtype].cpu()}, slot), slot.dtype)


# --- Comparison ----------------------------------------------------------------------------------

_INFINITY = {F32: 0x7F800000, BF16: 0x7F80, F16: 0x7C00}


def differing(x: torch.Tensor, y: torch.Tensor, dtype: str) -> NDArray[np.int64]:
    """Indices at which two arrays of bits differ; 0 is not -0, any NaN is any other."""
    a, b = x.cpu().numpy(), y.cpu().numpy()
    if np.array_equal(a, b):
        return np.zeros(0, np.int64)
    magnitude = np.iinfo(a.dtype).max
    nan = ((a & magnitude) > _INFINITY[dtype]) & ((b & magnitude) > _INFINITY[dtype])
    return np.flatnonzero((a != b) & ~nan)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are of one shape, dtype and, but for payloads of NaNs, content."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    dtype = str(x.dtype).removeprefix("torch.")
    a, b = (tensor.detach().reshape(-1).view(_BITS[dtype]) for tensor in (x, y))
    return not len(differing(a, b, dtype))


def differences(expected: State, found: State) -> list[str]:
    """A line for each of the first differing elements of two states of one problem."""
    problem = expected.problem
    lines = []
    for dtype in _BITS:
        bits, found_bits = expected.memory[dtype], found.memory[dtype]
        for place in differing(bits, found_bits, dtype)[:4].tolist():
            found_word, word = (
                x[place].item() & 2 ** (8 * x.itemsize) - 1 for x in (found_bits, bits)
            )
            lines.append(f"{_describe(problem, dtype, place)}: {found_word:#x}, not {word:#x}")
    for i in range(len(problem.parameters)):
        for name, there, values, found_values in (
            ("step", problem.rule.counts, expected.steps, found.steps),
            ("scalar", problem.rule.scalar, expected.scalars, found.scalars),
        ):
            if there and values[i] != found_values[i]:
                lines.append(f"{name} of {problem.name(i)}: {found_values[i]}, not {values[i]}")
    norm, found_norm = (state.measurements.grad_norm for state in (expected, found))
    if (norm is None) != (found_norm is None) or not (
        norm is None or found_norm is None or same_bits(norm, found_norm)
    ):
        lines.append(f"grad_norm: {found_norm}, not {norm}")
    return lines


def _describe(problem: Problem, dtype: str, place: int) -> str:
    for i, slots in enumerate(problem.slots):
        for slot in slots.values():
            if slot.dtype == dtype and slot.begin <= place < slot.begin + slot.numel:
                return f"{slot.name}[{place - slot.begin}] of {problem.name(i)}"
    return f"outside the arrays, word {place} of the {dtype} memory"


# --- Engines -------------------------------------------------------------------------------------

_LEVELS = ("baseline", "avx2", "avx512")
SIMD_LEVELS = _LEVELS[: _LEVELS.index(_C.simd_level()) + 1]


def _cpu(level: str, threads: int) -> Engine:
    return Engine(
        lambda bucket, hyperparameters: _C.update_cpu(bucket, threads, level),
        lambda bucket, sums: _C.square_sums_cpu(bucket, sums.data_ptr(), threads, level),
    )


def by_name(name: str) -> Engine:
    """The engine that users call by this name."""
    return Engine(
        lambda bucket, values: engine_for(name, device_of(bucket)).update(bucket, values),
        lambda bucket, sums: engine_for(name, device_of(bucket)).square_sums(bucket, sums),
    )


CPU_ENGINES: dict[str, Engine] = {
    f"cpu {level} {threads} threads": _cpu(level, threads)
    for level in SIMD_LEVELS
    for threads in (1, 2)
}
HOST_ENGINES: dict[str, Engine] = {**CPU_ENGINES, "cuda-on-host": by_name("cuda-on-host")}

# The reference as users choose it: through the library, unlike `State.step_by_reference`.
REFERENCE_ENGINE: dict[str, Engine] = {"reference": by_name("reference")}

# Empty where Triton is missing, or compiles for a GPU and cannot work on host memory.
TRITON_ENGINES: dict[str, Engine] = (
    {"triton": by_name("triton")} if unavailable_reason() is None and interpreted() else {}
)

Schedule: TypeAlias = Callable[[int], Sequence[Group]]


def assert_same_bits(
    problem: Problem,
    engines: Mapping[str, Engine] = HOST_ENGINES,
    after: Sequence[int] = (1,),
    schedule: Schedule | None = None,
) -> None:
    """Steps each engine beside the float32 reference and compares all bits.

    Args:
        problem: what they work on.
        engines: the engines.
        after: numbers of steps after which to compare.
        schedule: from the number of a step, counted from 1, to the groups' hyperparameters then.
    """
    expected = State(problem)
    states = {name: State(problem) for name in engines}
    for step in range(1, max(after) + 1):
        groups = None if schedule is None else schedule(step)
        expected.step_by_reference(groups)
        for name, state in states.items():
            state.step(engines[name], groups)
            if step in after and (lines := differences(expected, state)):
                raise AssertionError("\n".join([f"{name} after {step} steps:", *lines]))
