"""Options and gradients that a step cannot use are refused by name, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn_training import make_params, set_grads, train
from family import CLASSES
from test_bad_input import INF, NAN, assert_clear, refused
from torch import Tensor, nn

from fused_adamw import FusedAdamW, FusedSGD
from fused_adamw.optimizer import FusedOptimizer

NO_NUMBERS = ["1.0", [1.0], torch.ones(2), np.ones(2), True, 1j]
NO_FLAGS = [1, 0, None, "yes", torch.tensor(True)]
BAD_OPTIONS: list[tuple[str, Any]] = [
    *(("max_grad_norm", value) for value in (0.0, -1.0, NAN, -INF, *NO_NUMBERS)),
    *(("ema_decay", value) for value in (-0.1, 1.0, 1.5, NAN, INF, *NO_NUMBERS)),
    *((name, v) for name in ("skip_nonfinite", "zero_grads", "telemetry") for v in NO_FLAGS),
    *(("norm_process_groups", value) for value in (None, 3, "nccl", ["nccl"], [None])),
]
GOOD: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "ema_decay": 0.5,
    "skip_nonfinite": True,
    "zero_grads": False,
    "telemetry": True,
    "norm_process_groups": (),
}


def with_grads(cls: Any = FusedAdamW, **options: Any) -> tuple[FusedOptimizer, list[nn.Parameter]]:
    """An optimizer in training, whose next gradients are there."""
    params = make_params([(3, 4), (5,)])
    optimizer = cls(params, **options)
    train(optimizer, params, range(2))
    set_grads(params, 2)
    return optimizer, params


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=str)
def test_bad_option(name: str, value: Any) -> None:
    """At construction, before the first step, and between steps beside a good value before."""
    with pytest.raises((TypeError, ValueError)) as caught:
        FusedAdamW(make_params(), **{name: value})
    assert_clear(caught.value, rf"^{name}\b", "found", "accepted")
    attribute = "collect_telemetry" if name == "telemetry" else name
    for steps in (0, 2):
        params = make_params([(3, 4), (5,)])
        optimizer = FusedAdamW(params, **GOOD)
        train(optimizer, params, range(steps))
        set_grads(params, 2)
        setattr(optimizer, attribute, value)
        with refused(optimizer, (TypeError, ValueError), rf"^{name}\b", "found", "accepted"):
            optimizer.step()
        setattr(optimizer, attribute, GOOD[name])
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == steps + 1


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_takes_and_checks_options(cls: Any) -> None:
    for name, value in {**GOOD, "max_grad_norm": INF}.items():
        cls(make_params(), **{name: value})
    with pytest.raises(ValueError, match="max_grad_norm"):
        cls(make_params(), max_grad_norm=0.0)


# None is the optimizer's own, which ZeroRedundancyOptimizer repeats in every group.
OF_ALL_GROUPS = {
    **GOOD,
    **{"engine": "cpu", "state_dtype": torch.float32, "zero_grads": True},
    "norm_process_groups": [],
}


@pytest.mark.parametrize("name", OF_ALL_GROUPS)
def test_option_of_all_groups_in_one(name: str) -> None:
    """It would have no effect there: at construction, and for a group that comes later."""
    first, second = make_params([(3, 4), (5,)])
    message = rf"^param group 1: {name}: found .*; accepted: as an option of the optimizer"
    group = {"params": [second], name: OF_ALL_GROUPS[name]}
    with pytest.raises(ValueError, match=message):
        FusedAdamW([{"params": [first]}, group])
    optimizer = FusedAdamW([first])
    with refused(optimizer, ValueError, message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_unknown_argument(cls: Any) -> None:
    with pytest.raises(TypeError) as caught:
        cls(make_params(), clip=1.0)
    accepted = "accepted: params, lr, .*, state_dtype, max_grad_norm, .*, telemetry$"
    assert_clear(caught.value, rf"^{cls.__name__}: found an argument 'clip', {accepted}")


def test_telemetry_is_no_attribute_to_set() -> None:
    optimizer = FusedAdamW(make_params())
    with pytest.raises(AttributeError, match=r"^telemetry: .*accepted: collect_telemetry = True"):
        optimizer.telemetry = True
    assert optimizer.telemetry() is None


SCALES: list[tuple[Any, type[Exception]]] = [
    (torch.ones(2), ValueError),
    (torch.ones(0), ValueError),
    (torch.zeros(()), ValueError),
    (torch.tensor(-2.0), ValueError),
    (torch.tensor(NAN), ValueError),
    (torch.tensor(INF), ValueError),
    (0.0, ValueError),
    ("2", TypeError),
]


@pytest.mark.parametrize(("value", "kind"), SCALES, ids=str)
def test_bad_grad_scale(value: Any, kind: type[Exception]) -> None:
    optimizer, _ = with_grads()
    optimizer.grad_scale = value
    with refused(optimizer, kind, "^grad_scale", "found", "accepted"):
        optimizer.step()
    optimizer.grad_scale = None
    optimizer.step()


@pytest.mark.parametrize(
    ("value", "kind"),
    [(torch.ones(2), ValueError), (torch.ones(0), ValueError), ("no", TypeError)],
    ids=str,
)
def test_bad_found_inf(value: Any, kind: type[Exception]) -> None:
    optimizer, _ = with_grads()
    optimizer.found_inf = value
    with refused(optimizer, kind, "^found_inf", "found", "accepted"):
        optimizer.step()


# --- Gradients that are zeroed -------------------------------------------------------------------


def expanded(params: list[nn.Parameter]) -> None:
    params[1].grad = torch.ones(1).expand(5)


def with_gaps(params: list[nn.Parameter]) -> None:
    params[1].grad = torch.ones(10)[::2]


def the_same(params: list[nn.Parameter]) -> None:
    memory = torch.ones(12)
    params[0].grad, params[1].grad = memory.view(3, 4), memory[7:]


def in_a_parameter(params: list[nn.Parameter]) -> None:
    params[1].grad = params[0].detach().view(-1)[2:7]


def strided_in_a_parameter(params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(torch.zeros(4, 3)))
    params[2].grad = params[0].detach().t()


UNZEROABLE: list[tuple[Callable[[list[nn.Parameter]], None], str]] = [
    (expanded, r"parameter 1 has a gradient with strides .*zero_grads"),
    (with_gaps, r"parameter 1 has a gradient with strides .*zero_grads"),
    (the_same, r"parameter 1 has a gradient that shares memory with that of parameter 0"),
    (in_a_parameter, r"parameter 1 has a gradient that shares memory with parameter 0"),
    (strided_in_a_parameter, r"parameter 2 has a gradient that shares memory with parameter 0"),
]


@pytest.mark.parametrize("cls", [FusedAdamW, FusedSGD])
@pytest.mark.parametrize(
    ("change", "message"), UNZEROABLE, ids=lambda x: getattr(x, "__name__", "")
)
def test_gradients_that_cannot_be_zeroed(cls: Any, change: Any, message: str) -> None:
    """On the first step and later."""
    for steps in (0, 2):
        params = make_params([(3, 4), (5,)])
        set_grads(params, 2)
        change(params)
        grads = [param.grad for param in params]
        optimizer = cls(params, zero_grads=True)
        train(optimizer, params, range(steps))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        with refused(optimizer, ValueError, message, "accepted"):
            optimizer.step()


def assert_overlap(optimizer: FusedOptimizer, params: list[nn.Parameter], label: str) -> None:
    """Without a look at the state, which would have everything checked anew."""
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=f"{label} has a gradient that shares memory with that of"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_gradients_that_come_to_overlap_in_place() -> None:
    """At the addresses of a step before: of another parameter, or of wider elements."""
    params = make_params([(4,), (8,), (5,)])
    memory = torch.ones(9)
    optimizer = FusedAdamW(params, zero_grads=True)
    train(optimizer, params, range(1))
    params[0].grad, params[1].grad, params[2].grad = memory[:4], None, memory[4:]
    optimizer.step()
    params[0].grad, params[1].grad = None, memory[:8]
    assert_overlap(optimizer, params, "parameter 2")

    params = make_params([(4,), (2,)], torch.bfloat16)
    memory = torch.ones(4)
    for param in params:
        param.grad_dtype = None
    params[0].grad, params[1].grad = memory[:2].view(torch.bfloat16), memory[2:]
    optimizer = FusedAdamW(params, zero_grads=True)
    optimizer.step()
    params[0].grad = memory
    assert_overlap(optimizer, params, "parameter 1")


def test_shared_gradients_are_read_where_they_are_not_zeroed() -> None:
    for change in (expanded, with_gaps, the_same, strided_in_a_parameter):
        params = make_params([(3, 4), (5,)])
        set_grads(params, 0)
        change(params)
        FusedAdamW(params).step()


def bumps(tensors: list[Tensor], versions: list[int]) -> list[int]:
    return [t._version - v for t, v in zip(tensors, versions, strict=True)]


@pytest.mark.parametrize("engine", ["cpu", "cuda-on-host", "reference"])
def test_strided_gradients_are_zeroed(engine: str) -> None:
    """In their own memory, though the step reads a copy; autograd learns of every write."""
    params = make_params([(6, 5), (5,), (2, 3, 4)])
    set_grads(params, 0)
    params[0].grad = params[0].grad.t().contiguous().t()
    params[2].grad = params[2].grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert params[0].grad.stride() != params[0].stride()
    plain = make_params([(6, 5), (5,), (2, 3, 4)])
    for param, same in zip(params, plain, strict=True):
        same.grad = param.grad.clone()
    grads = [param.grad for param in params]
    tensors = [*params, *grads]
    versions = [tensor._version for tensor in tensors]
    optimizer = FusedAdamW(params, engine=engine, zero_grads=True)
    optimizer.step()
    FusedAdamW(plain, engine=engine).step()
    for param, same, grad in zip(params, plain, grads, strict=True):
        assert torch.equal(param, same)
        assert param.grad is grad
        assert not grad.any()
        assert not grad.signbit().any()
    assert all(bump > 0 for bump in bumps(tensors, versions))


def test_gradients_that_are_not_zeroed_keep_their_version() -> None:
    optimizer, params = with_grads(max_grad_norm=0.5, ema_decay=0.9)
    grads = [param.grad for param in params]
    copies = [grad.clone() for grad in grads]
    versions = [grad._version for grad in grads]
    optimizer.step()
    assert bumps(grads, versions) == [0, 0]
    for grad, copied in zip(grads, copies, strict=True):
        assert torch.equal(grad, copied)


def test_zeroed_gradients_leave_no_graph() -> None:
    """As `zero_grad` detaches those of backward(create_graph=True)."""
    param = nn.Parameter(torch.ones(4, 3).t())
    grad = torch.ones(3, 4, requires_grad=True).mul(2.0)
    param.grad = grad
    optimizer = FusedAdamW([param], zero_grads=True, skip_nonfinite=True)
    node = grad.grad_fn
    optimizer.step()
    assert not grad.any()
    assert grad.grad_fn is node
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert grad.grad_fn is node


def test_a_skipped_step_without_gradients_is_no_error() -> None:
    params = make_params()
    optimizer = FusedAdamW(params, zero_grads=True)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert not optimizer.state
