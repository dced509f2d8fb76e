"""DistributedDataParallel, and ZeroRedundancyOptimizer around our optimizers."""

from __future__ import annotations

import copy
from typing import Any

import on_ranks
import pytest
import torch
from sharded_training import BF16, DRAWING, F32, FORMATS, LOUD
from test_sharded_step import Net
from torch import Tensor, distributed, nn, optim
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fused_adamw import FusedAdamW, FusedSGD
from fused_adamw.schedules import CosineAnnealing

pytestmark = on_ranks.needs_gloo

CASES: dict[str, tuple[Any, dict[str, Any], torch.dtype]] = {
    "fp32": (FusedAdamW, LOUD, F32),
    "scheduled": (FusedAdamW, {**LOUD, "schedule": CosineAnnealing(4)}, F32),
    "clipped": (FusedAdamW, {**LOUD, "max_grad_norm": 0.1}, F32),
    "momentum": (FusedSGD, {"lr": 0.01, "momentum": 0.9}, F32),
    **{
        name: (FusedAdamW, {**LOUD, **options}, dtype)
        for name, (options, dtype) in {**FORMATS, **DRAWING}.items()
        if dtype in (F32, BF16)
    },
}


def backward(net: nn.Module, rank: int, step: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4 * step + rank)
    net(torch.randn(8, 16).to(dtype)).float().square().mean().backward()


def in_replicas(rank: int) -> dict[str, list[Tensor]]:
    """What two ranks come to, and an optimizer without ranks that gets the same gradients."""
    found = {}
    for name, (cls, options, dtype) in CASES.items():
        net = Net(dtype)
        alone = copy.deepcopy(net)
        replica = DistributedDataParallel(net)
        optimizer, reference = cls(net.parameters(), **options), cls(alone.parameters(), **options)
        for step in range(3):
            backward(replica, rank, step, dtype)
            for param, other in zip(net.parameters(), alone.parameters(), strict=True):
                other.grad = param.grad.clone()
            optimizer.step()
            reference.step()
            optimizer.zero_grad()
        for param, other in zip(net.parameters(), alone.parameters(), strict=True):
            assert torch.equal(param, other), name
        found[name] = [param.detach() for param in net.parameters()]
    return found


def test_replicas_stay_the_same() -> None:
    first, second = on_ranks.run(in_replicas, 2)
    for name, params in first.items():
        assert all(map(torch.equal, params, second[name])), name


def in_parts(rank: int) -> dict[str, list[str]]:
    """Of ZeRO, whose ranks have an optimizer for some parameters each, what differs from one."""
    found = {}
    for name, (cls, options, dtype) in CASES.items():
        if name in DRAWING:
            continue  # parameters are numbered anew on each rank, so other bits are drawn
        net, alone = Net(dtype), Net(dtype)
        shared = {"norm_process_groups": [distributed.group.WORLD]} if name == "clipped" else {}
        optimizer = ZeroRedundancyOptimizer(
            net.parameters(), optimizer_class=cls, **options, **shared
        )
        reference = cls(alone.parameters(), **options)
        for step in range(3):
            backward(alone, 0, step, dtype)
            for param, other in zip(net.parameters(), alone.parameters(), strict=True):
                param.grad = other.grad.clone()
            optimizer.step()
            reference.step()
            reference.zero_grad()
        found[name] = [
            key
            for (key, param), other in zip(net.named_parameters(), alone.parameters(), strict=True)
            if not torch.equal(param, other)
        ]
        optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            resumed = cls(net.parameters(), **options)
            resumed.load_state_dict(optimizer.state_dict())
            found[name] += [
                f"{key} of {i}"
                for i, (param, other) in enumerate(
                    zip(net.parameters(), alone.parameters(), strict=True)
                )
                for key, value in reference.state[other].items()
                if not torch.equal(resumed.state[param][key], value)
            ]
            if name == "fp32":
                optim.AdamW(net.parameters()).load_state_dict(optimizer.state_dict())
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_zero_redundancy_optimizer(ranks: int) -> None:
    for found in on_ranks.run(in_parts, ranks):
        assert not any(found.values()), found
