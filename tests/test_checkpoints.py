"""Checkpoints: to and from torch, own ones, old ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn_training import (
    DECAYS,
    LOUD,
    MOMENTS,
    assert_same_bits,
    assert_same_to_rounding,
    make_params,
    saved,
    set_grads,
    state_tensors,
    train,
)
from family import CASES, CLASSES, DROP_INS, DropIn, assert_as_near_as, in_id, numbers_of, params_in
from torch.optim import SGD, Adam, AdamW, Optimizer

import fused_adamw
from fused_adamw import FusedAdamW, schedules


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [(AdamW, FusedAdamW), (FusedAdamW, AdamW)], ids=["from torch", "to torch"]
)
def test_checkpoints_are_exchanged_with_torch(
    first: type[Optimizer], second: type[Optimizer], amsgrad: bool
) -> None:
    params, expected = make_params(), make_params()
    uninterrupted = AdamW(expected, **LOUD, amsgrad=amsgrad)
    train(uninterrupted, expected, range(8))

    begun = first(params, **LOUD, amsgrad=amsgrad)
    train(begun, params, range(4))
    continued = second(params)  # the hyperparameters come with the checkpoint
    continued.load_state_dict(saved(begun.state_dict()))
    train(continued, params, range(4, 8))

    assert_same_to_rounding(params, expected, 8)
    assert_same_to_rounding(
        state_tensors(continued, params), state_tensors(uninterrupted, expected), 8
    )
    assert all(continued.state[p]["step"] == 8 for p in params)
    for name, value in LOUD.items():
        assert continued.param_groups[0][name] == value


def test_checkpoint_survives_the_way_through_torch() -> None:
    """What torch does not know of comes back as it went."""
    params = make_params()
    ours = FusedAdamW(params, **LOUD, decay="decoupled", schedule_multiplier=0.5)
    train(ours, params, range(2))
    torchs = AdamW(params)
    torchs.load_state_dict(saved(ours.state_dict()))
    back = FusedAdamW(params, decay="decoupled")
    back.load_state_dict(saved(torchs.state_dict()))
    assert back.param_groups[0]["schedule_multiplier"] == 0.5
    assert back.param_groups[0]["decay"] == "decoupled"


def test_adams_checkpoint_belongs_to_l2() -> None:
    params, expected = make_params(), make_params()
    train(Adam(expected, **LOUD), expected, range(6))
    begun = Adam(params, **LOUD)
    train(begun, params, range(3))
    continued = FusedAdamW(params, decay="l2")
    continued.load_state_dict(saved(begun.state_dict()))
    train(continued, params, range(3, 6))
    assert_same_to_rounding(params, expected, 6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decay": "proximal"}])
def test_own_checkpoint_continues_with_the_same_bits(options: dict[str, Any]) -> None:
    params, expected = make_params(), make_params()
    train(FusedAdamW(expected, **LOUD, **options), expected, range(6))
    begun = FusedAdamW(params, **LOUD, **options)
    train(begun, params, range(3))
    continued = FusedAdamW(params, decay=options.get("decay", "lr"))
    continued.load_state_dict(saved(begun.state_dict()))
    train(continued, params, range(3, 6))
    assert_same_bits(params, expected)


def test_checkpoint_after_amsgrad_was_turned_off() -> None:
    """The maximum stays among the states, in torch too: such a checkpoint must load again."""
    params, expected = make_params(), make_params()
    for own in (params, expected):
        optimizer = FusedAdamW(own, **LOUD, amsgrad=True)
        train(optimizer, own, range(2))
        optimizer.param_groups[0]["amsgrad"] = False
        train(optimizer, own, range(2, 3))
        if own is params:
            state_dict = saved(optimizer.state_dict())
            optimizer = FusedAdamW(own)
            optimizer.load_state_dict(state_dict)
        train(optimizer, own, range(3, 5))
    assert_same_bits(params, expected)


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda n: torch.tensor([float(n)])])
def test_old_checkpoints_of_torch(kind: Callable[[int], Any]) -> None:
    """Their step was a number, and their groups had fewer keys."""
    params, expected = make_params(), make_params()
    train(FusedAdamW(expected, **LOUD), expected, range(5))
    begun = FusedAdamW(params, **LOUD)
    train(begun, params, range(3))
    old = saved(begun.state_dict())
    for state in old["state"].values():
        state["step"] = kind(int(state["step"]))
    known = {*LOUD, "amsgrad", "params"}
    old["param_groups"] = [{k: group[k] for k in known} for group in old["param_groups"]]
    continued = FusedAdamW(params)
    continued.load_state_dict(old)
    step = continued.state[params[0]]["step"]
    assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 3.0)
    train(continued, params, range(3, 5))
    assert_same_bits(params, expected)


def test_loaded_states_are_not_shared() -> None:
    params = make_params()
    optimizer = FusedAdamW(params, **{**LOUD, "lr": torch.tensor(0.1)})
    train(optimizer, params, range(2))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    loaded = FusedAdamW(make_params())
    loaded.load_state_dict(state_dict)
    train(loaded, loaded.param_groups[0]["params"], range(2, 4))
    loaded.param_groups[0]["lr"].fill_(7.0)
    assert state_dict["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(state_dict["state"][index][name], value)


def test_params_without_a_saved_state_start_anew() -> None:
    a, b = make_params([(3,), (4,)])
    optimizer = FusedAdamW([a, b], **LOUD)
    set_grads([a], 0)
    optimizer.step()
    state_dict = saved(optimizer.state_dict())
    assert list(state_dict["state"]) == [0]
    optimizer.load_state_dict(state_dict)
    train(optimizer, [a, b], range(1, 3))
    assert [float(optimizer.state[p]["step"]) for p in (a, b)] == [3.0, 2.0]


def test_checkpoint_of_other_strides() -> None:
    (plain,), (transposed,) = make_params([(4, 6)]), make_params([(4, 6)])
    transposed.data = transposed.detach().t().contiguous().t()
    begun = FusedAdamW([transposed], **LOUD)
    train(begun, [transposed], range(2))
    expected = FusedAdamW([plain], **LOUD)
    train(expected, [plain], range(4))
    (continued,) = make_params([(4, 6)])
    continued.data = transposed.detach().contiguous()
    optimizer = FusedAdamW([continued])
    optimizer.load_state_dict(saved(begun.state_dict()))
    train(optimizer, [continued], range(2, 4))
    assert_same_bits([continued], [plain])


@pytest.mark.parametrize(
    ("param_dtype", "state_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_state_dtype(param_dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    params = make_params(dtype=param_dtype)
    optimizer = FusedAdamW(params, **LOUD, amsgrad=True, state_dtype=state_dtype)
    train(optimizer, params, range(2))
    state_dict = saved(optimizer.state_dict())
    for state in optimizer.state.values():
        assert {state[name].dtype for name in (*MOMENTS, "max_exp_avg_sq")} == {state_dtype}
        assert state["step"].dtype == torch.float32

    same = FusedAdamW(params, state_dtype=state_dtype)
    same.load_state_dict(state_dict)
    assert_same_bits(state_tensors(same, params), state_tensors(optimizer, params))
    other = FusedAdamW(params)
    other.load_state_dict(state_dict)
    for param in params:
        for name in MOMENTS:
            expected = optimizer.state[param][name].to(param_dtype)
            assert_same_bits([other.state[param][name]], [expected])
    train(other, params, range(2, 3))


# --- Every class ---------------------------------------------------------------------------------

BOTH_WAYS = pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])


@BOTH_WAYS
@pytest.mark.parametrize(("drop_in", "options"), CASES, ids=in_id)
def test_every_class_exchanges_checkpoints(
    drop_in: DropIn, options: dict[str, Any], to_torch: bool
) -> None:
    """Ten steps in one and ten in the other are twenty in torch's, to rounding."""
    arguments = {**drop_in.loud, **options}
    ends = []
    for dtype in (torch.float32, torch.float64):
        params = params_in(dtype)
        optimizer = drop_in.theirs(params, **arguments)
        train_in(optimizer, params, range(20))
        ends.append(numbers_of(optimizer, params))
    params = params_in(torch.float32)
    begun = (drop_in.ours if to_torch else drop_in.theirs)(params, **arguments)
    train_in(begun, params, range(10))
    decoupled = {k: v for k, v in options.items() if k == "decoupled_weight_decay"}
    continued = (drop_in.theirs if to_torch else drop_in.ours)(params, **decoupled)
    continued.load_state_dict(saved(begun.state_dict()))
    train_in(continued, params, range(10, 20))
    assert_as_near_as(numbers_of(continued, params), *ends)


@pytest.mark.parametrize("precision", ["bf16", "master"])
@pytest.mark.parametrize(("drop_in", "options"), CASES, ids=in_id)
def test_a_loaded_state_has_the_order_of_a_fresh_one(
    drop_in: DropIn, options: dict[str, Any], precision: str
) -> None:
    """Whatever that of the checkpoint is: graphs are compiled for one order."""
    params = params_in(torch.bfloat16)
    begun = drop_in.ours(params, **options, precision=precision, ema_decay=0.5)
    train_in(begun, params, range(2))
    checkpoint = saved(begun.state_dict())
    states = checkpoint["state"].items()
    checkpoint["state"] = {i: dict(reversed(state.items())) for i, state in states}
    loaded, fresh = (
        drop_in.ours(params, **options, precision="master", ema_decay=0.5) for _ in range(2)
    )
    loaded.load_state_dict(checkpoint)
    for optimizer in (loaded, fresh):
        train_in(optimizer, params, range(2))
    for param in params:
        assert list(loaded.state[param]) == list(fresh.state[param])


def train_in(optimizer: Optimizer, params: list[Any], steps: range) -> None:
    """`train` with the same gradients in every dtype."""
    drawn = make_params()
    for step in steps:
        set_grads(drawn, step)
        for param, other in zip(params, drawn, strict=True):
            assert other.grad is not None
            param.grad = other.grad.to(param.dtype)
        optimizer.step()


RESTARTS = schedules.Product(
    (schedules.LinearWarmup(3, eta_min=0.5), schedules.CosineWarmRestarts(4, 2, eta_min=0.1))
)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_resume_within_a_restart_cycle(cls: Any) -> None:
    """Through a file, in the second cycle: the same bits as never stopping, and the same eta."""
    params, expected = make_params(), make_params()
    options = {"lr": 0.1, "weight_decay": 0.1, "schedule": RESTARTS}
    uninterrupted = cls(expected, **options)
    train(uninterrupted, expected, range(15))
    begun = cls(params, **options)
    train(begun, params, range(7))
    checkpoint = saved(begun.state_dict())
    continued = cls(params)
    continued.load_state_dict(checkpoint)
    assert continued.param_groups[0]["schedule"] == RESTARTS
    train(continued, params, range(7, 15))
    assert_same_bits(params, expected)
    assert_same_bits(state_tensors(continued, params), state_tensors(uninterrupted, expected))
    (group,), (other,) = continued.param_groups, uninterrupted.param_groups
    assert group["schedule_multiplier"] == other["schedule_multiplier"] == RESTARTS(14)
    assert group["schedule_step"] == 15


def test_schedule_survives_the_way_through_torch() -> None:
    params = make_params()
    ours = FusedAdamW(params, schedule=RESTARTS)
    train(ours, params, range(5))
    torchs = AdamW(params)
    torchs.load_state_dict(saved(ours.state_dict()))
    back = FusedAdamW(params)
    back.load_state_dict(saved(torchs.state_dict()))
    assert back.param_groups[0]["schedule"] == RESTARTS
    assert back.param_groups[0]["schedule_step"] == 5


def test_product_of_mu_is_kept_in_float64() -> None:
    params = make_params()
    ours = fused_adamw.FusedNadam(params)
    train(ours, params, range(3))
    theirs = torch.optim.NAdam(params)
    theirs.load_state_dict(saved(ours.state_dict()))
    product = ours.state[params[0]]["mu_product"]
    assert theirs.state[params[0]]["mu_product"].dtype == torch.float32
    assert torch.equal(theirs.state[params[0]]["mu_product"], product.float())
    back = fused_adamw.FusedNadam(params)
    back.load_state_dict(saved(ours.state_dict()))
    assert back.state[params[0]]["mu_product"].dtype == torch.float64
    assert torch.equal(back.state[params[0]]["mu_product"], product)


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_checkpoints_of_other_rules_are_refused(cls: Any, steps: int) -> None:
    """Torch's and ours, with states or without: what loads is of the same rule."""
    params = make_params()
    optimizer = cls(params)
    theirs = {drop_in.ours._rule: drop_in.theirs for drop_in in DROP_INS}
    torchs = [d.theirs for d in DROP_INS if d.theirs is not Adam and d.theirs is not AdamW]
    torchs += [torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop]
    for other in (*CLASSES, *torchs):
        if getattr(other, "_rule", None) == cls._rule or theirs.get(cls._rule) is other:
            continue
        others = make_params()
        source = other(others)
        train(source, others, range(steps))
        with pytest.raises(
            ValueError, match=f"state_dict: .*another algorithm than {cls.__name__}"
        ):
            optimizer.load_state_dict(saved(source.state_dict()))
        assert not optimizer.state


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_another_convention_is_refused_with_the_equivalent(cls: Any) -> None:
    """At lr = 0.5 and lambda = 0.25, of which 0.125 / 0.125 / (1 - 0.125) is left."""
    equivalents = {
        ("lr", "decoupled"): "0.125",
        ("lr", "proximal"): "0.142857143",
        ("decoupled", "lr"): "0.5",
        ("decoupled", "proximal"): "0.333333333",
        ("proximal", "lr"): "0.4",
        ("proximal", "decoupled"): "0.2",
    }
    plain_sgd = {("l2", "lr"): "0.25", ("l2", "decoupled"): "0.125", ("decoupled", "l2"): "0.5"}
    momentum: dict[str, Any] = {"momentum": 0.0} if cls._rule == "sgd" else {}
    for source in DECAYS:
        begun = cls(make_params(), lr=0.5, weight_decay=0.25, decay=source, **momentum)
        checkpoint = saved(begun.state_dict())
        for target in DECAYS:
            optimizer = cls(make_params(), decay=target, **momentum)
            if source == target:
                optimizer.load_state_dict(checkpoint)
                continue
            with pytest.raises(ValueError, match="state_dict: param group 0 has decay") as caught:
                optimizer.load_state_dict(checkpoint)
            message = str(caught.value)
            known = {**equivalents, **(plain_sgd if momentum else {})}.get((source, target))
            if known is not None:
                assert f"weight_decay 0.25 there is {known} in {target!r}" in message
            elif "l2" in (source, target) and not momentum:
                assert message.endswith(
                    f"There is no equivalent in {target!r}: 'l2' decays by way of the moments"
                )
            assert optimizer.param_groups[0]["decay"] == target


@pytest.mark.parametrize("drop_in", DROP_INS[2:], ids=in_id)
def test_torchs_checkpoints_are_of_l2(drop_in: DropIn) -> None:
    """They do not say so, and nothing else may be taken for it."""
    params = make_params()
    theirs = drop_in.theirs(params, **drop_in.loud)
    train(theirs, params, range(1))
    checkpoint = saved(theirs.state_dict())
    checkpoint["param_groups"][0].pop("decoupled_weight_decay", None)
    optimizer = drop_in.ours(params, decay="lr")
    with pytest.raises(ValueError, match="has decay 'l2', this optimizer 'lr'"):
        optimizer.load_state_dict(checkpoint)


def test_torchs_buffer_has_no_learning_rate_in_it() -> None:
    """SGDW takes it as it is, and goes on as torch does."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    params, expected = make_params(), make_params()
    train(SGD(expected, **options), expected, range(8))
    begun = SGD(params, **options)
    train(begun, params, range(4))
    continued = fused_adamw.FusedSGDW(params, decay="l2")
    continued.load_state_dict(saved(begun.state_dict()))
    assert continued.param_groups[0]["lr_in_momentum"] is False
    train(continued, params, range(4, 8))
    assert_same_to_rounding(params, expected, 8)


def test_old_checkpoint_of_sgd() -> None:
    """Once torch saved a buffer of None where there had been no momentum."""
    params, expected = make_params(), make_params()
    for own, cls in ((params, fused_adamw.FusedSGD), (expected, SGD)):
        checkpoint = cls(own, lr=0.1, momentum=0.9, dampening=0.5).state_dict()
        checkpoint["state"] = {i: {"momentum_buffer": None} for i in range(len(own))}
        optimizer = cls(own)
        optimizer.load_state_dict(checkpoint)
        train(optimizer, own, range(3))
    assert_same_to_rounding(params, expected, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", {"kind": "cosine-warm-restarts", "T_0": 0}),
        ("schedule", {"kind": "zigzag"}),
        ("schedule", "cosine"),
        ("schedule_step", -1),
        ("schedule_step", 1.5),
        ("schedule_step", None),
    ],
)
def test_damaged_schedule(name: str, value: Any) -> None:
    optimizer = FusedAdamW(make_params(), schedule=RESTARTS)
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0][name] = value
    with pytest.raises((TypeError, ValueError), match=r"state_dict: param group 0: .*found"):
        optimizer.load_state_dict(checkpoint)
    assert optimizer.param_groups[0]["schedule"] == RESTARTS
    assert optimizer.param_groups[0]["schedule_step"] == 0


@pytest.mark.parametrize("precision", ["bf16", "master", "split", "kahan", "8bit"])
def test_export_is_for_torch_and_leaves_the_optimizer_as_it_was(precision: str) -> None:
    def stepped(exports: bool) -> tuple[torch.Tensor, FusedAdamW]:
        draw = torch.Generator().manual_seed(0)
        param = torch.randn(64, 64, generator=draw).bfloat16().requires_grad_()
        optimizer = FusedAdamW([param], **LOUD, precision=precision)
        for _ in range(3):
            param.grad = torch.randn(64, 64, generator=draw).bfloat16()
            optimizer.step()
            if exports:
                theirs = AdamW([param.detach().float()])
                theirs.load_state_dict(optimizer.export_fp32_state())
                (state,) = theirs.state.values()
                assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
                assert {value.dtype for value in state.values()} == {torch.float32}
        return param, optimizer

    (param, exported), (expected, plain) = stepped(True), stepped(False)
    assert torch.equal(param, expected)
    state, expected_state = exported.state[param], plain.state[expected]
    assert state.keys() == expected_state.keys()
    for name, value in state.items():
        assert value.dtype == expected_state[name].dtype
        assert torch.equal(value, expected_state[name])
