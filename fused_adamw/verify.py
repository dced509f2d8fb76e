"""Runs every engine against the reference on random problems: ``python -m fused_adamw verify``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fused_adamw import _C, functional, reference
from fused_adamw.engines import engine_status

SHAPES = ((1000,), (64, 33), (7,), (), (0, 3), (16385,))
LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 0.1, 0.9, 0.99, 1e-3, 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass
class Lists:
    """The tensors of one problem, as `functional.adamw` takes them."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]  # one list for each of STATES
    steps: list[Tensor]

    def to(self, device: str) -> Lists:
        """A copy on another device; step counts stay on the CPU."""

        def copies(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.to(device, copy=True) for tensor in tensors]

        return Lists(
            copies(self.params),
            copies(self.grads),
            [copies(state) for state in self.states],
            [step.clone() for step in self.steps],
        )

    def written(self) -> Iterator[Tensor]:
        """The tensors that a step writes, on the CPU."""
        for tensors in (self.params, *self.states):
            yield from (tensor.cpu() for tensor in tensors)


@dataclass(frozen=True)
class Problem:
    """What one row of the table runs."""

    dtypes: tuple[str, str, str]  # parameter, gradient, states
    decay: str
    amsgrad: bool

    def draw(self, generator: torch.Generator) -> Lists:
        """Normal values; gradient and moments of one magnitude, between 1e-3 and 10, an element."""
        param, grad, state = (DTYPES[dtype] for dtype in self.dtypes)

        def normal() -> list[Tensor]:
            return [torch.randn(shape, generator=generator) for shape in SHAPES]

        scales = [10.0 ** (4 * torch.rand(shape, generator=generator) - 3) for shape in SHAPES]

        def scaled() -> list[Tensor]:
            return [value * scale for value, scale in zip(normal(), scales, strict=True)]

        squares = [value.square().to(state) for value in scaled()]
        return Lists(
            [value.to(param) for value in normal()],
            [value.to(grad) for value in scaled()],
            [[value.to(state) for value in scaled()], squares, [s.clone() for s in squares]],
            [torch.tensor(float(i)) for i in range(len(SHAPES))],
        )

    def step(self, lists: Lists, engine: str) -> None:
        """One step in place."""
        functional.adamw(
            lists.params,
            lists.grads,
            lists.states[0],
            lists.states[1],
            lists.states[2],
            lists.steps,
            amsgrad=self.amsgrad,
            beta1=BETA1,
            beta2=BETA2,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            eps=EPS,
            maximize=False,
            decay=self.decay,
            engine=engine,
        )

    def true_params(self, before: Lists) -> Iterator[NDArray[np.float64]]:
        """The parameters after the step, in float64 throughout."""
        states = before.states if self.amsgrad else before.states[:2]
        for i, param in enumerate(before.params):
            arrays = [t[i].double().numpy() for t in (before.params, before.grads, *states)]
            yield reference.adamw(
                *arrays,
                step=int(before.steps[i]) + 1,
                lr=LR,
                beta1=BETA1,
                beta2=BETA2,
                eps=EPS,
                weight_decay=WEIGHT_DECAY,
                decay=self.decay,
                dtype=np.float64,
            ).param.reshape(param.shape)


def _problems() -> Iterator[Problem]:
    for dtypes in _C.FORMATS:
        for decay in _C.DECAYS:
            for amsgrad in (False, True):
                yield Problem(dtypes, decay, amsgrad)


def _mismatches(found: Tensor, expected: Tensor) -> int:
    """How many elements differ in any bit; a NaN equals a NaN."""
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    differs = found.view(integer) != expected.view(integer)
    return int((differs & ~(found.isnan() & expected.isnan())).sum())


def _ulps(before: Tensor, found: Tensor, true: NDArray[np.float64]) -> float:
    """The largest error, in units of the last place of the parameter before or after the step.

    Of the larger of the two, since where a step takes a parameter close to zero the rounding of
    what was subtracted remains.
    """
    if not found.numel():
        return 0.0
    info = torch.finfo(found.dtype)
    magnitude = np.maximum(np.maximum(np.abs(true), before.double().abs().numpy()), info.tiny)
    spacing = np.exp2(np.floor(np.log2(magnitude))) * info.eps
    return float(np.max(np.abs(found.double().numpy() - true) / spacing))


def _engines() -> Iterator[tuple[str, str, str]]:
    """Names to show, engines and the devices on which they are tried."""
    for engine, reason in engine_status().items():
        if reason is None:
            on_gpu = engine == "cuda" or (engine == "triton" and torch.cuda.is_available())
            yield engine, engine, "cuda" if on_gpu else "cpu"
    yield "cuda body on host", "cuda-on-host", "cpu"


def main(seed: int = 0) -> int:
    """Prints a row for each engine and storage format; 1 if any bit differs from the reference.

    Args:
        seed: of the random problems.
    """
    print(
        f"one step on random problems, seed {seed}; decay {', '.join(_C.DECAYS)}; amsgrad on, off"
    )
    print("mismatches: values that differ from the float32 reference in any bit")
    print("ulps: largest error of a parameter against float64, in units of its last place\n")
    columns = "{:18s} {:28s} {:>8} {:>11} {:>6}"
    print(columns.format("engine", "param/grad/states", "values", "mismatches", "ulps"))
    bad = 0
    for name, engine, device in _engines():
        totals: dict[tuple[str, str, str], tuple[int, int, float]] = {}
        for index, problem in enumerate(_problems()):
            before = problem.draw(torch.Generator().manual_seed(seed * 1000 + index))
            expected, lists = before.to("cpu"), before.to(device)
            problem.step(expected, "reference")
            problem.step(lists, engine)
            pairs = list(zip(lists.written(), expected.written(), strict=True))
            params = zip(before.params, lists.params, problem.true_params(before), strict=True)
            values, mismatches, ulps = totals.get(problem.dtypes, (0, 0, 0.0))
            totals[problem.dtypes] = (
                values + sum(found.numel() for found, _ in pairs),
                mismatches + sum(_mismatches(found, other) for found, other in pairs),
                max(ulps, *(_ulps(old, found.cpu(), true) for old, found, true in params)),
            )
        for dtypes, (values, mismatches, ulps) in totals.items():
            bad += mismatches
            print(columns.format(name, "/".join(dtypes), values, mismatches, f"{ulps:.2f}"))
    print(f"\n{bad} values differ" if bad else "\nevery bit equals the reference")
    return int(bad > 0)
