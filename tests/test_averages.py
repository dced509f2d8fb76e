"""The exponential moving average of the parameters: when it begins, where it is kept, swap_ema."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from drawn_training import assert_same_bits, make_params, saved, set_grads, state_tensors, train
from family import CLASSES, DROP_INS, DropIn
from torch import Tensor

from fused_adamw import FusedAdamW, FusedLion, FusedSGD, reference
from fused_adamw import optimizer as optimizer_module
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.whole_step import EMA

DECAY = 0.9
IN_PLACE = r"found the averages in the parameters' place, accepted: outside of `with swap_ema\(\)`"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {
    "max_grad_norm": 2.0,
    "skip_nonfinite": True,
    "ema_decay": 0.75,
    "zero_grads": True,
}

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def averages(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return [optimizer.state[param][EMA] for param in params]


def averaged(average: Tensor, param: Tensor, decay: float = DECAY) -> Tensor:
    """By the reference."""
    numbers = reference.ema(average.numpy(), param.detach().float().numpy(), 1 - decay)
    return torch.from_numpy(numbers)


# --- Beginning -----------------------------------------------------------------------------------


@all_dtypes
@every_class
def test_average_follows_the_stored_parameter(cls: Any, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer = cls(params, ema_decay=DECAY)
    train(optimizer, params, range(1))
    wanted = [param.detach().float().clone() for param in params]
    assert_same_bits(averages(optimizer, params), wanted)
    for step in range(1, 4):
        train(optimizer, params, range(step, step + 1))
        wanted = [averaged(w, param) for w, param in zip(wanted, params, strict=True)]
        assert_same_bits(averages(optimizer, params), wanted)
        assert all(average.dtype == torch.float32 for average in averages(optimizer, params))


def late_run(cls: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The second of two parameters has its first gradient at step 3, and none at step 5."""
    params = make_params([(5,), (7,)])
    optimizer = cls(params, **options)
    found = []
    for step in range(7):
        set_grads(params, step)
        if step < 3 or step == 5:
            params[1].grad = None
        optimizer.step()
        if EMA in vars(optimizer)["state"].get(params[1], {}):
            found.append(vars(optimizer)["state"][params[1]][EMA].clone())
    return [param.detach() for param in params], found


@every_class
def test_a_late_first_gradient(cls: Any) -> None:
    """The average is where the parameter was, as AveragedModel's copy, and stays where it does."""
    start = make_params([(5,), (7,)])[1].detach()
    params, found = late_run(cls, ema_decay=DECAY)
    plain, none = late_run(cls)
    assert_same_bits(params, plain)
    assert not none
    assert len(found) == 4
    assert torch.equal(found[1], found[2])  # of steps 4 and 5
    last = averaged(found[2], params[1])
    assert torch.equal(found[3], last)
    assert not torch.equal(found[0], start)
    assert (found[0] - start).abs().max() < 0.2 * (params[1] - start).abs().max()


@every_class
def test_average_turned_on_in_the_middle(cls: Any) -> None:
    """Also of a parameter that has no gradient just then, and off and on again."""
    params = make_params([(5,), (7,)])
    optimizer = cls(params)
    train(optimizer, params, range(2))
    plain = make_params([(5,), (7,)])
    by_itself = cls(plain)
    train(by_itself, plain, range(2))

    optimizer.ema_decay = DECAY
    for step in range(2, 6):
        for each, own in ((params, optimizer), (plain, by_itself)):
            set_grads(each, step)
            if step == 2:
                each[1].grad = None
            own.step()
        if step == 2:
            wanted = params[0].detach().clone()
            late = params[1].detach().clone()
            assert torch.equal(optimizer.state[params[0]][EMA], wanted)
            assert EMA not in optimizer.state[params[1]]
        else:
            wanted, late = averaged(wanted, params[0]), averaged(late, params[1])
    assert_same_bits(averages(optimizer, params), [wanted, late])
    assert_same_bits(params, plain)

    optimizer.ema_decay = None
    train(optimizer, params, range(6, 8))
    assert_same_bits(averages(optimizer, params), [wanted, late])
    optimizer.ema_decay = 0.5
    train(optimizer, params, range(8, 9))
    wanted = averaged(wanted, params[0], 0.5)
    assert torch.equal(optimizer.state[params[0]][EMA], wanted)


def test_gradient_that_comes_after_the_average_was_turned_on() -> None:
    """Nobody looks at the state in between, so that what is registered stays."""
    params = make_params([(5,), (7,)])
    optimizer = FusedAdamW(params)
    train(optimizer, params, range(1))
    optimizer.ema_decay = DECAY
    set_grads(params, 1)
    params[1].grad = None
    optimizer.step()
    start = params[1].detach().clone()
    train(optimizer, params, range(2, 3))
    assert torch.equal(optimizer.state[params[1]][EMA], averaged(start, params[1]))


def test_momentum_turned_on_beside_averages() -> None:
    """Of a parameter that has a gradient then, and of one whose gradient comes later."""
    results = []
    for options in ({}, {"ema_decay": DECAY}):
        params = make_params([(5,), (7,)])
        optimizer = FusedSGD(params, lr=0.1, **options)
        train(optimizer, params, range(2))
        optimizer.param_groups[0]["momentum"] = 0.9
        set_grads(params, 2)
        params[1].grad = None
        optimizer.step()
        train(optimizer, params, range(3, 5))
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    assert_same_bits(*results)


def test_a_refused_first_step_leaves_no_average() -> None:
    params = make_params([(5,), (7,)])
    optimizer = FusedAdamW(params)
    train(optimizer, params, range(1))
    optimizer.ema_decay = DECAY
    set_grads(params, 1)
    params[1].grad.data = torch.ones(3)
    with pytest.raises(ValueError, match="parameter 1"):
        optimizer.step()
    assert all(EMA not in optimizer.state[param] for param in params)


# --- Checkpoints ---------------------------------------------------------------------------------


@all_dtypes
@every_class
def test_checkpoint(cls: Any, dtype: torch.dtype) -> None:
    """Averages stay in float32, and go on where they were."""
    expected = make_params(dtype=dtype)
    uninterrupted = cls(expected, ema_decay=DECAY)
    train(uninterrupted, expected, range(6))
    params = make_params(dtype=dtype)
    begun = cls(params, ema_decay=DECAY)
    train(begun, params, range(3))
    checkpoint = saved(begun.state_dict())
    for state in checkpoint["state"].values():
        assert state[EMA].dtype == torch.float32
    continued = cls(params, ema_decay=DECAY)
    continued.load_state_dict(checkpoint)
    assert_same_bits(averages(continued, params), averages(begun, params))
    assert all(
        mine.data_ptr() != theirs.data_ptr()
        for mine, theirs in zip(averages(continued, params), averages(begun, params), strict=True)
        if mine.numel()
    )
    train(continued, params, range(3, 6))
    assert_same_bits(
        [*params, *state_tensors(continued, params)],
        [*expected, *state_tensors(uninterrupted, expected)],
    )


@pytest.mark.parametrize("drop_in", DROP_INS, ids=str)
def test_checkpoint_of_torch_has_no_averages(drop_in: DropIn) -> None:
    """They begin with the next step; torch in turn takes a checkpoint that has them."""
    params = make_params()
    theirs = drop_in.theirs(params, **drop_in.loud)
    train(theirs, params, range(2))
    ours = drop_in.ours(params, **drop_in.loud, ema_decay=DECAY)
    ours.load_state_dict(saved(theirs.state_dict()))
    train(ours, params, range(2, 3))
    assert_same_bits(averages(ours, params), [param.detach() for param in params])
    train(ours, params, range(3, 4))
    theirs.load_state_dict(saved(ours.state_dict()))
    train(theirs, params, range(4, 5))
    back = drop_in.ours(params, **drop_in.loud, ema_decay=DECAY)
    back.load_state_dict(saved(theirs.state_dict()))
    assert_same_bits(averages(back, params), averages(ours, params))


def test_checkpoint_with_an_average_of_another_shape_is_refused() -> None:
    params = make_params([(5,), (7,)])
    optimizer = FusedAdamW(params, ema_decay=DECAY)
    train(optimizer, params, range(1))
    checkpoint = saved(optimizer.state_dict())
    checkpoint["state"][1][EMA] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"parameter 1: 'param_ema' has shape \(5,\)"):
        optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_the_options(copied: Any) -> None:
    optimizer = FusedAdamW(make_params(), **OPTIONS, telemetry=True)
    train(optimizer, optimizer.param_groups[0]["params"], range(2))
    other = copied(optimizer)
    assert {name: getattr(other, name) for name in OPTIONS} == OPTIONS
    assert other.collect_telemetry is True
    for own in (optimizer, other):
        train(own, own.param_groups[0]["params"], range(2, 4))
    params, others = (own.param_groups[0]["params"] for own in (optimizer, other))
    assert_same_bits(
        [*params, *state_tensors(optimizer, params)], [*others, *state_tensors(other, others)]
    )
    assert torch.equal(optimizer.grad_norm, other.grad_norm)
    assert optimizer.telemetry() == other.telemetry()


# --- swap_ema ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["", "the body raises"])
@all_dtypes
def test_swap(dtype: torch.dtype, fails: bool) -> None:
    """The parameters have their averages' values, rounded; then everything is what it was."""
    params = make_params(dtype=dtype)
    params[0].data = params[0].data.t()
    late = torch.nn.Parameter(torch.ones(3, dtype=dtype))  # has no average
    optimizer = FusedLion([*params, late], lr=0.1, ema_decay=DECAY)
    train(optimizer, params, range(3))
    values, means = (
        [t.detach().clone() for t in ts] for ts in (params, averages(optimizer, params))
    )
    memory = [param.data_ptr() for param in params]
    version = params[1]._version
    assert not torch.equal(values[1].float(), means[1])
    with pytest.raises(KeyError) if fails else nullcontext(), optimizer.swap_ema():
        assert_same_bits([param.detach() for param in params], [mean.to(dtype) for mean in means])
        assert torch.equal(late, torch.ones(3, dtype=dtype))
        assert params[1]._version > version
        if fails:
            raise KeyError
    assert_same_bits([param.detach() for param in params], values)
    assert_same_bits(averages(optimizer, params), means)
    assert [param.data_ptr() for param in params] == memory

    plain = make_params(dtype=dtype)
    plain[0].data = plain[0].data.t()
    unswapped = FusedLion(plain, lr=0.1, ema_decay=DECAY)
    train(unswapped, plain, range(5))
    train(optimizer, params, range(3, 5))
    assert_same_bits([*params, *averages(optimizer, params)], [*plain, *averages(unswapped, plain)])


def test_swap_refuses_a_step_and_another_swap() -> None:
    params = make_params()
    optimizer = FusedAdamW(params, ema_decay=DECAY)
    with pytest.raises(RuntimeError, match=r"swap_ema: found no averages, accepted: after a step"):
        optimizer.swap_ema().__enter__()
    train(optimizer, params, range(2))
    values = [param.detach().clone() for param in params]
    set_grads(params, 2)
    with optimizer.swap_ema():
        means = [param.detach().clone() for param in params]
        with (
            pytest.raises(RuntimeError, match=rf"^swap_ema: {IN_PLACE}"),
            optimizer.swap_ema(),
        ):
            pass
        with pytest.raises(RuntimeError, match=f"^step: {IN_PLACE}"):
            optimizer.step()
        assert_same_bits([param.detach() for param in params], means)
    assert_same_bits([param.detach() for param in params], values)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 3


def test_swap_refuses_checkpoints_and_copies() -> None:
    """In which parameters and averages would have changed places."""
    params = make_params()
    optimizer = FusedAdamW(params, ema_decay=DECAY)
    train(optimizer, params, range(2))
    checkpoint = saved(optimizer.state_dict())
    before = averages(optimizer, params)
    kept = [average.clone() for average in before]
    with optimizer.swap_ema():
        for attempt, name in (
            (optimizer.state_dict, "state_dict"),
            (lambda: optimizer.load_state_dict(checkpoint), "load_state_dict"),
            (lambda: copy.deepcopy(optimizer), "copying or pickling an optimizer"),
            (lambda: pickle.dumps(optimizer), "copying or pickling an optimizer"),
        ):
            with pytest.raises(RuntimeError, match=f"^{name}: {IN_PLACE}"):
                attempt()
    assert_same_bits(averages(optimizer, params), kept)
    assert_same_bits([state[EMA] for state in optimizer.state_dict()["state"].values()], kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swap_that_fails_half_way_exchanges_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params(dtype=dtype)
    optimizer = FusedAdamW(params, ema_decay=DECAY)
    train(optimizer, params, range(2))
    tensors = [*params, *averages(optimizer, params)]
    kept = [tensor.detach().clone() for tensor in tensors]
    exchange, done = optimizer_module._exchange, []

    def fails_third(param: Tensor, ema: Tensor) -> Tensor | None:
        done.append(param)
        if len(done) == 3:
            raise MemoryError
        return exchange(param, ema)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer_module, "_exchange", fails_third)
        with pytest.raises(MemoryError):
            optimizer.swap_ema().__enter__()
    assert_same_bits([tensor.detach() for tensor in tensors], kept)
    train(optimizer, params, range(2, 3))
    with optimizer.swap_ema():
        pass


def test_averages_without_a_decay() -> None:
    """They are kept, not swapped in: steps have left them behind. A checkpoint's warn."""
    params = make_params()
    optimizer = FusedAdamW(params, ema_decay=DECAY)
    train(optimizer, params, range(2))
    other = FusedAdamW(params)
    with pytest.warns(UserWarning, match=r"^ema_decay: found None beside a state_dict") as caught:
        other.load_state_dict(saved(optimizer.state_dict()))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with (
        pytest.raises(RuntimeError, match=r"^swap_ema: found ema_decay None.*accepted: a number"),
        other.swap_ema(),
    ):
        pass
    other.ema_decay = DECAY
    with other.swap_ema():
        assert_same_bits([param.detach() for param in params], averages(optimizer, params))
