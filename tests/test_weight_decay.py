"""Weight decay between conventions, and normalized by the length of training."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fused_adamw import FusedAdamW, convert_weight_decay, normalized_weight_decay
from fused_adamw.schedules import Constant, CosineWarmRestarts

NAN, INF = math.nan, math.inf
UNIT = 2.0**-53  # unit roundoff of float64
CONVENTIONS = ("lr", "decoupled", "proximal", "l2")

# --- Conventions ---------------------------------------------------------------------------------


def factor(convention: str, weight_decay: float, lr: float, eta: float) -> Fraction:
    """What a step multiplies a parameter by, exactly."""
    exact, alpha, scale = Fraction(weight_decay), Fraction(lr), Fraction(eta)
    if convention == "proximal":
        return 1 / (1 + scale * exact)
    return 1 - scale * exact * (1 if convention == "decoupled" else alpha)


conventions = st.sampled_from(CONVENTIONS)
rates = st.floats(1e-6, 2.0)
etas = st.just(0.0) | st.just(1.0) | st.floats(1e-6, 2.0)
decays = st.just(0.0) | st.floats(1e-9, 2.0)


@given(conventions, conventions, decays, rates, etas)
def test_factors_agree(source: str, target: str, decay: float, lr: float, eta: float) -> None:
    given_factor = factor(source, decay, lr, eta)
    # At a factor that rounding may bring to 0, either answer is right.
    assume(target != "proximal" or source == target or given_factor > 8 * UNIT)
    converted = convert_weight_decay(
        decay, source=source, target=target, lr=lr, schedule_multiplier=eta, plain_sgd=True
    )
    found = factor(target, converted, lr, eta)
    # Each of at most six operations may be off by UNIT relative to 1 - d or to 1.
    assert abs(found - given_factor) <= 8 * UNIT * max(1, 1 - given_factor)


@given(conventions, decays, rates, etas)
def test_the_same_convention_keeps_the_bits(
    convention: str, decay: float, lr: float, eta: float
) -> None:
    options = {"source": convention, "target": convention}
    assert convert_weight_decay(decay, **options, lr=lr, schedule_multiplier=eta) == decay


@pytest.mark.parametrize("source", ["lr", "decoupled", "proximal"])
@pytest.mark.parametrize("target", ["lr", "decoupled", "proximal"])
def test_an_optimizer_decays_the_same(source: str, target: str) -> None:
    lr, eta, weight_decay = 0.5, 0.75, 0.3  # loud
    converted = convert_weight_decay(
        weight_decay, source=source, target=target, lr=lr, schedule_multiplier=eta
    )
    results = []
    for decay, value in ((source, weight_decay), (target, converted)):
        param = torch.ones(1, requires_grad=True)
        param.grad = torch.zeros(1)  # so that only the decay acts
        settings: dict[str, Any] = {"decay": decay, "weight_decay": value}
        FusedAdamW([param], lr=lr, schedule_multiplier=eta, **settings).step()
        results.append(param.item())
    assert results[0] == pytest.approx(results[1], rel=2**-22)  # two roundings to float32
    assert results[0] < 0.95


@pytest.mark.parametrize("target", ["lr", "decoupled", "proximal"])
def test_l2_of_plain_sgd(target: str) -> None:
    param = torch.ones(1, dtype=torch.float64, requires_grad=True)
    param.grad = torch.zeros(1, dtype=torch.float64)
    torch.optim.SGD([param], lr=0.5, weight_decay=0.3).step()
    converted = convert_weight_decay(0.3, source="l2", target=target, lr=0.5, plain_sgd=True)
    found = factor(target, converted, 0.5, 1.0)
    assert float(found) == pytest.approx(param.item(), abs=8 * UNIT)


def test_decoupled_is_lr_times_lr_decay_whatever_eta() -> None:
    # eta = 0, where all factors are 1 and a division by eta would fail.
    for eta in (0.0, 1.0):
        options: dict[str, Any] = {"lr": 0.25, "schedule_multiplier": eta}
        assert convert_weight_decay(0.5, source="lr", target="decoupled", **options) == 0.125
        assert convert_weight_decay(0.125, source="decoupled", target="lr", **options) == 0.5


def test_lr_of_zero() -> None:
    def convert(weight_decay: float, source: str, target: str) -> float:
        return convert_weight_decay(
            weight_decay, source=source, target=target, lr=0.0, plain_sgd=True
        )

    assert convert(0.5, "lr", "decoupled") == 0.0
    assert convert(0.5, "lr", "l2") == 0.5
    assert convert(0.5, "decoupled", "proximal") == 1.0
    assert convert(0.0, "decoupled", "lr") == 0.0
    with pytest.raises(ValueError, match=r"accepted for 'lr': lr > 0"):
        convert(0.5, "decoupled", "lr")


@pytest.mark.parametrize(("source", "target"), [("l2", "lr"), ("lr", "l2"), ("proximal", "l2")])
def test_l2_is_refused_but_for_plain_sgd(source: str, target: str) -> None:
    with pytest.raises(ValueError, match=r"'l2' only with plain_sgd=True.*moments"):
        convert_weight_decay(0.1, source=source, target=target, lr=0.1)


@pytest.mark.parametrize(("source", "weight_decay"), [("decoupled", 2.0), ("lr", 4.0), ("lr", 5.0)])
def test_proximal_cannot_reach_zero(source: str, weight_decay: float) -> None:
    with pytest.raises(ValueError, match=r"weight_decay: found .* a factor of -?0\..*'proximal'"):
        convert_weight_decay(
            weight_decay, source=source, target="proximal", lr=0.5, schedule_multiplier=0.5
        )


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        *(({"weight_decay": value}, "weight_decay") for value in (-0.1, NAN, INF, "1", None, True)),
        *(({"lr": value}, "lr") for value in (-0.1, NAN, INF, "1", None)),
        *(({"schedule_multiplier": v}, "schedule_multiplier") for v in (-0.1, NAN, INF, "1")),
        ({"source": "adamw"}, "source"),
        ({"target": None}, "target"),
        ({"weight_decay": 1e300, "source": "decoupled", "lr": 1e-300}, "weight_decay"),
        ({"weight_decay": 1e300, "lr": 1e300, "target": "decoupled"}, "weight_decay"),
        (
            {"weight_decay": 1e300, "source": "proximal", "schedule_multiplier": 1e300},
            "weight_decay",
        ),
    ],
)
def test_refuses_values_to_convert(changed: dict[str, Any], named: str) -> None:
    values = {"weight_decay": 0.1, "source": "proximal", "target": "lr", "lr": 0.1}
    if changed.get("target") == "decoupled":
        values["source"] = "lr"
    with pytest.raises((TypeError, ValueError), match=rf"^{named}: found "):
        convert_weight_decay(**{**values, **changed})


# --- Normalized weight decay ---------------------------------------------------------------------


def test_the_papers_formula() -> None:
    # b = 128 of B = 50,000 points, T = 100 epochs: sqrt(2.56e-5) = 0.0050596...
    found = normalized_weight_decay(0.05, batch_size=128, dataset_size=50_000, epochs=100)
    assert found == pytest.approx(0.05 * 0.00505964425626941, rel=1e-14)


@given(st.floats(1e-6, 1.0), st.integers(1, 10**4), st.integers(1, 10**7), st.floats(0.1, 1e4))
def test_normalized_weight_decay(norm: float, b: int, total: int, epochs: float) -> None:
    found = normalized_weight_decay(norm, batch_size=b, dataset_size=total, epochs=epochs)
    # lambda^2 B T = lambda_norm^2 b; six roundings.
    product = Fraction(found) ** 2 * total * Fraction(epochs)
    assert float(product / (Fraction(norm) ** 2 * b)) == pytest.approx(1.0, abs=8 * UNIT)


def test_follows_restarts() -> None:
    schedule = CosineWarmRestarts(T_0=1000, T_mult=2)
    b, total = 100, 50_000  # 500 steps an epoch: cycles of 2, 4, 8 epochs
    for t, epochs in [(0, 2), (999, 2), (1000, 4), (2999, 4), (3000, 8), (3000.5, 8)]:
        found = normalized_weight_decay(0.05, schedule=schedule, t=t)
        expected = normalized_weight_decay(0.05, batch_size=b, dataset_size=total, epochs=epochs)
        assert found == pytest.approx(expected, rel=4 * UNIT)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        *(({"lambda_norm": value}, "lambda_norm") for value in (-0.1, NAN, "1", None)),
        *(({"batch_size": value}, "batch_size") for value in (0, -1, 1.5, "1")),
        *(({"dataset_size": value}, "dataset_size") for value in (0, -1, 1.5, "1")),
        *(({"epochs": value}, "epochs") for value in (0, -1, NAN, INF, "1")),
    ],
)
def test_refuses_values_to_normalize(changed: dict[str, Any], named: str) -> None:
    values = {"lambda_norm": 0.1, "batch_size": 1, "dataset_size": 10, "epochs": 1}
    with pytest.raises((TypeError, ValueError), match=rf"^{named}: found .*, accepted: "):
        normalized_weight_decay(**{**values, **changed})


@pytest.mark.parametrize(
    "given_values",
    [
        {},
        {"batch_size": 1},
        {"batch_size": 1, "dataset_size": 1},
        {"t": 1},
        {"schedule": CosineWarmRestarts(1)},
        {"schedule": CosineWarmRestarts(1), "t": 1, "epochs": 1},
    ],
)
def test_refuses_half_a_budget(given_values: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="accepted: batch_size, dataset_size, epochs; or schedule"):
        normalized_weight_decay(0.1, **given_values)


def test_follows_no_other_schedule() -> None:
    with pytest.raises(TypeError, match=r"schedule: found Constant.*CosineWarmRestarts"):
        normalized_weight_decay(0.1, schedule=Constant(), t=0)  # type: ignore[call-overload]
