"""What cannot be stepped is refused on every rank in the same words; nobody waits in vain."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
from sharded_training import BF16, F32, LOUD, Pair, drawn, spread
from test_distributed_checkpoints import Model, make
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    init_device_mesh,
)
from torch.distributed.tensor.placement_types import _StridedShard

from fused_adamw import FusedAdamW
from fused_adamw.checkpoint import LoadPlanner
from fused_adamw.step_in_backward import step_in_backward

pytestmark = on_ranks.needs_gloo

RANKS = 4
# Refusals come long before this, which is far below the time-out of the process group.
SECONDS = 120.0


def refused(action: Callable[[], Any]) -> str:
    """The type and message of an error."""
    try:
        action()
    except BaseException as error:  # as torch's CheckpointException is
        return f"{type(error).__name__}: {error}"
    return "no error"


# --- Gradients -----------------------------------------------------------------------------------


def replicated(grad: Any) -> Tensor:
    return DTensor.from_local(grad.full_tensor(), grad.device_mesh, [Replicate()] * 2)


def plain(grad: Any) -> Tensor:
    return grad.full_tensor()  # type: ignore[no-any-return]


def partial_sum(grad: Any) -> Tensor:
    placements = [Partial(), Shard(0)]
    return DTensor.from_local(grad.to_local(), grad.device_mesh, placements, run_check=False)


WRONG: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "replicated": (replicated, r"its gradient \(Replicate\(\), Replicate\(\)\) on a mesh of shape"),
    "plain": (plain, r"its gradient none \(a plain Tensor\)"),
    "partial": (partial_sum, r"its gradient \(Partial\(sum\), Shard\(dim=0\)\)"),
}


def wrong_gradient(rank: int, how: str, on: list[int], at: int, options: dict[str, Any]) -> Any:
    """The message, and whether training then goes on as if nothing had been."""
    mesh = init_device_mesh("cpu", (2, 2))
    pair = Pair(
        partial(FusedAdamW, **LOUD, **options),
        [(4, 4), (8, 6)],
        F32,
        [(mesh, [Replicate(), Shard(0)])] * 2,
    )
    for step in range(3):
        if step == at:
            pair.set_grads(step)
            wrong = WRONG[how][0](pair.params[1].grad)
            if rank in on:
                pair.params[1].grad = wrong
            message = refused(pair.optimizer.step)
        pair.step(step)
    return message, pair.differences()


def every_wrong_gradient(rank: int) -> dict[str, Any]:
    return {how: wrong_gradient(rank, how, [2], 0, {}) for how in WRONG}


def test_a_gradient_with_other_placements() -> None:
    """At a first step, on one rank; the same words on all."""
    ranks = on_ranks.run(every_wrong_gradient, RANKS, seconds=SECONDS)
    for how, (_, named) in WRONG.items():
        (message,) = {rank[how][0] for rank in ranks}
        assert message.startswith(
            "ValueError: rank 2: parameter 1 has placements (Replicate(), Shard(dim=0)) on a mesh "
            "of shape (2, 2)"
        )
        assert re.search(named, message)
        assert "accepted: a gradient with the parameter's" in message
        assert not any(rank[how][1] for rank in ranks)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}])
def test_one_rank_that_fails_at_a_later_step(options: dict[str, Any]) -> None:
    """The others, who wait for its part of the norm, are told."""
    found = on_ranks.run(wrong_gradient, RANKS, "replicated", [1], 1, options, seconds=SECONDS)
    assert len({message for message, _ in found}) == 1
    assert found[0][0].startswith("ValueError: rank 1: parameter 1 has placements")
    assert not any(differences for _, differences in found)


def test_without_a_norm_a_later_step_is_refused_where_it_is_wrong() -> None:
    everywhere = list(range(RANKS))
    found = on_ranks.run(wrong_gradient, RANKS, "plain", everywhere, 1, {}, seconds=SECONDS)
    for rank, (message, differences) in enumerate(found):
        assert message.startswith(f"ValueError: rank {rank}: parameter 1 has placements")
        assert not differences


def sharded_gradient_of_plain(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(torch.ones(4, 2))
    grad = spread(torch.ones(4, 2), mesh, [Shard(0)])
    optimizer = FusedAdamW([("head.weight", param)])
    param.grad = grad
    return refused(optimizer.step)


def test_a_sharded_gradient_of_a_plain_parameter() -> None:
    for message in on_ranks.run(sharded_gradient_of_plain, 2, seconds=SECONDS):
        assert "parameter 0 ('head.weight')" in message
        assert "DTensor" in message


# --- Param groups --------------------------------------------------------------------------------


def differing_groups(rank: int, what: str, mesh: DeviceMesh) -> str:
    odd = rank == 3
    placements = [Shard(0), Replicate()]
    shapes = [(4, 4), (8, 6)]
    if what == "shape" and odd:
        shapes[1] = (8, 7)
    values = drawn(shapes, F32, 1)
    params: list[Any] = [nn.Parameter(spread(value, mesh, placements)) for value in values]
    if what == "placements" and odd:
        params[1] = nn.Parameter(spread(values[1], mesh, [Shard(0), Shard(1)]))
    if what == "more" and odd:
        params.append(nn.Parameter(torch.ones(2)))
    named = list(zip(("first", "second", "third"), params, strict=False))
    groups: list[Any] = [{"params": named[:1]}, {"params": named[1:]}]
    if what == "lr" and odd:
        groups[1]["lr"] = 0.5
    if what == "groups" and odd:
        groups = [{"params": named}]
    clip = 1.0 if what == "options" and odd else None
    optimizer = FusedAdamW(groups, lr=0.1, max_grad_norm=clip)
    for param in params:
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in params]
    message = refused(optimizer.step)
    assert all(
        torch.equal(*(getattr(x, "_local_tensor", x) for x in pair))
        for pair in zip(before, params, strict=True)
    )
    assert not optimizer.state
    return message


DIFFERENT = {
    "lr": r"rank 3: found param group 1: lr 0\.5; on rank 0 param group 1: lr 0\.1",
    "groups": r"rank 3: found 1 param groups; on rank 0 2 param groups",
    "shape": r"rank 3: found parameter 1 \('second'\).*\(8, 7\).*; on rank 0 .*\(8, 6\)",
    "placements": r"rank 3: found parameter 1 .*Shard\(dim=1\).*on rank 0 .*Replicate\(\)",
    "more": r"rank 3: found parameter 2 \('third'\).*; on rank 0 nothing more",
    "options": r"rank 3: found max_grad_norm 1\.0; on rank 0 max_grad_norm None",
}


def every_difference(rank: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2, 2))
    return {what: differing_groups(rank, what, mesh) for what in DIFFERENT}


def test_ranks_with_other_param_groups() -> None:
    ranks = on_ranks.run(every_difference, RANKS, seconds=SECONDS)
    for what, named in DIFFERENT.items():
        (message,) = {rank[what] for rank in ranks}
        assert re.match("ValueError: " + named, message), message
        assert message.endswith("accepted: the same on every rank")


# --- Parameters ----------------------------------------------------------------------------------


# A shape, its placements and the strides of its memory.
SCATTERED: list[tuple[tuple[int, ...], list[Placement], tuple[int, ...]]] = [
    ((4, 4, 4), [Shard(1), Shard(2)], (16, 4, 1)),
    ((8, 4), [_StridedShard(0, split_factor=2), Replicate()], (4, 1)),  # nobody takes a piece
    ((12, 4), [_StridedShard(0, split_factor=3), Shard(0)], (4, 1)),
    ((10, 4), [_StridedShard(0, split_factor=2), Shard(0)], (4, 1)),  # unevenly
    ((8, 4), [Shard(0), Shard(1)], (1, 8)),  # the local tensors are row-major
]


def unusable_parameters(rank: int) -> tuple[str, list[str]]:
    mesh = init_device_mesh("cpu", (2, 2))
    summed = DTensor.from_local(torch.ones(4, 4), mesh, [Partial(), Shard(0)], run_check=False)
    scattered = []
    for shape, placements, stride in SCATTERED:
        local = spread(torch.ones(shape, dtype=BF16), mesh, placements).to_local()
        whole = {"shape": torch.Size(shape), "stride": stride}
        param = nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False, **whole))
        param.grad = torch.ones_like(param)
        drawing = FusedAdamW([("w", param)], stochastic_rounding=True)
        scattered.append(refused(drawing.step))
    return refused(lambda: FusedAdamW([("head", nn.Parameter(summed))])), scattered


def test_placements_that_cannot_be_stepped() -> None:
    for summed, scattered in on_ranks.run(unusable_parameters, RANKS, seconds=SECONDS):
        assert re.match(
            r"ValueError: parameter 0 \('head'\): placements: found \(Partial\(sum\), "
            r"Shard\(dim=0\)\) on a mesh of shape \(2, 2\), accepted: Shard and Replicate",
            summed,
        )
        for (shape, placements, stride), message in zip(SCATTERED, scattered, strict=True):
            assert message.startswith("ValueError: rank "), message
            placed = f"{tuple(placements)} on a mesh of shape (2, 2) for shape {shape}"
            found = f": parameter 0 ('w'): placements: found {placed} and strides {stride} beside "
            assert f"{found}bf16" in message
            assert "stochastic rounding" in message
            assert "accepted: one piece of the whole, cut in its outermost dimension" in message


def in_backward(rank: int) -> str:
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(net[1])  # the first layer is plain
    optimizer = FusedAdamW([{"params": layer.parameters()} for layer in net])
    message = refused(lambda: step_in_backward(net, optimizer))
    step_in_backward(net[0], optimizer).remove()
    return message


def test_step_in_backward_of_sharded_parameters() -> None:
    for message in on_ranks.run(in_backward, 2, seconds=SECONDS):
        assert message == (
            "TypeError: model_or_params: found a DTensor in param group 1, whose gradient ranks "
            "may yet reduce; accepted: plain tensors"
        )


# --- Checkpoints ---------------------------------------------------------------------------------


def unusable_checkpoints(rank: int, folder: str) -> list[str]:
    """States of other placements; a checkpoint without some states; one that was not finished."""
    model = Model(F32, Shard(0))
    optimizer = make(model, "fp32")
    model.train_on(optimizer, range(1))
    before = get_optimizer_state_dict(model, optimizer)
    saved = optimizer.state_dict()
    value = saved["state"][0]["exp_avg"]
    saved["state"][0] = {**saved["state"][0], "exp_avg": value.redistribute(placements=[Shard(1)])}
    messages = [refused(lambda: optimizer.load_state_dict(saved))]

    state = get_optimizer_state_dict(model, optimizer)
    state["state"]["wide"] = {**state["state"]["wide"]}  # otherwise the optimizer's own
    del state["state"]["wide"]["exp_avg_sq"]
    dcp.save({"optim": state}, checkpoint_id=Path(folder) / "partial")
    for planner in (None, LoadPlanner()):
        wanted = {"optim": get_optimizer_state_dict(model, optimizer)}
        load = partial(dcp.load, wanted, checkpoint_id=Path(folder) / "partial", planner=planner)
        messages.append(refused(load))
    (Path(folder) / "unfinished").mkdir(exist_ok=True)
    messages.append(refused(lambda: dcp.load(wanted, checkpoint_id=Path(folder) / "unfinished")))
    after = get_optimizer_state_dict(model, optimizer)
    for name, state in before["state"].items():
        for key, value in state.items():
            other = after["state"][name][key]
            assert torch.equal(*(getattr(x, "_local_tensor", x) for x in (value, other)))
    return messages


def test_checkpoints_that_cannot_be_loaded(tmp_path: Path) -> None:
    found = on_ranks.run(unusable_checkpoints, 2, str(tmp_path), seconds=SECONDS)
    for placements, *partials, unfinished in found:
        assert re.match(
            r"ValueError: state_dict: parameter 0: 'exp_avg' has placements \(Shard\(dim=1\),\) .*"
            r"accepted: the parameter's, \(Shard\(dim=0\),\)",
            placements,
        )
        assert "error" in unfinished.lower()
        for message in partials:
            assert "optim.state.wide.exp_avg_sq" in message
