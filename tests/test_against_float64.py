"""Every engine against the truth and against torch, within errors that are derived.

`error_bounds` gives an interval around the float64 truth that an engine's float32 arithmetic cannot
leave. The intervals are narrow: the tests here also show that AdamW with any of the usual mistakes
lies outside of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from error_bounds import Bounded, bound_ratio, bounded_update
from numpy.typing import NDArray
from problems import (
    ADAM,
    FORMATS,
    HOST_ENGINES,
    REFERENCE_ENGINE,
    RULES,
    TRITON_ENGINES,
    Format,
    Parameter,
    Problem,
    Rule,
    State,
    array,
)

import fused_adamw
from fused_adamw import reference

Array = NDArray[Any]
ENGINES = HOST_ENGINES | REFERENCE_ENGINE | TRITON_ENGINES
STEPS = 10
TORCH_STEPS = 5


def bounds_after_each_step(problem: Problem, index: int, steps: int) -> list[Sequence[Bounded]]:
    """The truth about a parameter and its states, with bounds, after 1, 2, ... steps."""
    parameter, start = problem.parameters[index], State(problem)
    group = problem.groups[parameter.group]
    arrays: Sequence[Any] = [
        start.read(index, name) for name in ("param", *problem.rule.states(group))
    ]
    found, rule, scalar = [], problem.rule, float(start.scalars[index])
    for step in range(steps):
        param, *states = arrays
        t = parameter.step + step + 1
        arrays = bounded_update(
            rule.name,
            param,
            start.read(index, f"grad {step % problem.gradients}"),
            *states,
            **rule.position(t, scalar),
            param_dtype=parameter.dtypes[0],
            state_dtype=parameter.dtypes[2],
            **group,
        )
        scalar = rule.carry(scalar, t, group)
        found.append(arrays)
    return found


@pytest.mark.parametrize("dtypes", FORMATS, ids="-".join)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_engines_are_within_the_bound(rule: Rule, dtypes: Format) -> None:
    groups = rule.groups()
    parameters = [Parameter(60, dtypes, group, step=group % 3) for group in range(len(groups))]
    problem = Problem(rule, groups, parameters, gradients=3)
    bounds = [bounds_after_each_step(problem, i, STEPS) for i in range(len(parameters))]
    for name, engine in ENGINES.items():
        state = State(problem)
        for step in range(STEPS if engine not in TRITON_ENGINES.values() else 1):
            state.step(engine)
            for i, group in enumerate(groups):
                names = ("param", *rule.states(group))
                for slot, bounded in zip(names, bounds[i][step], strict=True):
                    ratio = bound_ratio(state.read(i, slot), bounded)
                    assert ratio <= 1, f"{name}, step {step + 1}, {slot} of {problem.name(i)}"
    for i, group in enumerate(groups):
        # What is left of a second moment after a mean's square may vanish, and its root's bound is
        # then that of no digit at all.
        least = 0.7 if group.get("centered") else 1.0
        for bounded in (bound for arrays in bounds[i] for bound in arrays):
            assert np.isfinite(bounded.error).mean() >= least, "a bound that admits anything"


# --- Mistakes ------------------------------------------------------------------------------------

# What is wrong, and the options under which it makes a difference.
MISTAKES: dict[str, dict[str, Any]] = {
    "decay after the step": {"decay": "lr"},
    "decay without the schedule multiplier": {"decay": "lr"},
    "decay without the learning rate": {"decay": "lr"},
    "decay of L2": {"decay": "lr"},
    "no decay": {"decay": "lr"},
    "paper's decay after the step": {"decay": "decoupled"},
    "proximal decay before the step": {"decay": "proximal"},
    "L2 before the sign": {"decay": "l2", "maximize": True},
    "first moment not corrected": {},
    "second moment not corrected": {},
    "step counted from 0": {},
    "step one ahead": {},
    "eps inside the root": {},
    "eps before the correction": {},
    "moments of the last step": {},
    "betas swapped": {},
    "gradient not squared": {},
    "maximum not used": {"amsgrad": True},
    "maximum of the last step": {"amsgrad": True},
    "sign not changed": {"maximize": True},
}


def step_with_mistake(
    mistake: str | None,
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    x: Array,
    *,
    t: int,
    h: dict[str, Any],
) -> Array:
    """The parameter after one step of AdamW in float64, as in textbooks, but for a mistake."""
    lr, eps, wd, eta = h["lr"], h["eps"], h["weight_decay"], h["schedule_multiplier"]
    beta1, beta2 = h["beta1"], h["beta2"]
    decay = h["decay"]
    if mistake == "betas swapped":
        beta1, beta2 = beta2, beta1
    if mistake == "decay of L2":
        decay = "l2"

    sign = -1 if h["maximize"] and mistake != "sign not changed" else 1
    if decay == "l2":
        g = sign * (g + wd * p) if mistake == "L2 before the sign" else sign * g + wd * p
    else:
        g = sign * g

    old_m, old_v, old_x = m, v, x
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (np.abs(g) if mistake == "gradient not squared" else g**2)
    x = np.maximum(x, v)
    if mistake == "moments of the last step":
        m, v, x = old_m, old_v, old_x
    w = x if h["amsgrad"] and mistake != "maximum not used" else v
    if mistake == "maximum of the last step":
        w = old_x

    t += {"step counted from 0": -1, "step one ahead": 1}.get(str(mistake), 0)
    bias1 = 1 if mistake == "first moment not corrected" else 1 - beta1**t
    bias2 = 1 if mistake == "second moment not corrected" else 1 - beta2**t
    if mistake == "eps inside the root":
        denominator = np.sqrt(w / bias2 + eps)
    elif mistake == "eps before the correction":
        denominator = (np.sqrt(w) + eps) / math.sqrt(bias2)
    else:
        denominator = np.sqrt(w / bias2) + eps
    moved = eta * lr * (m / bias1) / denominator

    if decay == "l2" or mistake == "no decay":
        return p - moved
    if decay == "proximal":
        shrunk = 1 / (1 + eta * wd)
        return (
            shrunk * p - moved
            if mistake == "proximal decay before the step"
            else shrunk * (p - moved)
        )
    lost = eta * wd * (lr if decay == "lr" else 1)
    if mistake == "decay without the schedule multiplier":
        lost = lr * wd
    elif mistake == "decay without the learning rate":
        lost = eta * wd
    after = mistake in ("decay after the step", "paper's decay after the step")
    return (1 - lost) * (p - moved) if after else (1 - lost) * p - moved


def ratios(mistake: str | None, options: dict[str, Any]) -> Array:
    """Distances from the truth in units of the bound, element by element."""
    group = {**ADAM.loud, "decay": "lr", "amsgrad": False, "maximize": False, **options}
    problem = Problem(ADAM, [group], [Parameter(500, step=4)])
    start = State(problem)
    names = ("param", "grad 0", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    arrays = [
        start.read(0, name).astype(np.float64) if name in problem.slots[0] else np.zeros(500)
        for name in names
    ]
    found = step_with_mistake(mistake, *arrays, t=5, h=group)
    bounded = bounds_after_each_step(problem, 0, 1)[0][0]
    return np.asarray(np.abs(found - bounded.value) / bounded.error)


@pytest.mark.parametrize(("decay", "amsgrad", "maximize"), list(product(*ADAM.options.values())))
def test_textbook_is_within_the_bound(decay: str, amsgrad: bool, maximize: bool) -> None:
    options = {"decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    assert ratios(None, options).max() <= 1


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_outside_the_bound(mistake: str) -> None:
    """Far outside wherever they have an effect: everywhere, or on about half with a maximum."""
    distances = ratios(mistake, MISTAKES[mistake])
    affected = distances > 1e-3  # two float64 results are far closer where nothing differs
    assert affected.mean() > 0.4
    assert np.median(distances[affected]) > 30


# --- torch ---------------------------------------------------------------------------------------


class TorchBounds:
    """torch's AdamW and Adam (`foreach=False`) in the arithmetic of bounds, operation by operation.

    Its float32 result is then within its own bounds, ours within ours, and so the distance of the
    two within the sum: a tolerance with nothing to choose. Where torch's kernels fuse a product
    and a sum, they round less often than is counted here.
    """

    def __init__(self, param: Array, **hyperparameters: Any) -> None:
        zeros = np.zeros_like(param)
        self.param = Bounded.exact(param)
        self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq = map(Bounded.exact, (zeros,) * 3)
        self.step = 0
        self.h = hyperparameters

    def update(self, grad: Array) -> None:
        h, p, g = self.h, self.param, Bounded.exact(grad)
        beta1, beta2 = h["betas"]
        self.step += 1
        if h["maximize"]:
            g = -g
        if h["decoupled"]:
            p = p * _scalar(1 - h["lr"] * h["weight_decay"])
        else:
            g = g + _scalar(h["weight_decay"]) * p
        self.exp_avg = self.exp_avg + _scalar(1 - beta1) * (g - self.exp_avg)
        self.exp_avg_sq = self.exp_avg_sq * _scalar(beta2) + _scalar(1 - beta2) * g * g
        self.max_exp_avg_sq = self.max_exp_avg_sq.maximum(self.exp_avg_sq)
        w = self.max_exp_avg_sq if h["amsgrad"] else self.exp_avg_sq
        root_of_bias2 = math.sqrt(1 - beta2**self.step)
        denominator = w.sqrt() / _scalar(root_of_bias2) + _scalar(h["eps"])
        step_size = h["lr"] / (1 - beta1**self.step)
        self.param = p - _scalar(step_size) * self.exp_avg / denominator


def _scalar(value: float) -> Bounded:
    return Bounded.coefficient(np.float64(value))


TORCH_ENGINES = ["cpu", "cuda-on-host", "reference", *TRITON_ENGINES]


def draw_steady(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Any:
    """Numbers of either sign and of size 1/8 to 2."""
    values = rng.choice([-1, 1], numel) * rng.uniform(0.125, 2, numel)
    return reference.store(values.astype(np.float32), dtype)


@pytest.mark.parametrize("eps", [1e-3, 1e-8])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decay", ["lr", "decoupled", "l2"])
def test_engines_are_torch_to_rounding(
    decay: str, amsgrad: bool, maximize: bool, eps: float
) -> None:
    """From zero states: the decay alone moves a parameter 100 times as far as the tolerance."""
    group = {**ADAM.loud, "schedule_multiplier": 1.0, "eps": eps}
    group |= {"decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    problem = Problem(ADAM, [group], [Parameter(200)], draw_steady, gradients=TORCH_STEPS)
    for name in ADAM.states(group):
        array(problem.memory, problem.slots[0][name])[...] = 0
    start = State(problem)
    ours = {
        "betas": (group["beta1"], group["beta2"]),
        **{name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")},
    }
    # torch has the learning rate in its decay; the other convention has it not.
    without_lr = {"weight_decay": group["weight_decay"] / group["lr"]}
    theirs = ours | (without_lr if decay == "decoupled" else {}) | {"foreach": False}
    torch_class = torch.optim.Adam if decay == "l2" else torch.optim.AdamW

    def optimize(make: Any, dtype: torch.dtype, **keywords: Any) -> list[Array]:
        param = torch.tensor(start.read(0, "param"), dtype=dtype, requires_grad=True)
        optimizer = make([param], **keywords)
        after = []
        for step in range(TORCH_STEPS):
            param.grad = torch.tensor(start.read(0, f"grad {step}"), dtype=dtype)
            optimizer.step()
            after.append(param.detach().to(torch.float64, copy=True).numpy())
        return after

    float32 = optimize(torch_class, torch.float32, **theirs)
    float64 = optimize(torch_class, torch.float64, **theirs)
    results = {
        name: optimize(fused_adamw.FusedAdamW, torch.float32, engine=name, decay=decay, **ours)
        for name in TORCH_ENGINES
    }
    truths = [arrays[0] for arrays in bounds_after_each_step(problem, 0, TORCH_STEPS)]
    torch_bounds = TorchBounds(start.read(0, "param"), decoupled=decay != "l2", **theirs)
    for step in range(TORCH_STEPS):
        torch_bounds.update(start.read(0, f"grad {step}"))
        our_error, torch_error = truths[step].error, torch_bounds.param.error
        slack = 2.0**-40 * (1 + np.abs(float64[step]))  # far above what parts two float64 results
        assert np.all(np.abs(float64[step] - truths[step].value) <= slack)
        assert np.all(np.abs(float32[step] - float64[step]) <= torch_error + slack)
        for name, found in results.items():
            assert np.all(np.abs(found[step] - float64[step]) <= our_error + slack), name
            assert np.all(np.abs(found[step] - float32[step]) <= our_error + torch_error), name
    decayed = (group["lr"] if decay == "lr" else 1) * group["weight_decay"]
    assert np.all(our_error + torch_error < decayed * np.abs(start.read(0, "param")) / 100)
