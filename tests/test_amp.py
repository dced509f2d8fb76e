"""`torch.amp.GradScaler`, and overflows: a step that is skipped leaves every byte as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from drawn_training import assert_same_bits, make_params, set_grads, state_tensors
from family import CLASSES, DROP_INS, DropIn
from test_bad_input import content
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_adamw import FusedAdamW, FusedLion, FusedNadam, FusedSGD, schedules
from fused_adamw.optimizer import FusedOptimizer

SCALE = 1024.0
SHAPES = [(7, 5), (33,), (), (0, 4)]
MOMENTUM = {"momentum": 0.9}

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def new_scaler(**arguments: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, **arguments)


def scale_of(scaler: torch.amp.GradScaler) -> float:
    """The scale, made when it is first used."""
    scaler.scale(torch.ones(()))
    return scaler.get_scale()


def scale_grads(params: Sequence[Tensor], scale: float) -> None:
    for param in params:
        if param.grad is not None:
            param.grad.mul_(scale)


def everything(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> Any:
    """Every byte that a skipped step must keep; gradients are another matter."""
    state = vars(optimizer)["state"]  # optimizer.state gives up what is registered
    states = [dict(state.get(param, {})) for param in params]
    return content([list(params), states, [p in state for p in params], optimizer.param_groups])


# --- Overflows -----------------------------------------------------------------------------------


def by_scaler(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> None:
    scaler = new_scaler()
    scale_of(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert not hasattr(optimizer, "found_inf")


def by_hand(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> None:
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf


def by_norm(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> None:
    optimizer.skip_nonfinite = True
    optimizer.step()
    optimizer.skip_nonfinite = False
    assert optimizer.grad_norm is not None
    assert not optimizer.grad_norm.isfinite()


SKIPS: list[Callable[[FusedOptimizer, Sequence[Tensor]], None]] = [by_scaler, by_hand, by_norm]


@pytest.mark.parametrize("zero_grads", [False, True], ids=["", "zeroing"])
@pytest.mark.parametrize("skip", SKIPS, ids=lambda skip: skip.__name__)
@every_class
def test_overflow(cls: Any, skip: Any, zero_grads: bool) -> None:
    """At steps 1, 2 and 10; what follows is as if there had been none."""
    runs = []
    for overflows in ((), (1, 2, 10)):
        params = make_params(SHAPES)
        extra = MOMENTUM if cls.__name__ in ("FusedSGD", "FusedRMSprop") else {}
        optimizer = cls(
            params,
            **extra,
            schedule=schedules.StepDecay(1, 0.75),
            ema_decay=0.9,
            zero_grads=zero_grads,
        )
        kept = []
        for step in range(1, 12):
            if step in overflows:
                set_grads(params, 50 + step)
                params[1].grad[-1] = (math.inf, math.nan)[step % 2]
                saved = content(optimizer.state_dict()) if step == 2 else None
                before, versions = everything(optimizer, params), [p._version for p in params]
                grads = content([p.grad for p in params])
                skip(optimizer, params)
                assert everything(optimizer, params) == before
                assert [p._version for p in params] == versions
                assert saved is None or content(optimizer.state_dict()) == saved
                if zero_grads:
                    assert all(not param.grad.any() for param in params)
                else:
                    assert content([p.grad for p in params]) == grads
            set_grads(params, step)
            optimizer.step()
            kept.append([param.detach().clone() for param in params])
        kept.append(state_tensors(optimizer, params))
        assert optimizer.param_groups[0]["schedule_step"] == 11
        runs.append((kept, [group["schedule_multiplier"] for group in optimizer.param_groups]))
    for expected, found in zip(runs[0][0], runs[1][0], strict=True):
        assert_same_bits(found, expected)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("zero_grads", [False, True])
def test_overflow_where_nothing_has_a_gradient(zero_grads: bool) -> None:
    params = make_params(SHAPES)
    optimizer = FusedAdamW(params, zero_grads=zero_grads)
    by_hand(optimizer, params)
    assert not optimizer.state


def test_overflow_of_a_group_without_gradients() -> None:
    params = make_params([(3,), (4,)])
    optimizer = FusedAdamW([{"params": [params[0]]}, {"params": [params[1]]}], ema_decay=0.5)
    params[0].grad = torch.tensor([0.0, math.inf, 0.0])
    before = everything(optimizer, params)
    by_scaler(optimizer, params)
    by_norm(optimizer, params)
    assert everything(optimizer, params) == before


def test_found_inf_of_zero_and_of_an_integer() -> None:
    """`GradScaler` hands over a sum, which is 0 where no gradient is."""
    for found_inf, moves in ((torch.zeros(()), True), (0, True), (0.0, True), (2, False)):
        (param,) = make_params([(3,)])
        before = param.detach().clone()
        optimizer = FusedAdamW([param])
        set_grads([param], 0)
        optimizer.found_inf = found_inf
        optimizer.step()
        assert torch.equal(param, before) != moves


# --- The scaler ----------------------------------------------------------------------------------


def plain_run(cls: Any, steps: int, **options: Any) -> tuple[list[Tensor], Any]:
    params = make_params(SHAPES)
    optimizer = cls(params, **options)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return [*params, *state_tensors(optimizer, params)], optimizer


@pytest.mark.parametrize("unscales", [False, True], ids=["in the step", "before it"])
@every_class
def test_scaler_is_no_change_of_a_bit(cls: Any, unscales: bool) -> None:
    """Its scale is a power of two; the gradients keep it unless they were unscaled before."""
    params = make_params(SHAPES)
    optimizer, scaler = cls(params), new_scaler(growth_interval=2)
    for step in range(5):
        scale = scale_of(scaler)
        assert scale == SCALE * 2.0 ** (step // 2)
        set_grads(params, step)
        wanted = [param.grad.clone() for param in params]
        scale_grads(params, scale)
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not unscales:
            scale_grads(params, 1 / scale)
        assert_same_bits([param.grad for param in params], wanted)
    found = [*params, *state_tensors(optimizer, params)]
    assert_same_bits(found, plain_run(cls, 5)[0])
    assert "grad_scale" not in vars(optimizer)


@pytest.mark.parametrize("unscales", [False, True], ids=["in the step", "before it"])
def test_norm_is_that_of_unscaled_gradients(unscales: bool) -> None:
    params = make_params(SHAPES)
    optimizer, scaler = FusedAdamW(params, max_grad_norm=0.5), new_scaler()
    for step in range(3):
        set_grads(params, step)
        norm = nn.utils.get_total_norm([param.grad for param in params])
        scale_grads(params, scale_of(scaler))
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    expected, _ = plain_run(FusedAdamW, 3, max_grad_norm=0.5)
    assert_same_bits([*params, *state_tensors(optimizer, params)], expected)


@pytest.mark.parametrize("engine", ["cpu", "cuda-on-host"])
def test_norm_after_an_overflow(engine: str) -> None:
    """It is that of the step that was skipped, and what was read before stays what it was."""
    params = make_params(SHAPES)
    optimizer = FusedAdamW(
        params, max_grad_norm=0.5, engine=engine, capturable=engine == "cuda-on-host"
    )
    set_grads(params, 0)
    optimizer.step()
    first = optimizer.grad_norm
    kept = first.clone()
    for value, wanted in ((math.inf, math.inf), (math.nan, math.nan), (1.0, None)):
        set_grads(params, 1)
        params[1].grad[-1] = value
        if wanted is None:  # the scaler may know of an overflow elsewhere
            wanted = nn.utils.get_total_norm([param.grad for param in params])
        before = everything(optimizer, params)
        by_hand(optimizer, params)
        assert everything(optimizer, params) == before
        torch.testing.assert_close(
            optimizer.grad_norm, torch.as_tensor(wanted), rtol=1e-6, atol=0, equal_nan=True
        )
        assert torch.equal(first, kept)


def test_disabled_scaler() -> None:
    params = make_params(SHAPES)
    optimizer = FusedAdamW(params)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        set_grads(params, step)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits([*params, *state_tensors(optimizer, params)], plain_run(FusedAdamW, 3)[0])


def test_several_optimizers_on_one_scaler() -> None:
    """An overflow of one does not keep the others from their step."""
    scaler = new_scaler()
    scale = scale_of(scaler)
    trained = []
    for number, cls in enumerate((FusedAdamW, FusedSGD, FusedLion)):
        params = make_params(SHAPES)
        optimizer = cls(params)
        set_grads(params, 0)
        scale_grads(params, scale)
        if number == 1:
            params[0].grad[0, 0] = math.nan
        before = everything(optimizer, params)
        scaler.step(optimizer)
        trained.append((cls, params, everything(optimizer, params) == before))
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    for cls, params, unchanged in trained:
        assert unchanged == (cls is FusedSGD)
        if not unchanged:
            assert_same_bits(params, plain_run(cls, 1)[0][: len(params)])


def test_accumulated_gradients() -> None:
    """Several backward passes before a step, zeroed by it, as with zero_grad() between."""
    results = []
    for cls, options in ((FusedAdamW, {"zero_grads": True}), (FusedAdamW, {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer, scaler = cls(model.parameters(), lr=0.1, **options), new_scaler()
        held: list[Tensor] = []
        for step in range(4):
            for micro in range(3):
                x = torch.randn(6, 5, generator=torch.Generator().manual_seed(3 * step + micro))
                scaler.scale(model(x).square().mean() / 3).backward()
            held = held or [param.grad for param in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if not options:
                optimizer.zero_grad(set_to_none=False)
            for param, grad in zip(model.parameters(), held, strict=True):
                assert param.grad is grad
                assert not grad.any()
        results.append([param.detach() for param in model.parameters()])
    assert_same_bits(*results)


def test_refused_step_under_a_scaler_writes_nothing() -> None:
    params = make_params(SHAPES)
    optimizer, scaler = FusedNadam(params), new_scaler()
    set_grads(params, 0)
    scale_of(scaler)
    params[1].grad.data = torch.ones(4)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match="parameter 1"):
        scaler.step(optimizer)
    assert everything(optimizer, params) == before


# --- Beside torch's separate steps ---------------------------------------------------------------


class Drawn(nn.Module):
    """The parameters of `make_params`, as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = nn.ParameterList(make_params(SHAPES))


def separately(
    drop_in: DropIn, cls: type[Optimizer], dtype: torch.dtype, max_norm: float, decay: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Five steps of torch's optimizer with all that goes around it; parameters and averages."""
    model = Drawn().to(dtype)
    params = list(model.parameters())
    optimizer, scaler = cls(params, **drop_in.loud), new_scaler()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    for step in range(5):
        set_grads(params, step)
        scale_grads(params, scale_of(scaler))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, max_norm)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        optimizer.zero_grad(set_to_none=False)
    return params, list(average.module.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("max_norm", [0.5, 1e9], ids=["clips", "does not clip"])
@pytest.mark.parametrize("drop_in", DROP_INS, ids=str)
def test_all_at_once_is_torchs_steps_one_by_one(
    drop_in: DropIn, max_norm: float, decay: float
) -> None:
    """To rounding: no farther from torch in float64 than three times torch in float32 is."""
    truth = separately(drop_in, drop_in.theirs, torch.float64, max_norm, decay)
    theirs = separately(drop_in, drop_in.theirs, torch.float32, max_norm, decay)
    params = make_params(SHAPES)
    optimizer, scaler = (
        drop_in.ours(
            params, **drop_in.loud, max_grad_norm=max_norm, ema_decay=decay, zero_grads=True
        ),
        new_scaler(),
    )
    for step in range(5):
        set_grads(params, step)
        scale_grads(params, scale_of(scaler))
        scaler.step(optimizer)
        scaler.update()
        assert all(not param.grad.any() for param in params)
    averages = [optimizer.state[param]["param_ema"] for param in params]
    for found, other, expected in zip((params, averages), theirs, truth, strict=True):
        ours, torchs, exact = (
            torch.cat([x.detach().double().flatten() for x in tensors])
            for tensors in (found, other, expected)
        )
        allowed = 3 * (torchs - exact).abs().max() + 4 * 2.0**-24 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
        assert allowed < 1e-5
    if decay == 0.0:
        assert_same_bits(averages, [param.detach() for param in params])
    if max_norm > 1:  # a scale of a power of two and no clipping round nothing
        plain = make_params(SHAPES)
        by_itself = drop_in.ours(plain, **drop_in.loud)
        for step in range(5):
            set_grads(plain, step)
            by_itself.step()
        assert_same_bits(params, plain)
