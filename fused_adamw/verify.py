"""Runs every engine against the reference on random problems: ``python -m fused_adamw verify``."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fused_adamw
from fused_adamw import _C, reference
from fused_adamw.engines import engine_status
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.precision import STATE_KINDS, decoded_states, full_value

SHAPES = ((1000,), (64, 33), (7,), (), (0, 3), (16385,))
# Dtypes of the parameter and its gradient, and how they are kept, for every storage format.
STORAGES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("bfloat16", "bfloat16", {"stochastic_rounding": True}),
    ("bfloat16", "float32", {"stochastic_rounding": True, "state_dtype": torch.float32}),
    ("bfloat16", "bfloat16", {"precision": "master"}),
    ("float16", "float32", {"precision": "master"}),
    ("bfloat16", "bfloat16", {"precision": "split"}),
    ("bfloat16", "float32", {"precision": "split", "state_dtype": torch.bfloat16}),
    ("bfloat16", "bfloat16", {"precision": "kahan"}),
    ("bfloat16", "bfloat16", {"precision": "8bit"}),
    ("bfloat16", "float32", {"precision": "8bit", "remainder_bits": 16}),
    ("float32", "float32", {"precision": "8bit"}),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOUD = {"lr": 0.1, "weight_decay": 0.1}
# Of every rule its class and the options under which engines run other code.
OPTIMIZERS: tuple[tuple[type[FusedOptimizer], Mapping[str, Any]], ...] = (
    *((fused_adamw.FusedAdamW, {"amsgrad": amsgrad}) for amsgrad in (False, True)),
    (fused_adamw.FusedNadamW, {}),
    *((fused_adamw.FusedSGD, {"momentum": momentum}) for momentum in (0.0, 0.9)),
    *(
        (fused_adamw.FusedRMSprop, {"centered": centered, "momentum": momentum})
        for centered in (False, True)
        for momentum in (0.0, 0.9)
    ),
    (fused_adamw.FusedAdagrad, {}),
    (fused_adamw.FusedAdadelta, {}),
    (fused_adamw.FusedAdamax, {}),
    (fused_adamw.FusedLion, {}),
)


@dataclass
class Outcome:
    """What some steps have left, on the CPU.

    Attributes:
        written: every parameter and state, in one order.
        params: the parameters.
        before: the parameters before the last step.
        true: the parameters after it in float64, from what an engine then had.
    """

    written: list[Tensor]
    params: list[Tensor]
    before: list[Tensor]
    true: list[NDArray[np.float64]]


@dataclass(frozen=True)
class Problem:
    """An optimizer, its convention of decay and the storage format of its arrays."""

    make: type[FusedOptimizer]
    options: Mapping[str, Any]
    decay: str
    param: str
    grad: str
    storage: Mapping[str, Any]  # options
    seed: int

    def run(self, engine: str, device: str) -> Outcome:
        """Two steps with random gradients, of magnitudes from 1e-3 to 10."""
        param, grad = DTYPES[self.param], DTYPES[self.grad]
        generator = torch.Generator().manual_seed(self.seed)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator)

        params = [normal(shape).to(param).to(device).requires_grad_() for shape in SHAPES]
        make: Any = self.make
        optimizer: FusedOptimizer = make(
            params, engine=engine, decay=self.decay, **self.storage, **LOUD, **self.options
        )
        for step in range(2):
            for tensor, shape in zip(params, SHAPES, strict=True):
                scale = 10.0 ** (4 * torch.rand(shape, generator=generator) - 3)
                tensor.grad_dtype = grad
                tensor.grad = (normal(shape) * scale).to(grad).to(device)
            if step == 1:
                before = [tensor.detach().cpu().clone() for tensor in params]
                true = [_true_param(optimizer, i) for i in range(len(params))]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no scaler drives float16
                optimizer.step()
        found = [tensor.detach().cpu() for tensor in params]
        states = (optimizer.state.get(tensor, {}).values() for tensor in params)
        written = [*found, *(value.cpu() for value in chain.from_iterable(states))]
        return Outcome(written, found, before, true)


def _true_param(optimizer: FusedOptimizer, index: int) -> NDArray[np.float64]:
    """The parameter after the next step, in float64 throughout."""
    (group,) = optimizer.param_groups
    param = group["params"][index]
    hyperparameters = optimizer._hyperparameters(group)
    state = optimizer.state.get(param, {})
    names = optimizer._state_names(group)
    states = decoded_states(state, names, [STATE_KINDS[name] for name in names])
    value = full_value(param, optimizer._layout(group, index), state)
    arrays = [value, param.grad, *(states[name] for name in names)]
    position: dict[str, Any] = {"step": int(state["step"]) + 1 if "step" in state else 2}
    if optimizer._scalar is not None:
        position["scalar"] = float(state[optimizer._scalar])
    updated = reference.update(
        hyperparameters.rule,
        *(array.double().cpu().numpy() for array in arrays if array is not None),
        dtype=np.float64,
        **position,
        **hyperparameters.values,
    )
    return updated[0]


def _problems(seed: int) -> Iterator[Problem]:
    for make, options in OPTIMIZERS:
        for param, grad, state in _C.FORMATS:
            for decay in _C.DECAYS:
                plain = {"state_dtype": DTYPES[state]}
                yield Problem(make, options, decay, param, grad, plain, seed)
        for param, grad, storage in STORAGES:
            yield Problem(make, options, "lr", param, grad, storage, seed)


def _mismatches(found: Tensor, expected: Tensor) -> int:
    """How many elements differ in any bit; a NaN equals a NaN."""
    if not found.is_floating_point():
        return int((found != expected).sum())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    differs = found.view(integer) != expected.view(integer)
    return int((differs & ~(found.isnan() & expected.isnan())).sum())


def _ulps(outcome: Outcome) -> float:
    """The largest error, in units of the last place of the parameter before or after the step.

    Of the larger of the two, since where a step takes a parameter close to zero the rounding of
    what was subtracted remains.
    """
    largest = 0.0
    for before, found, true in zip(outcome.before, outcome.params, outcome.true, strict=True):
        if not found.numel():
            continue
        info = torch.finfo(found.dtype)
        magnitude = np.maximum(np.maximum(np.abs(true), before.double().abs().numpy()), info.tiny)
        spacing = np.exp2(np.floor(np.log2(magnitude))) * info.eps
        largest = max(largest, float(np.max(np.abs(found.double().numpy() - true) / spacing)))
    return largest


def _engines() -> Iterator[tuple[str, str, str]]:
    """Names to show, engines and the devices on which they are tried."""
    for engine, reason in engine_status().items():
        if reason is None and engine != "reference":
            on_gpu = engine == "cuda" or (engine == "triton" and torch.cuda.is_available())
            yield engine, engine, "cuda" if on_gpu else "cpu"
    yield "cuda body on host", "cuda-on-host", "cpu"


def main(seed: int = 0) -> int:
    """Prints a row for each engine and rule; 1 if any bit differs from the reference.

    Args:
        seed: of the random problems.
    """
    conventions = ", ".join(_C.DECAYS)
    formats = len(_C.FORMATS) + len(STORAGES)
    print(f"two steps on random problems, seed {seed}, of {formats} storage formats")
    print(f"and the conventions of decay {conventions}\n")
    print("mismatches: values that differ from the float32 reference in any bit")
    print("ulps: largest error of a parameter against float64, in units of its last place\n")
    columns = "{:18s} {:10s} {:>9} {:>11} {:>6}"
    print(columns.format("engine", "rule", "values", "mismatches", "ulps"))
    problems = list(_problems(seed))
    expected = [problem.run("reference", "cpu") for problem in problems]
    bad = 0
    for name, engine, device in _engines():
        totals: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
        for problem, reference_outcome in zip(problems, expected, strict=True):
            outcome = problem.run(engine, device)
            row = totals[problem.make._rule]
            for found, wanted in zip(outcome.written, reference_outcome.written, strict=True):
                row[0] += found.numel()
                row[1] += _mismatches(found, wanted)
            row[2] = max(row[2], _ulps(outcome))
        for rule, (values, mismatches, ulps) in totals.items():
            bad += int(mismatches)
            print(columns.format(name, rule, int(values), int(mismatches), f"{ulps:.2f}"))
    print(f"\n{bad} values differ" if bad else "\nevery bit equals the reference")
    return int(bad > 0)
