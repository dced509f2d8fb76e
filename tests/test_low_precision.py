"""`precision=` of every optimizer: training, random bits, checkpoints, memory, what is refused.

That formats store the right bits is tested apart, of the reference and in torch: a step must be the
float32 step between decoding and encoding, whatever else the optimizer does.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from drawn_training import assert_same_to_rounding, saved
from family import CLASSES
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fused_adamw import (
    FusedAdadelta,
    FusedAdagrad,
    FusedAdam,
    FusedAdamax,
    FusedAdamProx,
    FusedAdamW,
    FusedLion,
    FusedNadam,
    FusedNadamW,
    FusedRMSprop,
    FusedSGD,
    FusedSGDW,
    master_parameters,
    reference,
    schedules,
    step_in_backward,
)
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.precision import (
    BESIDE_KEYS,
    BLOCK,
    LEAST_CODED,
    PRECISIONS,
    STATE_KINDS,
    Layout,
    beside_of,
    code_key,
    in_memory_order,
    layout_of,
    scale_key,
    stored_state,
)
from fused_adamw.registration import RegisteredList
from fused_adamw.whole_step import EMA

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIGMAS = 6.0


class Kept(NamedTuple):
    """A format: dtype of the parameters, and the options that ask for it."""

    dtype: torch.dtype
    options: dict[str, Any]

    def layout(self, numel: int = LEAST_CODED) -> Layout:
        return layout_of(self.dtype, numel, **{"precision": None, **self.options})


FORMATS = {
    "fp32": Kept(F32, {"precision": "fp32"}),
    "fp32 bf16": Kept(F32, {"state_dtype": BF16}),
    "fp32 8bit": Kept(F32, {"precision": "8bit"}),
    "bf16": Kept(BF16, {"precision": "bf16"}),
    "bf16 fp32": Kept(BF16, {"precision": "bf16", "state_dtype": F32}),
    "stochastic": Kept(BF16, {"precision": "bf16", "stochastic_rounding": True}),
    "stochastic fp32": Kept(BF16, {"stochastic_rounding": True, "state_dtype": F32}),
    "fp16": Kept(F16, {}),
    "fp16 master": Kept(F16, {"precision": "master"}),
    "master": Kept(BF16, {"precision": "master"}),
    "split": Kept(BF16, {"precision": "split"}),
    "split bf16": Kept(BF16, {"precision": "split", "state_dtype": BF16}),
    "kahan": Kept(BF16, {"precision": "kahan"}),
    "8bit": Kept(BF16, {"precision": "8bit"}),
    "8bit 16": Kept(BF16, {"precision": "8bit", "remainder_bits": 16}),
}
DRAWING = ("stochastic", "stochastic fp32", "8bit")


class Case(NamedTuple):
    """An optimizer and hyperparameters that are loud."""

    cls: Any
    options: dict[str, Any]


ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
SLOW = {"lr": 0.01, "weight_decay": 0.1}
CASES = {
    "AdamW": Case(FusedAdamW, ADAM),
    "AdamW amsgrad": Case(FusedAdamW, {**ADAM, "amsgrad": True}),
    "Adam": Case(FusedAdam, ADAM),
    "AdamProx": Case(FusedAdamProx, {**ADAM, "weight_decay": 0.01}),
    "Nadam": Case(FusedNadam, {**ADAM, "momentum_decay": 0.1}),
    "NadamW": Case(FusedNadamW, ADAM),
    "SGD": Case(FusedSGD, SLOW),
    "SGD Nesterov": Case(FusedSGD, {**SLOW, "momentum": 0.9, "nesterov": True}),
    "SGDW": Case(FusedSGDW, {"lr": 0.01, "weight_decay": 0.01}),
    "RMSprop": Case(FusedRMSprop, {**SLOW, "alpha": 0.9, "eps": 1e-2}),
    "RMSprop momentum": Case(FusedRMSprop, {**SLOW, "alpha": 0.9, "eps": 1e-2, "momentum": 0.9}),
    "RMSprop centered": Case(FusedRMSprop, {**SLOW, "alpha": 0.9, "eps": 1e-2, "centered": True}),
    "Adagrad": Case(FusedAdagrad, {**SLOW, "lr": 0.1, "initial_accumulator_value": 0.5}),
    "Adadelta": Case(FusedAdadelta, {"lr": 1.0, "rho": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
    "Adamax": Case(FusedAdamax, ADAM),
    "Lion": Case(FusedLion, SLOW),
}
# Of each kind of state one, and a rule that carries a number.
FEW_CASES = ("AdamW amsgrad", "Adamax", "Nadam")

every_case = pytest.mark.parametrize("case", CASES)
few_cases = pytest.mark.parametrize("case", FEW_CASES)
every_format = pytest.mark.parametrize("name", FORMATS)


def test_no_class_is_left_out() -> None:
    assert {case.cls for case in CASES.values()} == set(CLASSES)


# --- Training ------------------------------------------------------------------------------------

# Coded: whole blocks (transposed in memory), and a ragged last one. Not coded, and no elements.
SHAPES = [(64, 65), (61, 71), (7, 11), (), (0, 4)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_params(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """The same values at every call."""
    values = [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    values[0] = values[0].t().contiguous().t()
    return [nn.Parameter(x) for x in values]


def new(case: str, name: str, params: Sequence[Tensor], **options: Any) -> FusedOptimizer:
    cls, hyperparameters = CASES[case]
    optimizer: FusedOptimizer = cls(params, **hyperparameters, **FORMATS[name].options, **options)
    return optimizer


def set_grads(params: Sequence[Tensor], step: int) -> None:
    """The gradients of one step, numbers of bfloat16 in every dtype."""
    for i, param in enumerate(params):
        grad = normal(*param.shape, seed=100 + 10 * step + i).to(BF16)
        param.grad = grad.to(param.dtype)


def train(optimizer: FusedOptimizer, params: Sequence[Tensor], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    tensor = tensor.detach()
    return (
        tensor.dtype,
        tensor.stride(),
        in_memory_order(tensor).view(torch.uint8).numpy().tobytes(),
    )


def everything(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> dict[str, Any]:
    """All bits of parameters and states, and the values of groups that steps change."""
    found: dict[str, Any] = {}
    states = vars(optimizer)["state"]  # as it is, without new lists
    for i, param in enumerate(params):
        found[f"param {i}"] = bits(param)
        for key, value in states.get(param, {}).items():
            found[f"{key} {i}"] = bits(value) if isinstance(value, Tensor) else value
    for i, group in enumerate(optimizer.param_groups):
        for key in ("schedule_step", "schedule_multiplier", "seed"):
            found[f"{key} of group {i}"] = group[key]
    return found


def layouts_of(optimizer: FusedOptimizer) -> list[Layout]:
    return [layout for _, _, layout in optimizer._layouts()]


def names_of(optimizer: FusedOptimizer) -> tuple[str, ...]:
    return optimizer._state_names(optimizer.param_groups[0])


def run(case: str, name: str, steps: int = 3, **options: Any) -> dict[str, Any]:
    params = make_params(FORMATS[name].dtype)
    optimizer = new(case, name, params, **options)
    train(optimizer, params, range(steps))
    return everything(optimizer, params)


@every_format
@every_case
def test_engines_have_the_same_bits(case: str, name: str) -> None:
    """With all that a step may do beside its rule."""
    options = {"max_grad_norm": 50.0, "ema_decay": 0.9, "seed": 3}
    assert run(case, name, engine="cpu", **options) == run(
        case, name, engine="reference", **options
    )


def as_float32(case: str, optimizer: FusedOptimizer) -> tuple[FusedOptimizer, list[Tensor]]:
    """An optimizer of float32 where the given one is, by way of what a user can have."""
    params: list[Tensor] = [nn.Parameter(x) for x in master_parameters(optimizer)]
    found = new(case, "fp32", params)
    if optimizer.state:
        found.load_state_dict(optimizer.export_fp32_state())
    return found, params


def assert_between(stored: Tensor, x: Tensor, dropped: int) -> None:
    """A number is a neighbour of x without its last bits; both are float32."""
    apart = (stored.view(torch.int32) >> dropped) - (x.view(torch.int32) >> dropped)
    assert ((apart == 0) | (apart == 1)).all()
    assert not (stored.view(torch.int32) & (1 << dropped) - 1).any()


@every_format
@every_case
def test_a_step_is_that_of_float32_between_decoding_and_encoding(case: str, name: str) -> None:
    params = make_params(FORMATS[name].dtype)
    optimizer = new(case, name, params)
    for step in range(3):
        plain, values = as_float32(case, optimizer)
        set_grads(values, step)
        plain.step()
        train(optimizer, params, range(step, step + 1))
        for param, value, layout in zip(params, values, layouts_of(optimizer), strict=True):
            state, x = optimizer.state[param], value.detach()
            stored, array = beside_of(x, layout, param)
            if layout.stochastic:
                assert_between(param.detach().float(), x, 16)
            elif layout.beside == "remainder8":
                (full,) = (
                    full
                    for full, p in zip(master_parameters(optimizer), params, strict=True)
                    if p is param
                )
                assert_between(full, x, 8)
                assert torch.equal(beside_of(full, layout, param)[0], param)
            else:
                assert bits(param) == bits(stored)
                if array is not None:
                    assert bits(state[layout.beside_key]) == bits(array)
            for key in names_of(optimizer):
                number = plain.state[value][key]
                if layout.stochastic and layout.state_dtype == BF16:
                    assert_between(state[key].float(), number, 16)
                    continue
                for entry, wanted in stored_state(key, number, STATE_KINDS[key], layout).items():
                    assert bits(state[entry]) == bits(wanted)


def drawn_grads(steps: int, numel: int) -> Tensor:
    return normal(steps, numel, seed=5).to(BF16)


@pytest.mark.parametrize(("states", "steps"), [(F32, 1000), (BF16, 300)], ids=["fp32", "bf16"])
@every_case
def test_split_and_master_are_the_run_in_float32(
    case: str, states: torch.dtype, steps: int
) -> None:
    """Bit for bit, with gradients of bfloat16; and both keep the same model."""
    cls, options = CASES[case]
    grads = drawn_grads(steps, 200)
    start = normal(200, seed=4).to(BF16)
    runs: dict[str, tuple[FusedOptimizer, Tensor]] = {}
    for precision in ("fp32", "split", "master"):
        if precision == "master" and states == BF16:
            continue
        param = nn.Parameter(start.to(F32 if precision == "fp32" else BF16, copy=True))
        asked = None if precision == "fp32" else precision
        optimizer = cls([param], **options, precision=asked, state_dtype=states)
        mine = grads.to(param.dtype)
        for grad in mine:
            param.grad = grad
            optimizer.step()
        runs[precision] = optimizer, param
    plain, value = runs.pop("fp32")
    assert value.isfinite().all()
    for optimizer, param in runs.values():
        (full,) = master_parameters(optimizer)
        assert bits(full) == bits(value)
        assert not torch.equal(full, param.float())
        for key, state in plain.state[value].items():
            assert bits(optimizer.state[param][key]) == bits(state)
    models = [bits(param) for _, param in runs.values()]
    assert models[0] == models[-1]


@pytest.mark.parametrize("case", ["AdamW", "SGDW"])
@pytest.mark.parametrize("name", [*FORMATS])
def test_a_decay_too_small_for_bfloat16_acts(case: str, name: str) -> None:
    """A thousand steps with lr lambda = 1e-5, without gradients, of weights from 1 to 2.

    Where the value is exact to float32, a step rounds by 2^-24 and its factor is off by 2^-25.
    Compensation loses at most 2^-17 a step, by less than the decay of 1e-5. What is rounded
    stochastically to numbers a gap apart is off by a random number of mean 0, whose variance is at
    most gap^2 / 4, and at most gap times the decay where that is less.
    """
    steps, numel, rate = 1000, 2 * LEAST_CODED, 1e-5
    dtype, options = FORMATS[name]
    sign = 1 - 2 * (torch.arange(numel) % 2)
    start = (torch.linspace(1.05, 1.95, numel) * sign).to(dtype)
    param = nn.Parameter(start.clone())
    optimizer = CASES[case].cls([param], lr=1e-3, weight_decay=1e-2, decay="lr", **options)
    param.grad = torch.zeros_like(param)
    for _ in range(steps):
        optimizer.step()
    (full,) = master_parameters(optimizer)
    found, wanted = full.double() * sign, start.double() * sign * (1 - rate) ** steps
    exact = steps * (2.0**-24 + 2.0**-25) * 2
    layout = FORMATS[name].layout(numel)
    if layout.stochastic or layout.beside == "remainder8":
        gap = 2.0**-7 if layout.stochastic else 2.0**-15
        deviation = math.sqrt(steps * min(gap**2 / 4, gap * 2 * rate) / numel)
        assert abs((found - wanted).mean()) <= SIGMAS * deviation + exact
    elif dtype != F32 and not layout.beside:
        assert torch.equal(param, start)
        assert ((found - wanted).abs() > 0.01).all()
    else:
        lost = steps * 2.0**-17 if layout.beside == "compensation" else 0.0
        assert ((found - wanted).abs() <= exact + lost).all()
        assert (found < start.double() * sign).all()


@every_format
def test_averages_follow_the_full_value(name: str) -> None:
    params = make_params(FORMATS[name].dtype)
    optimizer = new("AdamW", name, params, ema_decay=0.9)
    wanted: list[Any] = []
    for step in range(4):
        train(optimizer, params, range(step, step + 1))
        values = [x.numpy() for x in master_parameters(optimizer)]
        wanted = [
            reference.ema(average, value, 1 - 0.9)
            for average, value in zip(wanted or values, values, strict=True)
        ]
        for param, average in zip(params, wanted, strict=True):
            np.testing.assert_array_equal(optimizer.state[param][EMA].numpy(), average)


@every_format
def test_swapped_averages_come_back_bit_for_bit(name: str) -> None:
    params = make_params(FORMATS[name].dtype)
    optimizer = new("AdamW", name, params, ema_decay=0.5)
    train(optimizer, params, range(3))
    before = everything(optimizer, params)
    averages = [optimizer.state[param][EMA].to(param.dtype, copy=True) for param in params]
    with optimizer.swap_ema():
        assert [bits(param) for param in params] == [bits(average) for average in averages]
        assert before["param 0"] != bits(params[0])
    assert everything(optimizer, params) == before
    train(optimizer, params, range(3, 5))
    assert everything(optimizer, params) == run("AdamW", name, 5, ema_decay=0.5)


@every_format
def test_clipping(name: str) -> None:
    """The norm is that of the gradients in memory; half of it halves a step of SGD."""
    moved = []
    for limit in (None, 1e9, 0.5):
        params = make_params(FORMATS[name].dtype)
        optimizer = FusedSGD(params, lr=0.5, max_grad_norm=limit, **FORMATS[name].options)
        before = [x.clone() for x in master_parameters(optimizer)]
        train(optimizer, params, range(1))
        pairs = zip(master_parameters(optimizer), before, strict=True)
        moved.append(torch.cat([(x - y).flatten() for x, y in pairs]))
    grads = [param.grad.float() for param in params if param.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    assert torch.equal(moved[0], moved[1])
    if FORMATS[name].layout().beside:  # of a kind that keeps steps of lr 0.5 / norm
        torch.testing.assert_close(moved[2], moved[0] * (0.5 / norm), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["fp32 8bit", "8bit", "8bit 16"])
def test_nan_stays_in_its_block(name: str) -> None:
    found = []
    for bad in (False, True):
        params = make_params(FORMATS[name].dtype)[1:2]
        optimizer = new("AdamW amsgrad", name, params)
        train(optimizer, params, range(2))
        set_grads(params, 2)
        if bad:
            assert params[0].grad is not None
            params[0].grad.view(-1)[3 * BLOCK + 5] = math.nan
        optimizer.step()
        (value,) = master_parameters(optimizer)
        states = optimizer.export_fp32_state()["state"][0]
        found.append((value.flatten(), *(states[key].flatten() for key in names_of(optimizer))))
    for i, (fine, hurt) in enumerate(zip(*found, strict=True)):
        reached = torch.zeros_like(fine, dtype=torch.bool)
        block = slice(3 * BLOCK, 4 * BLOCK)
        reached[3 * BLOCK + 5 if i == 0 else block] = True
        assert torch.equal(hurt.isnan(), reached)
        assert torch.equal(hurt[~reached], fine[~reached])


# --- Random bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_threads_do_not_change_a_bit(name: str) -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = make_params(FORMATS[name].dtype, [(401, 501), (99, 77)])
            optimizer = new("AdamW amsgrad", name, params, max_grad_norm=1.0)
            train(optimizer, params, range(2))
            found.append(everything(optimizer, params))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", FORMATS)
def test_another_seed_gives_other_bits_where_bits_are_drawn(name: str) -> None:
    first, again, other = (run("AdamW", name, seed=seed) for seed in (1, 1, 2**53))
    assert first == again
    differ = {key for key in first if first[key] != other[key]}
    differ.discard("seed of group 0")
    if name not in DRAWING:
        assert not differ
    elif name == "8bit":  # in what is coded alone
        assert {"param_remainder 0", "param_remainder 1"} <= differ
        assert not differ & {"param 2", "param_remainder 2", "exp_avg 0"}
    else:
        assert {"param 0", "param 1", "param 2"} <= differ


@pytest.mark.parametrize("name", DRAWING)
def test_each_parameter_and_step_draws_its_own_bits(name: str) -> None:
    """Twins with the same gradients part, and meet again with the same number in two groups."""
    shapes = [(4200,)] * 2

    def twins(reset: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.full(shape, 1.1, dtype=BF16)) for shape in shapes]
        optimizer = FusedSGD(params, lr=1e-4, **FORMATS[name].options)
        found = []
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            found.append([x.clone() for x in master_parameters(optimizer)])
            if reset:
                optimizer.state.clear()
                for param in params:
                    param.data.fill_(1.1)
        return [*found[0], *found[1]]

    a, b, later, _ = twins(reset=True)
    assert not torch.equal(a, b)
    assert not torch.equal(a, later)
    assert torch.equal(a, twins(reset=False)[0])


def test_a_seed_that_is_set_is_followed_at_once() -> None:
    """As are all values of a param group; a checkpoint then continues with it."""
    found = []
    for reloads in (False, True):
        params = make_params(BF16)
        optimizer = new("AdamW", "stochastic", params, seed=1)
        train(optimizer, params, range(2))
        optimizer.param_groups[0]["seed"] = 2
        if reloads:
            optimizer.load_state_dict(saved(optimizer.state_dict()))
        train(optimizer, params, range(2, 4))
        found.append(everything(optimizer, params))
    assert found[0] == found[1]
    optimizer.param_groups[0]["seed"] = -1
    with pytest.raises(ValueError, match="param group 0: seed: found -1"):
        optimizer.step()


@pytest.mark.parametrize("name", ["stochastic", "8bit", "split", "kahan"])
def test_steps_in_the_backward_pass_have_the_same_bits(name: str) -> None:
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64)).to(BF16)
        params = list(model.parameters())
        optimizer = new("AdamW", name, params, schedule=schedules.LinearWarmup(2))
        handle = step_in_backward(model, optimizer) if in_backward else None
        for step in range(3):
            model(normal(8, 64, seed=step).to(BF16)).float().square().mean().backward()
            if handle is None:
                optimizer.step()
                optimizer.zero_grad()
        found.append(everything(optimizer, params))
    assert found[0] == found[1]


# --- Layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, LEAST_CODED - 1, LEAST_CODED, LEAST_CODED + 1, 4333])
@pytest.mark.parametrize("name", ["fp32 8bit", "8bit", "8bit 16"])
def test_what_is_coded(name: str, numel: int) -> None:
    dtype = FORMATS[name].dtype
    params = [nn.Parameter(normal(numel, seed=1).to(dtype))]
    optimizer = new("AdamW amsgrad", name, params)
    train(optimizer, params, range(2))
    state = optimizer.state[params[0]]
    is_coded = numel >= LEAST_CODED
    expected = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, "max_exp_avg_sq": torch.uint8}
    for key, coded in expected.items():
        if is_coded:
            assert key not in state
            assert state[code_key(key)].dtype == coded
            assert state[scale_key(key)].shape == (-(-numel // BLOCK),)
            assert state[scale_key(key)].dtype == F32
        else:
            assert state[key].dtype == F32
            assert not {code_key(key), scale_key(key)} & state.keys()
    remainder = state.get("param_remainder")
    if dtype == F32:
        assert remainder is None
    else:
        narrow = is_coded and name == "8bit"
        assert remainder.dtype == (torch.int8 if narrow else torch.int16)


@every_format
def test_strides_do_not_matter(name: str) -> None:
    """Blocks and random bits follow memory: of a permuted parameter as of a vector."""
    dtype = FORMATS[name].dtype
    found = []
    for permuted in (False, True):
        values, grads = normal(13, 40, 9, seed=1).to(dtype), normal(3, 13, 40, 9, seed=2).to(dtype)
        param = nn.Parameter(values.permute(2, 0, 1) if permuted else values.flatten())
        optimizer = new("AdamW amsgrad", name, [param])
        for grad in grads:
            param.grad = grad.permute(2, 0, 1) if permuted else grad.flatten()
            optimizer.step()
        state = optimizer.state[param]
        if permuted:
            layout = FORMATS[name].layout(param.numel())
            names = layout.state_keys(names_of(optimizer))
            for key in filter(None, (*names, layout.beside_key)):
                assert state[key].stride() == param.stride()
        found.append({key: bits(value)[::2] for key, value in {**state, "": param}.items()})
    assert found[0] == found[1]


def test_other_strides_of_a_gradient() -> None:
    for name in FORMATS:
        found = []
        for transposed in (False, True):
            params = make_params(FORMATS[name].dtype, [(64, 65)])
            optimizer = new("AdamW", name, params)
            set_grads(params, 0)
            if transposed:
                assert params[0].grad is not None
                params[0].grad = params[0].grad.t().contiguous().t()
            optimizer.step()
            found.append(everything(optimizer, params))
        assert found[0] == found[1]


class Mixed(nn.Module):
    """Matrices in bfloat16, a norm layer in float32."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 64, dtype=BF16, device=device)
        self.norm = nn.LayerNorm(64, device=device)
        self.head = nn.Linear(64, 90, dtype=BF16, device=device)


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "fp32"])
def test_a_norm_layer_in_float32_beside_matrices(precision: str) -> None:
    """It trains as by itself."""
    model, alone = Mixed(), Mixed()
    params, others = list(model.parameters()), list(alone.norm.parameters())
    optimizer = FusedAdamW(params, **ADAM, precision=precision)
    plain = FusedAdamW(others, **ADAM)
    for step in range(3):
        set_grads(params, step)
        for param, other in zip(model.norm.parameters(), others, strict=True):
            assert param.grad is not None
            other.grad = param.grad.clone()
        optimizer.step()
        plain.step()
    for param, other in zip(model.norm.parameters(), others, strict=True):
        assert bits(param) == bits(other)
        assert optimizer.state[param].keys() == plain.state[other].keys()
    for param in (model.embedding.weight, model.head.weight, model.head.bias):
        state = optimizer.state[param]
        assert bool(state.keys() & set(BESIDE_KEYS)) == (precision != "bf16")
    words = repr(optimizer)
    assert "fp32: float32 states (2 parameters)" in words
    assert f"{precision}: " in words


def test_precision_chosen_for_each_parameter() -> None:
    model, seen = Mixed(), []

    def chosen(name: str | None, param: Tensor) -> str | None:
        seen.append((name, param))
        if name is None or param.dtype == F32:
            return None
        return "8bit" if name.startswith("embedding") else "split"

    optimizer = FusedAdamW(model.named_parameters(), precision=chosen, remainder_bits=16)
    params = dict(model.named_parameters())
    assert dict(seen) == params
    found = dict(zip(params, layouts_of(optimizer), strict=True))
    assert found == {
        "embedding.weight": Layout("8bit", "remainder16", None, False),
        "norm.weight": Layout("fp32", "", F32, False),
        "norm.bias": Layout("fp32", "", F32, False),
        "head.weight": Layout("split", "remainder16", F32, False),
        "head.bias": Layout("split", "remainder16", F32, False),
    }
    train(optimizer, list(params.values()), range(2))
    assert optimizer.state[model.embedding.weight]["exp_avg_codes"].dtype == torch.int8
    assert optimizer.state[model.head.weight]["exp_avg"].dtype == F32
    seen.clear()
    unnamed = FusedAdamW(model.parameters(), precision=chosen)
    assert {name for name, _ in seen} == {None}
    assert {layout.precision for layout in layouts_of(unnamed)} == {"bf16", "fp32"}


def test_stochastic_rounding_beside_chosen_formats() -> None:
    params = make_params(BF16, [(4200,), (4200,)])
    split = params[1]
    optimizer = FusedAdamW(
        params,
        precision=lambda _, param: "split" if param is split else "bf16",
        stochastic_rounding=True,
    )
    assert [layout.stochastic for layout in layouts_of(optimizer)] == [True, False]
    assert [layout.beside for layout in layouts_of(optimizer)] == ["", "remainder16"]


@every_case
def test_kinds_of_states_are_the_extensions(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    update = RegisteredList._update

    def observed(self: RegisteredList, *args: Any) -> Any:
        kinds.extend((bucket.state_dtype, bucket.state_kinds) for bucket in self.native.buckets())
        return update(self, *args)

    monkeypatch.setattr(RegisteredList, "_update", observed)
    for name in ("fp32", "8bit"):
        params = make_params(FORMATS[name].dtype, [(4200,)])
        optimizer = new(case, name, params)
        train(optimizer, params, range(1))
        ((dtype, found),) = kinds
        assert found == tuple(STATE_KINDS[key] for key in names_of(optimizer))
        coded = name == "8bit" and case != "RMSprop centered"
        assert dtype == ("code8" if coded else "float32")
        kinds.clear()


# --- Master parameters and memory ----------------------------------------------------------------


@every_format
def test_master_parameters(name: str) -> None:
    """Copies, of the parameters themselves until a step; the nearest 16 bits are the parameter."""
    params = make_params(FORMATS[name].dtype)
    optimizer = new("AdamW", name, params)
    for steps in (0, 2):
        train(optimizer, params, range(steps))
        before = everything(optimizer, params)
        values = list(master_parameters(optimizer))
        for param, value, layout in zip(params, values, layouts_of(optimizer), strict=True):
            assert value.dtype == F32
            assert not value.requires_grad
            assert value.stride() == param.stride()
            if steps == 0 or not layout.beside:
                assert torch.equal(value, param.float())
            else:
                assert value.numel() < 50 or not torch.equal(value, param.float())
                stored, _ = beside_of(value, layout, param)
                apart = stored.view(torch.int16).int() - param.detach().view(torch.int16).int()
                # Rounding of what is missing may lead a compensation to halfway.
                assert (
                    apart.abs().max() <= (layout.beside == "compensation")
                    if len(apart.shape) and apart.numel()
                    else True
                )
            value.zero_()
        assert everything(optimizer, params) == before


KIND_OF_KEY = {
    "param_master": "masters",
    "param_remainder": "remainders",
    "param_compensation": "compensations",
    EMA: "averages",
}


@every_format
@every_case
def test_memory_is_known_before_it_is_allocated(case: str, name: str) -> None:
    """On the meta device, with other strides there; counts of steps are no arrays."""
    dtype = FORMATS[name].dtype
    planned = [torch.empty(shape, dtype=dtype, device="meta") for shape in SHAPES]
    meta = [nn.Parameter(param) for param in planned]
    report = new(case, name, meta, ema_decay=0.9).memory_report()
    params = make_params(dtype)
    optimizer = new(case, name, params, ema_decay=0.9)
    train(optimizer, params, range(1))
    held = dict.fromkeys(report.held, 0)
    for param in params:
        held["parameters"] += param.nbytes
        assert param.grad is not None
        held["gradients"] += param.grad.nbytes
        for key, value in optimizer.state[param].items():
            if key not in ("step", "mu_product"):
                is_scale = key.endswith("_scale")
                held[KIND_OF_KEY.get(key, "scales" if is_scale else "states")] += value.nbytes
    assert report.held == held
    assert report.numel == sum(param.numel() for param in params)
    assert optimizer.memory_report() == report


# --- Steps that are skipped ----------------------------------------------------------------------


@contextmanager
def overflow(optimizer: FusedOptimizer) -> Iterator[None]:
    """As `torch.amp.GradScaler` tells of one."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    yield
    del optimizer.grad_scale, optimizer.found_inf


@contextmanager
def nonfinite(optimizer: FusedOptimizer) -> Iterator[None]:
    optimizer.skip_nonfinite = True
    yield
    optimizer.skip_nonfinite = False


@pytest.mark.parametrize("skip", [overflow, nonfinite])
@every_format
@few_cases
def test_an_overflow_leaves_every_byte(case: str, name: str, skip: Any) -> None:
    """Before the first step, after it, and twice in a row; and later steps are none the wiser."""
    params = make_params(FORMATS[name].dtype)
    options = {"schedule": schedules.LinearWarmup(3, eta_min=0.5), "ema_decay": 0.9}
    optimizer = new(case, name, params, **options)
    for step in range(3):
        for _ in range(2):
            set_grads(params, 50)
            assert params[1].grad is not None
            params[1].grad[0, 0] = math.inf
            before = everything(optimizer, params)
            with skip(optimizer):
                optimizer.step()
            assert everything(optimizer, params) == before
        train(optimizer, params, range(step, step + 1))
    assert everything(optimizer, params) == run(case, name, **options)


# --- Checkpoints ---------------------------------------------------------------------------------


def clones(params: Sequence[Tensor]) -> list[Tensor]:
    return [nn.Parameter(param.detach().clone()) for param in params]


@every_format
@few_cases
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(case: str, name: str) -> None:
    """Through a file; the seed comes with it. Copies and pickles continue alike."""
    options = {"schedule": schedules.CosineAnnealing(6), "ema_decay": 0.9, "max_grad_norm": 50.0}
    whole = run(case, name, 6, seed=7, **options)
    params = make_params(FORMATS[name].dtype)
    begun = new(case, name, params, seed=7, **options)
    train(begun, params, range(3))
    copied = copy.deepcopy((begun, params))
    pickled = pickle.loads(pickle.dumps((begun, params)))
    resumed_params = clones(params)
    resumed = new(case, name, resumed_params, ema_decay=0.9, max_grad_norm=50.0)
    resumed.load_state_dict(saved(begun.state_dict()))
    for optimizer, own in ((resumed, resumed_params), copied, pickled, (begun, params)):
        train(optimizer, own, range(3, 6))
        assert everything(optimizer, own) == whole


def assert_converted(source: FusedOptimizer, target: FusedOptimizer, name: str) -> None:
    """States and full values of a loaded optimizer are as near as its format has them."""
    names, exported = names_of(source), source.export_fp32_state()["state"]
    targets = target.param_groups[0]["params"]
    sources = source.param_groups[0]["params"]
    for i, (param, saved_param, layout, former) in enumerate(
        zip(targets, sources, layouts_of(target), layouts_of(source), strict=True)
    ):
        state = target.state[param]
        for key in names:
            x = exported[i][key]
            if layout.state_dtype == former.state_dtype is None:
                entries = (code_key(key), scale_key(key))
                wanted = {entry: source.state[saved_param][entry] for entry in entries}
            else:
                wanted = stored_state(key, x, STATE_KINDS[key], layout)
            for entry, value in wanted.items():
                assert bits(state[entry]) == bits(value)
        if former.beside == layout.beside != "":
            key = layout.beside_key
            assert key is not None
            assert bits(state[key]) == bits(source.state[saved_param][key])
        elif not former.beside:
            assert layout.beside_key not in state
        assert len(set(BESIDE_KEYS) & state.keys()) <= 1


@pytest.mark.parametrize("case", ["AdamW amsgrad", "Adamax"])
@every_format
def test_checkpoints_load_into_every_format(case: str, name: str) -> None:
    """The full value is kept where the format has room for it, and training goes on."""
    params = make_params(FORMATS[name].dtype)
    source = new(case, name, params, ema_decay=0.9)
    train(source, params, range(3))
    checkpoint = saved(source.state_dict())
    full = list(master_parameters(source))
    for other, (dtype, _) in FORMATS.items():
        own = [nn.Parameter(param.detach().to(dtype, copy=True)) for param in params]
        target = new(case, other, own, ema_decay=0.9)
        if dtype == F16 != FORMATS[name].dtype and other == "fp16 master":
            beside = FORMATS[name].layout().beside
            if beside not in ("", "master"):
                with pytest.raises(ValueError, match="found beside a float16 parameter"):
                    target.load_state_dict(checkpoint)
                continue
        target.load_state_dict(checkpoint)
        assert_converted(source, target, other)
        if dtype == FORMATS[name].dtype:
            for value, x, layout, former in zip(
                master_parameters(target),
                full,
                layouts_of(target),
                layouts_of(source),
                strict=True,
            ):
                if layout.beside in ("master", former.beside):
                    assert torch.equal(value, x)
                elif layout.beside == "remainder16":  # short of halfway by the last bit
                    apart = (value.view(torch.int32) - x.view(torch.int32)).abs()
                    assert not apart.numel() or apart.max() <= (former.beside == "compensation")
        train(target, own, range(3, 5))
        for value in master_parameters(target):
            assert value.isfinite().all()


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ("bf16", "split"),
        ("bf16", "bf16 fp32"),
        ("bf16", "stochastic fp32"),
        ("split", "master"),
        ("split bf16", "split"),
        ("split bf16", "master"),
        ("fp32 bf16", "fp32"),
        ("fp16", "fp16 master"),
        ("kahan", "master"),
        ("8bit", "8bit 16"),
    ],
)
def test_the_way_through_a_wider_format_and_back_loses_nothing(near: str, far: str) -> None:
    params = make_params(FORMATS[near].dtype)
    begun = new("AdamW amsgrad", near, params, ema_decay=0.9)
    train(begun, params, range(3))
    before = everything(begun, params)
    wide = new("AdamW amsgrad", far, params, ema_decay=0.9)
    wide.load_state_dict(saved(begun.state_dict()))
    back = new("AdamW amsgrad", near, params, ema_decay=0.9)
    back.load_state_dict(saved(wide.state_dict()))
    assert everything(back, params) == before


@pytest.mark.parametrize("amsgrad", [False, True])
@every_format
def test_checkpoints_of_torch_load(name: str, amsgrad: bool) -> None:
    """Their states have the parameters' dtype."""
    dtype = FORMATS[name].dtype
    params = make_params(dtype)
    theirs = torch.optim.AdamW(params, **ADAM, amsgrad=amsgrad)
    for step in range(3):
        set_grads(params, step)
        theirs.step()
    own = clones(params)
    ours = new("AdamW", name, own)
    ours.load_state_dict(saved(theirs.state_dict()))
    assert ours.param_groups[0]["amsgrad"] == amsgrad
    for param, mine, layout in zip(params, own, layouts_of(ours), strict=True):
        for key in names_of(ours):
            x = torch.empty_strided(mine.shape, mine.stride()).copy_(theirs.state[param][key])
            for entry, value in stored_state(key, x, STATE_KINDS[key], layout).items():
                assert bits(ours.state[mine][entry]) == bits(value)
    train(ours, own, range(3, 5))
    assert all(value.isfinite().all() for value in master_parameters(ours))
    assert ours.state[own[0]]["step"] == 5


@every_format
def test_torch_goes_on_from_the_export(name: str) -> None:
    """In float32, from the master parameters, as a float32 optimizer of this library would."""
    params = make_params(FORMATS[name].dtype)
    ours = new("AdamW amsgrad", name, params)
    train(ours, params, range(3))
    exported = saved(ours.export_fp32_state())
    results = []
    for cls in (torch.optim.AdamW, FusedAdamW):
        own: list[Tensor] = [nn.Parameter(x) for x in master_parameters(ours)]
        optimizer = cls(own)
        optimizer.load_state_dict(copy.deepcopy(exported))  # torch would keep its tensors
        for state, param in zip(exported["state"].values(), own, strict=True):
            assert state.keys() == {"step", *names_of(ours)}
            for key in names_of(ours):
                assert state[key].dtype == F32
                assert torch.equal(optimizer.state[param][key], state[key])
        for step in range(3, 6):
            set_grads(own, step)
            optimizer.step()
        results.append(own)
    assert_same_to_rounding(*results, steps=3)


@pytest.mark.parametrize("case", CASES)
def test_exports_of_every_class_are_float32(case: str) -> None:
    for name in ("8bit", "kahan", "stochastic"):
        params = make_params(BF16)
        optimizer = new(case, name, params)
        train(optimizer, params, range(1))
        known = {"step", "mu_product", *names_of(optimizer)}
        for state in optimizer.export_fp32_state()["state"].values():
            assert state.keys() <= known
            assert all(state[key].dtype == F32 for key in names_of(optimizer))


def test_a_master_of_other_weights() -> None:
    """As of a model that is loaded later: kept with a warning, but not converted."""
    params, later = make_params(BF16), make_params(BF16)
    source = new("AdamW", "master", params)
    train(source, params, range(3))
    checkpoint = saved(source.state_dict())
    for name in ("split", "kahan", "8bit"):
        optimizer = new("AdamW", name, make_params(BF16))
        message = "state_dict: parameter 0: 'param_master': found other values than the parameter's"
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(checkpoint)
        assert not optimizer.state
    optimizer = new("AdamW", "master", later)
    more = sum(param.numel() > 0 for param in later) - 1
    others = f"parameter 0 and {more} more: 'param_master' has other values than the parameter"
    with pytest.warns(UserWarning, match=f"state_dict: {others}"):
        optimizer.load_state_dict(checkpoint)
    with torch.no_grad():
        for param, value in zip(later, params, strict=True):
            param.copy_(value)
    for own, by in ((params, source), (later, optimizer)):
        train(by, own, range(3, 5))
    assert everything(optimizer, later) == everything(source, params)


@every_format
def test_what_is_beside_begins_with_the_first_step(name: str) -> None:
    """Of a state that only a checkpoint has, whenever the gradient comes and the weights change."""
    found = []
    for early in (False, True):
        model = nn.ParameterList(make_params(FORMATS[name].dtype))
        params = list(model.parameters())
        optimizer = new("SGD", name, params, ema_decay=0.9)
        optimizer.param_groups[0]["dampening"] = 0.5
        if early:
            state = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
        with torch.no_grad():
            for param in params:
                param.mul_(2.0)
        masters = list(master_parameters(optimizer))
        assert all(map(torch.equal, masters, (param.float() for param in params)))
        train(optimizer, params[:1], range(1))
        with torch.no_grad():
            params[1].mul_(2.0)
        with optimizer.swap_ema():
            found.append([bits(param) for param in params])
        train(optimizer, params, range(1, 3))
        found.append(everything(optimizer, params))
    assert found[:2] == found[2:]


def without(state: dict[str, Any], key: str) -> None:
    del state[key]


def set_to(value: Any) -> Any:
    def change(state: dict[str, Any], key: str) -> None:
        state[key] = value(state[key])

    return change


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("exp_avg_scale", without),
        ("exp_avg_sq_scale", set_to(lambda scale: scale[:-1])),
        ("exp_avg_sq_scale", set_to(lambda scale: scale.to(BF16))),
        ("exp_avg_scale", set_to(lambda scale: scale[None])),
        ("exp_avg_scale", set_to(lambda scale: scale.tolist())),
        ("exp_avg_codes", without),
        ("exp_avg_codes", set_to(lambda codes: codes.to(torch.uint8))),
        ("exp_avg_sq_codes", set_to(lambda codes: codes.to(torch.int8))),
        ("exp_avg_codes", set_to(lambda codes: codes[:-1])),
        ("exp_avg_sq_codes", set_to(lambda codes: codes.to(torch.int32))),
        ("param_remainder", set_to(lambda remainder: remainder.float())),
        ("param_remainder", set_to(lambda remainder: remainder.t())),
    ],
)
@pytest.mark.parametrize("target", ["8bit", "8bit 16", "bf16", "split"])
def test_corrupted_checkpoints_are_refused_whole(key: str, change: Any, target: str) -> None:
    """The damage is in the second parameter, and nothing of the first is taken."""
    params = make_params(BF16)
    source = new("AdamW", "8bit", params)
    train(source, params, range(3))
    damaged = saved(source.state_dict())
    change(damaged["state"][1], key)
    own = make_params(BF16)
    optimizer = new("AdamW", target, own, seed=5)
    train(optimizer, own, range(2))
    before = everything(optimizer, own)
    with pytest.raises(ValueError, match=r"state_dict: parameter 1.*accepted"):
        optimizer.load_state_dict(damaged)
    assert everything(optimizer, own) == before
    train(optimizer, own, range(2, 3))
    assert everything(optimizer, own) == run("AdamW", target, 3, seed=5)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (BF16, {"precision": "fp8"}, "precision: found 'fp8', accepted: None, \"fp32\""),
        (BF16, {"precision": 8}, "precision: found 8"),
        (F16, {"precision": "split"}, "parameter 0: precision: found 'split' for a float16"),
        (F16, {"precision": "kahan"}, "parameter 0: precision: found 'kahan' for a float16"),
        (F16, {"precision": "8bit"}, "parameter 0: precision: found '8bit' for a float16"),
        (F16, {"precision": "bf16"}, "parameter 0: precision: found 'bf16' for a float16"),
        (F16, {"stochastic_rounding": True}, "parameter 0: stochastic_rounding: found True for"),
        (BF16, {"precision": "fp32"}, "parameter 0: precision: found 'fp32' for a bfloat16"),
        (BF16, {"precision": "split", "stochastic_rounding": True}, "stochastic_rounding: found T"),
        (BF16, {"stochastic_rounding": 1}, "stochastic_rounding: found 1, accepted: True or False"),
        (BF16, {"precision": "kahan", "state_dtype": F32}, "state_dtype: found torch.float32"),
        (BF16, {"precision": "8bit", "state_dtype": BF16}, "state_dtype: found torch.bfloat16"),
        (BF16, {"precision": "master", "state_dtype": BF16}, "state_dtype: found torch.bfloat16"),
        (F32, {"state_dtype": F16}, "parameter 0: state_dtype: found torch.float16"),
        (BF16, {"precision": "8bit", "remainder_bits": 4}, "remainder_bits: found 4, accepted: 8"),
        (BF16, {"precision": "split", "remainder_bits": 16}, "remainder_bits: found 16 beside"),
        (BF16, {"seed": -1}, "seed: found -1, accepted: an integer >= 0 and <= 2"),
        (BF16, {"seed": 2**53 + 1}, "seed: found 9007199254740993, accepted"),
        (BF16, {"seed": 1.0}, "seed: found 1.0, accepted: an integer"),
        (BF16, {"seed": True}, "seed: found True, accepted: an integer"),
        (BF16, {"precision": lambda name, param: "fp8"}, "parameter 0: precision: found 'fp8'"),
        (F16, {"precision": lambda name, param: "split"}, "parameter 0: precision: found 'split'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_bad_options_are_refused(
    cls: Any, dtype: torch.dtype, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cls(make_params(dtype), **options)


def test_a_parameter_that_a_format_does_not_take_is_named() -> None:
    params = [("weight", nn.Parameter(torch.zeros(3, dtype=BF16)))]
    optimizer = FusedAdamW(params, precision="split")
    bad = {"params": [("half", nn.Parameter(torch.zeros(3, dtype=F16)))]}
    with pytest.raises(ValueError, match=r"parameter 1 \('half'\): precision: found 'split'"):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1


def test_master_parameters_are_refused_where_they_would_be_wrong() -> None:
    params = make_params(BF16)
    optimizer = new("AdamW", "split", params, ema_decay=0.5)
    train(optimizer, params, range(2))
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="master_parameters"):
        master_parameters(optimizer)
    plain: Any = torch.optim.AdamW(params)
    with pytest.raises(TypeError, match="optimizer: found AdamW"):
        master_parameters(plain)
