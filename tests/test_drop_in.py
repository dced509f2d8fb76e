"""FusedAdamW in the place of torch.optim.AdamW: interface, hooks, copies, schedulers, semantics."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn_training import (
    DECAYS,
    LOUD,
    MOMENTS,
    Pair,
    assert_same_bits,
    assert_same_to_rounding,
    make_params,
    set_grads,
    state_tensors,
    train,
)
from error_bounds import Bounded, bound_ratio, bounded_update
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, lr_scheduler
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import SWALR, AveragedModel

from fused_adamw import FusedAdamW, reference


def copied_tensors(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    """What a step may write of a parameter, as it is now."""
    return [x.detach().clone() for x in (param, *state_tensors(optimizer, [param]))]


# --- Interface -----------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_follows_torch(amsgrad: bool, maximize: bool) -> None:
    pair = Pair(amsgrad=amsgrad, maximize=maximize)
    pair.train(12)
    pair.check()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_l2_is_torchs_adam(weight_decay: float, amsgrad: bool) -> None:
    pair = Pair(Adam, {"decay": "l2"}, weight_decay=weight_decay, amsgrad=amsgrad)
    pair.train(10)
    pair.check()


@pytest.mark.parametrize("option", ["foreach", "fused", "capturable"])
def test_torchs_choices_of_implementation_change_nothing(option: str) -> None:
    plain, chosen = make_params(), make_params()
    train(FusedAdamW(plain, **LOUD), plain, range(3))
    optimizer = FusedAdamW(chosen, **LOUD, **{option: True})
    train(optimizer, chosen, range(3))
    assert_same_bits(chosen, plain)
    assert optimizer.state_dict()["param_groups"][0][option] is True


def test_names_are_kept() -> None:
    model = nn.Linear(3, 2)
    optimizer = FusedAdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, list(model.parameters()), range(1))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_groups_have_their_own_hyperparameters() -> None:
    params = [make_params(), make_params()]
    for cls, (a, b, *rest) in zip((FusedAdamW, AdamW), params, strict=True):
        groups = [
            {"params": [a], "lr": 0.01, "betas": (0.5, 0.6)},
            {"params": [b], "weight_decay": 0.0, "eps": 0.1, "maximize": True},
            {"params": rest, "amsgrad": True},
        ]
        train(cls(groups, **LOUD), [a, b, *rest], range(5))
    assert_same_to_rounding(*params, 5)


def test_group_for_each_parameter() -> None:
    many = [(n,) for n in range(1, 60)]
    params = [make_params(many), make_params(many)]
    for cls, own in zip((FusedAdamW, AdamW), params, strict=True):
        groups = [{"params": p, "lr": 0.1 / (i + 1)} for i, p in enumerate(own)]
        train(cls(groups, **{**LOUD, "lr": 0.0}), own, range(4))
    assert_same_to_rounding(*params, 4)


def test_group_states_its_convention_in_torchs_terms() -> None:
    a, b = make_params([(3,), (4,)])
    groups = [{"params": [a], "decay": "l2"}, {"params": [b]}]
    optimizer = FusedAdamW(groups, **LOUD)
    assert [g["decoupled_weight_decay"] for g in optimizer.param_groups] == [False, True]


def test_add_param_group_in_training() -> None:
    params = [make_params(), make_params()]
    for cls, (first, *rest) in zip((FusedAdamW, AdamW), params, strict=True):
        optimizer = cls([first], **LOUD)
        train(optimizer, [first], range(3))
        optimizer.add_param_group({"params": rest, "lr": 0.03})
        train(optimizer, [first, *rest], range(3, 6))
        assert optimizer.state[first]["step"] == 6
        assert optimizer.state[rest[0]]["step"] == 3
    assert_same_to_rounding(*params, 6)


def test_closure() -> None:
    calls = []
    for cls in (FusedAdamW, AdamW):
        (param,) = make_params([(5,)])
        optimizer = cls([param], **LOUD)

        def closure(optimizer: Optimizer = optimizer, param: Tensor = param) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (param**2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
        assert not losses[0].isnan()
        calls.append((torch.stack(losses).detach(), param.detach()))
    (our_losses, ours), (their_losses, theirs) = calls
    assert_same_to_rounding([ours], [theirs], 3)
    # A loss is a sum of 5 squares of numbers below 8, each off by what the parameters are.
    torch.testing.assert_close(our_losses, their_losses, rtol=0, atol=5 * 16 * 3 * 128 * 2.0**-24)
    assert optimizer.step() is None


def test_grad_that_requires_grad() -> None:
    (param,) = make_params([(4, 4)])
    optimizer = FusedAdamW([param], **LOUD)
    (param.grad,) = torch.autograd.grad((param.t() ** 3).sum(), param, create_graph=True)
    before = param.detach().clone()
    optimizer.step()
    assert not torch.equal(param, before)
    assert param.requires_grad
    assert param.is_leaf
    assert not any(value.requires_grad for value in optimizer.state[param].values())


def test_zero_grad() -> None:
    params = make_params()
    optimizer = FusedAdamW(params)
    train(optimizer, params, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params if p.grad is not None)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in params)


# --- Hooks ---------------------------------------------------------------------------------------


def test_step_hooks() -> None:
    calls: list[str] = []
    (param,) = make_params([(3,)])
    optimizer = FusedAdamW([param], **LOUD)
    set_grads([param], 0)

    def pre(hooked: Optimizer, args: Any, kwargs: Any) -> Any:
        assert hooked is optimizer
        assert param not in optimizer.state or optimizer.state[param]["step"] == 0
        calls.append("pre")
        return args, {"closure": lambda: "loss of the hook"}

    def post(hooked: Optimizer, args: Any, kwargs: Any) -> None:
        assert hooked.state[param]["step"] == 1
        assert "closure" in kwargs
        calls.append("post")

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    assert optimizer.step() == "loss of the hook"
    assert calls == ["pre", "post"]
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None
    assert calls == ["pre", "post"]


def test_global_step_hooks() -> None:
    calls: list[Any] = []
    params = make_params()
    optimizer = FusedAdamW(params)
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda o, *_: calls.append(("pre", o))),
        torch_optimizer.register_optimizer_step_post_hook(lambda o, *_: calls.append(("post", o))),
    ]
    try:
        train(optimizer, params, range(2))
    finally:
        for handle in handles:
            handle.remove()
    train(optimizer, params, range(2))
    assert calls == [("pre", optimizer), ("post", optimizer)] * 2


def test_state_dict_hooks() -> None:
    calls: list[str] = []
    params = make_params()
    optimizer = FusedAdamW(params)
    train(optimizer, params, range(1))

    def add_note(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("state post")
        return {**state_dict, "note": 1}

    def set_lr(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("load pre")
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("state pre"))
    optimizer.register_state_dict_post_hook(add_note)
    optimizer.register_load_state_dict_pre_hook(set_lr)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load post"))
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == 1
    optimizer.load_state_dict(state_dict)
    assert calls == ["state pre", "state post", "load pre", "load post"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert state_dict["param_groups"][0]["lr"] == 1e-3


# --- Copies --------------------------------------------------------------------------------------


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("together", [False, True])
def test_copies_go_on_independently(copied: Callable[[Any], Any], together: bool) -> None:
    params, expected = make_params(), make_params()
    optimizer = FusedAdamW(
        params, **LOUD, decay="proximal", engine="cpu", state_dtype=torch.bfloat16
    )
    same = {"decay": "proximal", "state_dtype": torch.bfloat16}
    train(FusedAdamW(expected, **LOUD, **same), expected, range(6))
    train(optimizer, params, range(3))
    if together:
        other_params, other = copied((params, optimizer))
    else:
        other = copied(optimizer)
        other_params = other.param_groups[0]["params"]
    assert other_params[0] is other.param_groups[0]["params"][0]
    assert other_params[0] is not params[0]
    assert (other.engine, other.state_dtype) == ("cpu", torch.bfloat16)
    assert other.defaults == optimizer.defaults

    middle = [param.detach().clone() for param in params]
    train(other, other_params, range(3, 6))
    assert_same_bits(other_params, expected)
    assert_same_bits(params, middle)
    train(optimizer, params, range(3, 6))
    assert_same_bits(params, expected)
    assert_same_bits(other_params, expected)


# --- Schedulers and company ----------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=13),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_torchs(name: str) -> None:
    pair = Pair()
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (pair.ours, pair.theirs)]
    seen = set()
    for _ in range(12):
        pair.train(1)
        for scheduler in schedulers:
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
        (ours,), (theirs,) = pair.ours.param_groups, pair.theirs.param_groups
        assert (ours["lr"], ours["betas"]) == (theirs["lr"], theirs["betas"])
        seen.add((ours["lr"], ours["betas"]))
    assert len(seen) > 2
    pair.check()


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "LambdaLR"])
def test_schedulers_write_into_a_tensor_lr(name: str) -> None:
    """And so it is in torch; the step reads the tensor each time."""
    ours, expected = make_params(), make_params()
    lr = torch.tensor(0.1)
    optimizer = FusedAdamW(ours, **{**LOUD, "lr": lr})
    scheduler = SCHEDULERS[name](optimizer)
    plain = FusedAdamW(expected, **LOUD)
    for step in range(6):
        plain.param_groups[0]["lr"] = float(lr)
        train(optimizer, ours, range(step, step + 1))
        train(plain, expected, range(step, step + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) != pytest.approx(0.1)
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr(dtype: torch.dtype) -> None:
    ours, expected = make_params(), make_params()
    lr = torch.tensor(0.1, dtype=dtype)
    optimizer = FusedAdamW(ours, **{**LOUD, "lr": lr})
    plain = FusedAdamW(expected, **{**LOUD, "lr": float(lr)})
    train(optimizer, ours, range(2))
    train(plain, expected, range(2))
    lr.mul_(0.25)
    plain.param_groups[0]["lr"] = float(lr)
    train(optimizer, ours, range(2, 4))
    train(plain, expected, range(2, 4))
    assert_same_bits(ours, expected)


def test_averaged_model() -> None:
    averages = []
    for cls in (FusedAdamW, AdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = cls(model.parameters(), **LOUD)
        averaged = AveragedModel(model)
        scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        for step in range(6):
            train(optimizer, list(model.parameters()), range(step, step + 1))
            averaged.update_parameters(model)
            scheduler.step()
        averages.append(list(averaged.module.parameters()))
    assert_same_to_rounding(*averages, 6)


def test_grad_scaler() -> None:
    results = []
    for cls in (FusedAdamW, AdamW):
        (param,) = make_params([(6,)])
        optimizer = cls([param], **LOUD)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            before = copied_tensors(optimizer, param)
            optimizer.zero_grad()
            factor = math.inf if step in (0, 2) else 1.0  # an overflow on the first step too
            scaler.scale((param**2).sum() * factor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([param], 1.0)
            scaler.step(optimizer)
            scaler.update()
            if factor == math.inf:
                assert_same_bits(copied_tensors(optimizer, param), before)
        assert scaler.get_scale() == 256.0
        assert optimizer.state[param]["step"] == 3
        results.append(param.detach())
    # The gradient depends on the parameter here, so that differences may pass on: twice as much.
    assert_same_to_rounding(results[:1], results[1:], 2 * 3)


def test_clipped_gradients() -> None:
    pair = Pair()
    for step in range(4):
        for optimizer, params in pair.both():
            set_grads(params, step)
            nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
    pair.steps = 4
    pair.check()


# --- Which parameters a step updates -------------------------------------------------------------


def test_params_without_gradient_keep_state_and_step() -> None:
    """Gradients that come late, stay away, and go; frozen parameters; steps that differ."""
    with_gradient = [{0}, {0, 1}, {1, 4}, {0, 1, 2, 3, 4}, set(), {2, 4}, {0, 1, 2, 3, 4}]
    pair = Pair(amsgrad=True)
    for step, indices in enumerate(with_gradient):
        before = [copied_tensors(pair.ours, param) for param in pair.our_params]
        for optimizer, params in pair.both():
            set_grads(params, step)
            for i, param in enumerate(params):
                param.requires_grad_(i in indices)
                if i not in indices:
                    param.grad = None
            optimizer.step()
        for i, param in enumerate(pair.our_params):
            if i not in indices:
                assert_same_bits(copied_tensors(pair.ours, param), before[i])
        keys = [[list(o.state.get(p, {})) for p in params] for o, params in pair.both()]
        assert keys[0] == keys[1]
    pair.steps = len(with_gradient)
    pair.check()
    assert [float(pair.ours.state[p]["step"]) for p in pair.our_params] == [4.0, 4.0, 3.0, 2.0, 4.0]


def test_one_gradient_for_two_parameters() -> None:
    """Gradients are only read, so they may share memory."""
    ours, expected = make_params([(4,), (4,)]), make_params([(4,), (4,)])
    gradient = torch.randn(4)
    for params, grads in ((ours, [gradient] * 2), (expected, [gradient, gradient.clone()])):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        FusedAdamW(params, **LOUD).step()
    assert_same_bits(ours, expected)


# --- Hyperparameters against the truth -----------------------------------------------------------

CHANGES: list[dict[str, Any]] = [
    {},
    {"lr": 0.03},
    {"betas": (0.5, 0.9)},
    {"eps": 0.1},
    {"weight_decay": 0.3},
    {"schedule_multiplier": 0.25},
    {"lr": 0.2, "betas": (0.0, 0.0)},
    {"weight_decay": 0.0, "schedule_multiplier": 0.0},
    {"lr": 0.0, "weight_decay": 0.1, "schedule_multiplier": 1.0},
    {"lr": 0.1, "betas": (0.95, 0.999), "maximize": True},
]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_changed_hyperparameters_against_float64(decay: str, amsgrad: bool) -> None:
    """Each step within the bound that `error_bounds` derives for float32."""
    (param,) = make_params([(257,)])
    optimizer = FusedAdamW([param], **LOUD, decay=decay, amsgrad=amsgrad)
    zeros = Bounded.exact(np.zeros(257))
    start = Bounded.exact(param.detach().numpy())
    truth = [start, zeros, zeros, *([zeros] if amsgrad else [])]
    (group,) = optimizer.param_groups
    for step, changes in enumerate(CHANGES):
        group.update(changes)
        set_grads([param], step)
        optimizer.step()
        truth = bounded_update(
            "adam",
            truth[0],
            param.grad.numpy(),
            *truth[1:],
            step=step + 1,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{k: group[k] for k in ("lr", "eps", "weight_decay", "schedule_multiplier")},
            decay=decay,
            amsgrad=amsgrad,
            maximize=group["maximize"],
        )
        found = [param.detach(), *(optimizer.state[param][name] for name in MOMENTS)]
        for value, bounded in zip(found, truth[:3], strict=True):
            assert np.isfinite(bounded.error).all()
            assert bound_ratio(value.numpy(), bounded) <= 1


def test_changed_hyperparameters_follow_torch() -> None:
    """The same against another's arithmetic, where torch knows the hyperparameter."""
    pair = Pair(amsgrad=True)
    for changes in CHANGES:
        known = {k: v for k, v in changes.items() if k != "schedule_multiplier"}
        for optimizer in (pair.ours, pair.theirs):
            optimizer.param_groups[0].update(known)
        pair.train(1)
    pair.check()


@pytest.mark.parametrize(
    ("decay", "kept"),
    [
        ("lr", 1 - 0.5 * 0.1 * 0.25),
        ("decoupled", 1 - 0.5 * 0.25),
        ("l2", 1.0),
        ("proximal", 1 / (1 + 0.5 * 0.25)),
    ],
)
def test_schedule_multiplier_and_decay_in_closed_form(decay: str, kept: float) -> None:
    """eta = 0.5, alpha = 0.1, lambda = 0.25: what a zero gradient and a first step make of 2."""
    options = {"lr": 0.1, "weight_decay": 0.25, "decay": decay, "schedule_multiplier": 0.5}
    still, moved = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(2.0))
    still.grad, moved.grad = torch.tensor(0.0), torch.tensor(3.0)
    FusedAdamW([still, moved], **options, eps=0.0 if decay == "l2" else 1e-8).step()
    # A first step is eta alpha sign(g): m_hat = g, v_hat = g^2. With "l2" a zero gradient is
    # lambda theta > 0, and with "proximal" the step is within what is divided.
    update = 0.5 * 0.1
    scale = kept if decay == "proximal" else 1.0
    expected_still = 2.0 - update if decay == "l2" else 2.0 * kept
    expected_moved = 2.0 * kept - update * scale
    # 8 roundings of numbers up to 2, and eps of 1e-8 beside a root of 3.
    assert abs(still.item() - expected_still) <= 8 * 2 * 2.0**-24
    assert abs(moved.item() - expected_moved) <= 8 * 2 * 2.0**-24 + 1e-9


@pytest.mark.parametrize("decay", ["decoupled", "l2"])
def test_schedule_multiplier_is_that_of_the_paper(decay: Any) -> None:
    (param,) = make_params([(64,)])
    optimizer = FusedAdamW([param], **LOUD, decay=decay)
    beta1, beta2 = LOUD["betas"]
    theta, m, v = param.detach().double().numpy(), np.zeros(64), np.zeros(64)
    for t in range(1, 7):
        eta = 0.5 * (1 + math.cos(math.pi * t / 8))
        optimizer.param_groups[0]["schedule_multiplier"] = eta
        set_grads([param], t)
        optimizer.step()
        theta, m, v, _ = reference.algorithm_2(
            theta,
            param.grad.numpy(),
            m,
            v,
            step=t,
            beta1=beta1,
            beta2=beta2,
            **{k: LOUD[k] for k in ("lr", "eps", "weight_decay")},
            schedule_multiplier=eta,
            decay=decay,
        )
    assert_same_to_rounding([param.detach().double()], [torch.from_numpy(theta)], 6)
