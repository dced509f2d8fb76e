"""Norms over shards of every mesh, and decisions that all ranks take alike."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import on_ranks
import pytest
import torch
from sharded_training import BF16, F32, LOUD, Pair, drawn, spread
from test_sharded_step import Net, placed
from torch import distributed, nn
from torch.distributed.tensor import Replicate, Shard, init_device_mesh

from fused_adamw import FusedAdamW

pytestmark = on_ranks.needs_gloo

ENGINES: list[dict[str, Any]] = [{}, {"engine": "cuda-on-host", "capturable": True}]


def norms_over_every_placement(rank: int) -> list[list[float]]:
    """Ours by each engine, then torch's of the whole tensors and of each DTensor together."""
    meshes: list[Any] = [*placed(), (None, [])]
    found: list[list[float]] = [[], []]
    for engine in ENGINES:
        pair = Pair(
            partial(FusedAdamW, **LOUD, max_grad_norm=0.5, **engine),
            [(5 + i, 7) for i in range(len(meshes))],
            F32,
            meshes,
        )
        for step in range(2):
            pair.step(step)
            found[step].append(pair.optimizer.grad_norm.item())
    for step in range(2):
        pair.set_grads(step)
        whole = torch.nn.utils.get_total_norm([param.grad for param in pair.whole])
        norms = [torch.nn.utils.get_total_norm([param.grad]) for param in pair.params]
        theirs = math.hypot(*(float(getattr(x, "full_tensor", x.clone)()) for x in norms))
        found[step] += [whole.item(), theirs]
    return found


def test_norms_over_every_placement() -> None:
    """They are the same bits on every rank and engine, and torch's within its own rounding."""
    ranks = on_ranks.run(norms_over_every_placement, 4)
    assert all(rank == ranks[0] for rank in ranks)
    for host, device, whole, theirs in ranks[0]:
        assert host == device
        assert host == pytest.approx(whole, rel=1e-6)
        assert host == pytest.approx(theirs, rel=1e-6)


def clipped_beside_torch(rank: int, is_grid: bool) -> list[tuple[float, float]]:
    """Of FSDP2's gradients, the norm by this library and by ``clip_grad_norm_``."""
    from torch.distributed.fsdp import fully_shard

    shape, names = ((2, 2), ("replicas", "shards")) if is_grid else ((4,), ("shards",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    net = Net(F32)
    fully_shard(net, mesh=mesh)
    optimizer = FusedAdamW(net.parameters(), lr=0.1, max_grad_norm=0.5)
    found = []
    for step in range(3):
        torch.manual_seed(4 * step + rank)
        net(torch.randn(4, 16)).square().sum().backward()
        copies = [nn.Parameter(param.detach().clone()) for param in net.parameters()]
        for copied, param in zip(copies, net.parameters(), strict=True):
            copied.grad = param.grad.clone()
        theirs = torch.nn.utils.clip_grad_norm_(copies, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append((optimizer.grad_norm.item(), theirs.full_tensor().item()))
    return found


@pytest.mark.parametrize("is_grid", [False, True], ids=["shards", "replicas of shards"])
def test_norms_are_those_of_clip_grad_norm(is_grid: bool) -> None:
    ranks = on_ranks.run(clipped_beside_torch, 4, is_grid)
    for ours, theirs in ranks[0]:
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert all(rank == ranks[0] for rank in ranks)


OVERFLOWS: list[tuple[dict[str, Any], str]] = [
    ({}, "flag"),
    ({"skip_nonfinite": True}, "flag"),
    ({"skip_nonfinite": True}, "gradient"),
    ({"max_grad_norm": 1e9, "skip_nonfinite": True}, "gradient"),
]


def overflows_on_one_rank(rank: int) -> list[str]:
    """Of three steps the last rank alone sees an overflow in the second; what then differs."""
    mesh = init_device_mesh("cpu", (2, 2))
    meshes: list[Any] = [(mesh, [Shard(0), Replicate()]), (mesh, [Shard(0), Shard(1)]), (None, [])]
    found: list[str] = []
    for engine in ENGINES:
        for options, how in OVERFLOWS:
            pair = Pair(
                partial(FusedAdamW, **LOUD, ema_decay=0.9, **options, **engine),
                [(8, 6), (4, 4), (3,)],
                F32,
                meshes,
            )
            for step in range(3):
                pair.set_grads(step)
                sees = rank == 3 and step == 1
                if how == "flag":
                    pair.optimizer.found_inf = torch.tensor(float(sees))
                elif sees:
                    pair.params[1].grad.to_local()[0, 0] = math.inf
                pair.optimizer.step()
                if step != 1:
                    pair.reference.step()
                where = f"step {step} of {engine} {options} {how}"
                found += [f"{where}: {what}" for what in pair.differences()]
            if pair.optimizer.param_groups[0]["schedule_step"] != 2:
                found.append(f"{where}: schedule_step")
    return found


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    assert on_ranks.run(overflows_on_one_rank, 4) == [[]] * 4


def scaled(rank: int) -> list[Any]:
    """torch's scaler around FSDP2, with a gradient that overflows in one rank's shard."""
    from torch.distributed.fsdp import fully_shard

    net = Net(F32)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = FusedAdamW(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        scaler.scale(net(torch.randn(4, 16)).sum()).backward()
        if step == 1 and rank == 1:
            net.first.weight.grad.to_local()[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(
            [torch.tensor(scaler.get_scale()), *(p.full_tensor() for p in net.parameters())]
        )
    return found


def test_grad_scaler() -> None:
    first, second = on_ranks.run(scaled, 2)
    for mine, theirs in zip(first, second, strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert [float(step[0]) for step in first] == [8.0, 4.0, 4.0]
    assert all(map(torch.equal, first[0][1:], first[1][1:]))  # skipped on both
    assert not any(map(torch.equal, first[1][1:], first[2][1:]))


def telemetry_of_shards(rank: int, engine: str) -> list[Any]:
    """Of classes that alternate in the list, what each param group's shards add up to.

    The bucket of bfloat16 begins with the class that comes second.
    """
    mesh = init_device_mesh("cpu", (2,))
    shapes = [(40, 600), (3,), (7, 600), (5,), (2, 2), (9, 4)]
    dtypes = [F32, BF16, BF16, F32, F32, BF16]
    grads, values = (
        [x.to(dtype) for x, dtype in zip(drawn(shapes, F32, seed), dtypes, strict=True)]
        for seed in (5, 6)
    )
    placements = [Shard(0), Replicate(), Shard(0), Replicate(), Shard(0), Replicate()]
    params = [
        nn.Parameter(spread(value, mesh, [placement]))
        for value, placement in zip(values, placements, strict=True)
    ]
    for param, grad in zip(params, grads, strict=True):
        param.grad = spread(grad, mesh, param.placements)
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    optimizer = FusedAdamW(groups, telemetry=True, max_grad_norm=1.0, engine=engine)
    optimizer.step()
    local = [
        math.sqrt(sum(float(p.grad.to_local().double().square().sum()) for p in group["params"]))
        for group in groups
    ]
    total = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    return [[x.grad_norm for x in optimizer.telemetry()], local, optimizer.grad_norm.item(), total]


@pytest.mark.parametrize("engine", ["cpu", "cuda-on-host"])
def test_telemetry_and_norm_of_classes_that_alternate(engine: str) -> None:
    for observed, local, norm, total in on_ranks.run(telemetry_of_shards, 2, engine):
        assert observed == pytest.approx(local, rel=1e-6)
        assert norm == pytest.approx(total, rel=1e-6)


def observed_shards_of_columns(rank: int, engine: str) -> Any:
    """Telemetry of a shard of rows and one of columns that draws random bits."""
    mesh = init_device_mesh("cpu", (2,))
    params = []
    for dtype, placement in ((F32, Shard(0)), (BF16, Shard(1))):
        param = nn.Parameter(spread(torch.ones(8, 16, dtype=dtype), mesh, [placement]))
        param.grad = spread(torch.ones(8, 16, dtype=dtype), mesh, [placement])
        params.append(param)
    optimizer = FusedAdamW(params, telemetry=True, stochastic_rounding=True, engine=engine)
    optimizer.step()
    return optimizer.telemetry()


def test_telemetry_of_shards_of_columns_that_draw() -> None:
    expected = on_ranks.run(observed_shards_of_columns, 2, "cpu")
    for (want,), (got,) in zip(
        expected, on_ranks.run(observed_shards_of_columns, 2, "cuda-on-host"), strict=True
    ):
        assert got == pytest.approx(want, rel=1e-12)


def meetings(rank: int) -> list[int]:
    """How many collectives steps hold: the first, later ones, one with the norm."""
    calls: list[Any] = []
    all_reduce = distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return all_reduce(*args, **kwargs)

    distributed.all_reduce = counted
    mesh = init_device_mesh("cpu", (2, 2))
    pair = Pair(
        partial(FusedAdamW, **LOUD),
        [(8, 6), (4, 4), (3,)],
        F32,
        [(mesh, [Shard(0), Replicate()]), (mesh, [Shard(0), Shard(1)]), (None, [])],
    )
    found = []
    for step in range(4):
        calls.clear()
        pair.set_grads(step)
        if step == 2:
            pair.optimizer.max_grad_norm = 1.0
        pair.optimizer.step()
        found.append(len(calls))
    return found


def test_ranks_meet_only_where_a_step_depends_on_all() -> None:
    """Then once for each process group; and at the first step, to compare their param groups."""
    for first, second, third, fourth in on_ranks.run(meetings, 4):
        assert first > 0
        assert (second, third, fourth) == (0, 2, 2)
