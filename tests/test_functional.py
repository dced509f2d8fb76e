"""functional.adamw is what the class does, and what torch's function of that name does."""

from __future__ import annotations

from itertools import product
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
    set_grads,
    train,
)
from torch import Tensor
from torch.optim import adamw as torch_adamw

from fused_adamw import FusedAdamW, available_engines, functional

STEPS = 4
LISTS = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")


def call(function: Any, lists: dict[str, list[Tensor]], **options: Any) -> None:
    """One step by the gradients of the parameters, the lists written in place."""
    beta1, beta2 = LOUD["betas"]
    loud = {name: LOUD[name] for name in ("lr", "eps", "weight_decay")}
    loud |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
    function(**lists, grads=[param.grad for param in lists["params"]], **{**loud, **options})


def run(function: Any, lists: dict[str, list[Tensor]], **options: Any) -> None:
    for step in range(STEPS):
        set_grads(lists["params"], step)
        call(function, lists, **options)


def make_lists(amsgrad: bool, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    params = [param.detach() for param in make_params(dtype=dtype)]
    lists = {name: [torch.zeros_like(param) for param in params] for name in LISTS[1:4]}
    if not amsgrad:
        lists["max_exp_avg_sqs"] = []
    steps = [torch.tensor(0.0) for _ in params]
    return {"params": params, **lists, "state_steps": steps}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("decay", "amsgrad", "maximize"), [*product(DECAYS, (False, True), (False, True))]
)
def test_equals_the_class(decay: str, amsgrad: bool, maximize: bool, dtype: torch.dtype) -> None:
    options = {"decay": decay, "maximize": maximize, "schedule_multiplier": 0.75}
    lists = make_lists(amsgrad, dtype)
    run(functional.adamw, lists, amsgrad=amsgrad, **options)

    params = make_params(dtype=dtype)
    optimizer = FusedAdamW(params, **LOUD, amsgrad=amsgrad, **options)
    train(optimizer, params, range(STEPS))
    assert_same_bits(lists["params"], [param.detach() for param in params])
    names = dict(zip(LISTS[1:], (*MOMENTS, "max_exp_avg_sq", "step"), strict=True))
    for name, key in names.items():
        expected = [optimizer.state[p][key] for p in params if key in optimizer.state[p]]
        assert_same_bits(lists[name], expected)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_follows_torchs_function(amsgrad: bool, maximize: bool) -> None:
    options = {"amsgrad": amsgrad, "maximize": maximize}
    ours, theirs = make_lists(amsgrad), make_lists(amsgrad)
    run(functional.adamw, ours, **options)
    run(torch_adamw.adamw, theirs, **options, foreach=False)
    for name in LISTS:
        assert_same_to_rounding(ours[name], theirs[name], STEPS)


def test_takes_torchs_lists_by_position() -> None:
    def by_position(**arguments: Any) -> None:
        lists = [arguments.pop(name) for name in (LISTS[0], "grads", *LISTS[1:])]
        functional.adamw(*lists, **arguments)

    lists, expected = make_lists(True), make_lists(True)
    run(by_position, lists, amsgrad=True)
    run(functional.adamw, expected, amsgrad=True)
    assert_same_bits(lists["params"], expected["params"])


@pytest.mark.parametrize("engine", ["auto", *(e for e in available_engines() if e != "cuda")])
def test_engine(engine: str) -> None:
    lists, expected = make_lists(False), make_lists(False)
    run(functional.adamw, lists, engine=engine)
    run(functional.adamw, expected)
    for name in LISTS:
        assert_same_bits(lists[name], expected[name])


def test_tensor_lr() -> None:
    lists, expected = make_lists(False), make_lists(False)
    run(functional.adamw, lists, lr=torch.tensor(0.25))
    run(functional.adamw, expected, lr=0.25)
    assert_same_bits(lists["params"], expected["params"])


def test_steps_of_a_list_may_differ() -> None:
    """Each tensor gets what it would get alone."""
    together, alone = make_lists(False), make_lists(False)
    for lists in (together, alone):
        set_grads(lists["params"], 0)
        for i, step in enumerate(lists["state_steps"]):
            step.fill_(10 * i)
    call(functional.adamw, together)
    for i in range(len(alone["params"])):
        call(functional.adamw, {name: tensors[i : i + 1] for name, tensors in alone.items()})
    for name in LISTS:
        assert_same_bits(together[name], alone[name])
    assert [float(step) for step in together["state_steps"]] == [1.0, 11.0, 21.0, 31.0, 41.0]


def test_gradient_of_other_strides() -> None:
    results = []
    for restride in (Tensor.clone, lambda grad: grad.t().contiguous().t()):
        lists = {name: [torch.ones(6, 6)] for name in LISTS[:3]}
        lists |= {"max_exp_avg_sqs": [], "state_steps": [torch.tensor(0.0)]}
        set_grads(lists["params"], 0)
        (param,) = lists["params"]
        param.grad = restride(param.grad)
        call(functional.adamw, lists)
        results.append(param)
    assert_same_bits(results[1:], results[:1])


def test_empty_lists() -> None:
    call(functional.adamw, {name: [] for name in LISTS})


def test_autograd_sees_the_writes() -> None:
    lists = make_lists(False)
    param = lists["params"][0].requires_grad_()
    loss = (param**2).sum()
    set_grads(lists["params"], 0)
    call(functional.adamw, lists)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
