"""Telemetry against NumPy: norms, gradients that are not finite, updates that rounding lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn_training import assert_same_bits, make_params, set_grads, state_tensors, train
from family import CLASSES
from problems import BF16, CPU_ENGINES, F16, F32, TRITON_ENGINES, Engine
from torch import Tensor

from fused_adamw import FusedAdamW, FusedSGD, registration
from fused_adamw.measurements import GroupTelemetry
from fused_adamw.optimizer import FusedOptimizer

SHAPES = [(5,), (), (0, 3), (33, 7), (2049,), (16385,), (4, 16384)]
SCALE = 3.0

# The engines by which the library steps what is in host memory, and the CPU's at every level.
ENGINES: dict[str, Engine | None] = {
    "cpu": None,
    "cuda-on-host": None,
    "reference": None,
    **CPU_ENGINES,
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name to give to an optimizer, whose steps this engine then runs."""
    name: str = request.param
    forced = ENGINES[name]
    if forced is None:
        return name
    monkeypatch.setattr(registration, "engine_for", lambda *_: forced)
    return "cpu"


def numbers(tensors: Sequence[Tensor | None]) -> Any:
    """All elements of a param group as one float64 vector."""
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors if t is not None])


def expected(
    before: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0
) -> GroupTelemetry:
    old, new, grad = map(numbers, (before, params, grads))
    return GroupTelemetry(
        np.sqrt((grad**2).sum()) / scale,
        np.sqrt(((new - old) ** 2).sum()),
        np.sqrt((new**2).sum()),
        int((~np.isfinite(grad)).sum()),
        float(((old == new) & (grad != 0)).mean()) if old.size else 0.0,
    )


def assert_near(found: GroupTelemetry, wanted: GroupTelemetry, norms: int = 3) -> None:
    """The counts exactly; the norms, rounded to float32, of changes rounded to float32, nearly."""
    np.testing.assert_allclose(found[:norms], wanted[:norms], rtol=1e-6)
    assert found[3:] == wanted[3:]
    assert all(np.float32(norm) == norm or np.isnan(norm) for norm in found[:3])


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)])
def test_groups(engine: str, dtypes: tuple[str, str]) -> None:
    """Beside all other options; gradients are those in memory, unscaled and not clipped."""
    param_dtype, grad_dtype = (getattr(torch, dtype) for dtype in dtypes)
    groups = [make_params(SHAPES, param_dtype), make_params([(3,), (40, 50)], param_dtype)]
    optimizer = FusedAdamW(
        [{"params": groups[0], "lr": 0.1}, {"params": groups[1], "lr": 1e-5}],
        engine=engine,
        max_grad_norm=0.5,
        ema_decay=0.9,
        zero_grads=True,
        telemetry=True,
    )
    assert optimizer.telemetry() is None
    optimizer.grad_scale = torch.tensor(SCALE)
    for step in range(3):
        for params in groups:
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad_dtype = grad_dtype
                param.grad = torch.randn(param.shape, generator=generator).to(grad_dtype)
        before = [[param.detach().clone() for param in params] for params in groups]
        grads = [[param.grad.clone() for param in params] for params in groups]
        optimizer.step()
        wanted = [expected(*each, SCALE) for each in zip(before, groups, grads, strict=True)]
        found = optimizer.telemetry()
        assert found is not None
        for of_group, want in zip(found, wanted, strict=True):
            assert_near(of_group, want)
        assert found[0].lost_fraction < 0.1
        norm = np.hypot(found[0].grad_norm, found[1].grad_norm)
        np.testing.assert_allclose(optimizer.grad_norm, norm, rtol=1e-6)


def test_tiny_learning_rate_is_lost_in_bfloat16(engine: str) -> None:
    """What has no gradient is not lost, and a large parameter loses what a small one keeps."""
    large, small = torch.full((100,), 1.0), torch.full((60,), 2.0**-10)
    param = torch.cat([large, small]).bfloat16().requires_grad_()
    grad = torch.ones(160)
    grad[:40] = 0.0
    param.grad = grad.bfloat16()
    optimizer = FusedSGD([param], lr=2.0**-12, engine=engine, telemetry=True)
    optimizer.step()
    found = optimizer.telemetry()
    assert found is not None
    (of_group,) = found
    assert of_group.lost_fraction == 60 / 160
    assert of_group.update_norm == np.float32(np.sqrt(60 * 2.0**-24))
    assert of_group.grad_norm == np.float32(np.sqrt(120))
    assert of_group.nonfinite_grads == 0


def test_gradients_that_are_not_finite(engine: str) -> None:
    """Each is counted, in whatever part of a tensor."""
    params = make_params([(40000,), (7,)])
    set_grads(params, 0)
    for place, value in ((0, np.inf), (1023, -np.inf), (16384, np.nan), (39999, np.nan)):
        params[0].grad[place] = value
    optimizer = FusedAdamW([{"params": [param]} for param in params], engine=engine, telemetry=True)
    optimizer.step()
    found = optimizer.telemetry()
    assert found is not None
    assert [of_group.nonfinite_grads for of_group in found] == [4, 0]
    assert np.isnan(found[0].grad_norm)
    assert np.isfinite(found[1]).all()


def test_parts_without_gradients_or_elements(engine: str) -> None:
    """They have no part in any sum; a step without any gradient is all zeros."""
    params = make_params([(5,), (7,), (0,)])
    optimizer = FusedAdamW(
        [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:]}],
        engine=engine,
        telemetry=True,
    )
    set_grads(params, 0)
    params[1].grad = None
    before = params[0].detach().clone()
    grad = params[0].grad.clone()
    optimizer.step()
    found = optimizer.telemetry()
    assert found is not None
    assert_near(found[0], expected([before], params[:1], [grad]))
    assert found[1:] == [GroupTelemetry(0.0, 0.0, 0.0, 0, 0.0)] * 2
    params[0].grad = params[2].grad = None
    optimizer.step()
    assert optimizer.telemetry() == [GroupTelemetry(0.0, 0.0, 0.0, 0, 0.0)] * 3


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_observing_changes_no_bit(cls: Any, engine: str) -> None:
    results = []
    for observes in (False, True):
        params = make_params()
        optimizer = cls(params, engine=engine, telemetry=observes, ema_decay=0.9)
        train(optimizer, params, range(3))
        results.append([*params, *state_tensors(optimizer, params)])
        assert (optimizer.telemetry() is not None) == observes
    assert_same_bits(*results)


def test_the_last_step_that_was_observed_stands() -> None:
    params = make_params()
    optimizer: FusedOptimizer = FusedAdamW(params, telemetry=True, skip_nonfinite=True)
    train(optimizer, params, range(1))
    found = optimizer.telemetry()
    set_grads(params, 1)
    params[0].grad[0, 0] = np.nan
    optimizer.collect_telemetry = False
    optimizer.step()
    train(optimizer, params, range(2, 3))
    assert optimizer.telemetry() == found


@pytest.mark.parametrize("device", ["cpu", "cuda-on-host"])
@pytest.mark.parametrize("reason", ["found_inf", "found_inf beside a norm", "norm"])
def test_a_skipped_step_has_no_numbers(device: str, reason: str) -> None:
    """On the host and on the device alike, at the first step and later, until one is taken."""
    for steps in (0, 2):
        groups = [make_params([(5,), (7,)]), make_params([(3,)])]
        params = [param for group in groups for param in group]
        optimizer = FusedAdamW(
            [{"params": group} for group in groups],
            engine=device,
            capturable=device == "cuda-on-host",
            telemetry=True,
            skip_nonfinite=reason != "found_inf",
        )
        train(optimizer, params, range(steps))
        set_grads(params, steps)
        params[0].grad[2] = np.inf
        if reason != "norm":
            optimizer.found_inf = torch.ones(())
        optimizer.step()
        found = optimizer.telemetry()
        assert found is not None
        assert [of_group.skipped for of_group in found] == [True, True]
        for of_group in found:
            assert of_group.nonfinite_grads is None
            numbers = (*of_group[:3], of_group.lost_fraction)
            assert all(map(np.isnan, numbers))
            assert all(type(number) is float for number in numbers)
        optimizer.found_inf = torch.zeros(())
        train(optimizer, params, range(steps, steps + 1))
        assert optimizer.telemetry() != found
        assert not any(of_group.skipped for of_group in optimizer.telemetry())


@pytest.mark.skipif(not TRITON_ENGINES, reason="Triton is missing, or does not interpret")
def test_triton_refuses() -> None:
    params = make_params()
    optimizer = FusedAdamW(params, engine="triton", telemetry=True)
    set_grads(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"telemetry: found the engine 'triton', accepted: "):
        optimizer.step()
    assert_same_bits([param.detach() for param in params], before)
    assert not optimizer.state
    assert optimizer.telemetry() is None
