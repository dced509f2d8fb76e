"""Shards on GPUs: NCCL, two ranks that share one, offloaded shards, several devices at once."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
from sharded_training import BF16, DRAWING, F32, FORMATS, LOUD, RULES, Pair, differing
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, init_device_mesh

from fused_adamw import FusedAdamW, engine_status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(
        engine_status()["cuda"] is not None, reason=f"engine 'cuda': {engine_status()['cuda']}"
    ),
    on_ranks.needs_gloo,
]

NCCL = "cpu:gloo,cuda:nccl"
SHAPES = [(70, 64), (2, 2048), (5, 3), (3,), (1, 7), (0, 4)]
WHOLE = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}


def gpus() -> int:
    """One rank for each, and no more than the shapes are made for."""
    return min(torch.cuda.device_count(), 4)


def in_shards(rank: int, device: str) -> list[str]:
    """What differs from whole tensors on the CPU, of all rules and formats."""
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    found = []
    for i, (name, (options, dtype)) in enumerate({**FORMATS, **DRAWING}.items()):
        for cls, hyperparameters in RULES[i % 3 :: 3]:
            make = partial(cls, **hyperparameters, **options, **WHOLE)
            pair = Pair(make, SHAPES, dtype, [(mesh, [Shard(0)])] * len(SHAPES))
            for step in range(2):
                pair.step(step)
            found += [f"{cls.__name__} {name}: {what}" for what in pair.differences()]
    return found


def test_shards_by_nccl() -> None:
    ranks = gpus()
    assert on_ranks.run(in_shards, ranks, "cuda", backend=NCCL) == [[]] * ranks


def test_two_ranks_of_one_gpu() -> None:
    """NCCL would refuse them; gloo carries what they say over the host."""
    assert on_ranks.run(in_shards, 2, "cuda") == [[]] * 2


def in_columns(rank: int, device: str) -> list[str]:
    """Runs of a whole tensor, beside rows, copies, and plain tensors on the host, in one group."""
    mesh = init_device_mesh(device, (2,))
    meshes: list[Any] = [(mesh, [Shard(1)]), (mesh, [Shard(0)]), (mesh, [Replicate()]), (None, [])]
    found = []
    for name, (options, dtype) in {**FORMATS, **DRAWING}.items():
        for shape in [(130, 256), (7, 9)]:
            make = partial(FusedAdamW, **LOUD, **options, **WHOLE)
            pair = Pair(make, [shape] * len(meshes), dtype, meshes)
            for step in range(3):
                pair.step(step)
            found += [f"{name} {shape}: {what}" for what in pair.differences()]
    return found


def test_shards_of_columns_beside_tensors_of_the_host() -> None:
    assert on_ranks.run(in_columns, 2, "cuda") == [[]] * 2


def decided_on_the_device(rank: int, device: str) -> list[str]:
    """Coefficients worked out there, of a norm and an overflow of all ranks."""
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    make = partial(FusedAdamW, **LOUD, **WHOLE, capturable=True)
    pair = Pair(make, [(70, 64), (3,)], F32, [(mesh, [Shard(0)])] * 2)
    found = []
    for step in range(3):
        pair.set_grads(step)
        last = rank == distributed.get_world_size() - 1
        for optimizer in (pair.optimizer, pair.reference):
            flag = float(step == 1 and (last or optimizer is pair.reference))
            home = device if optimizer is pair.optimizer else "cpu"
            optimizer.found_inf = torch.tensor(flag, device=home)
            optimizer.step()
        found += [f"step {step}: {what}" for what in pair.differences()]
    return found


@pytest.mark.parametrize("backend", [NCCL, "gloo"])
def test_decisions_on_the_device(backend: str) -> None:
    ranks = gpus() if backend == NCCL else 2
    assert on_ranks.run(decided_on_the_device, ranks, "cuda", backend=backend) == [[]] * ranks


def offloaded(rank: int, device: str) -> list[str]:
    """FSDP2 keeps shards on the host, where they are stepped; what differs from whole tensors."""
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).to(BF16)
    whole = copy.deepcopy(net)
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if device == "cuda" else {}
    fully_shard(net, mesh=mesh, **policy)
    made = partial(FusedAdamW, lr=0.05, precision="split", max_grad_norm=0.5)
    optimizer, reference = made(net.parameters()), made(whole.parameters())
    found = []
    for step in range(3):
        torch.manual_seed(step)
        net(torch.randn(4, 32, dtype=BF16, device=device)).square().sum().backward()
        for mine, its in zip(net.parameters(), whole.parameters(), strict=True):
            if mine.device.type != "cpu" or mine.grad.device.type != "cpu":
                found.append(f"step {step}: on {mine.device}, gradient on {mine.grad.device}")
            its.grad = mine.grad.to(device).full_tensor().cpu()
        optimizer.step()
        reference.step()
        for name, its in whole.named_parameters():
            mine = net.get_parameter(name)
            local = mine.to_local()
            expected = torch.chunk(its.detach(), mesh.size())
            wanted = expected[rank] if rank < len(expected) else its.detach()[:0]
            if not torch.equal(local, wanted):
                found.append(f"step {step}: {name}")
        optimizer.zero_grad()
    return found


def test_offloaded_shards_are_stepped_on_the_host() -> None:
    ranks = gpus()
    assert on_ranks.run(offloaded, ranks, "cuda", backend=NCCL) == [[]] * ranks


def saved_and_loaded(rank: int, device: str, folder: str) -> list[str]:
    """A run that goes on from its checkpoint, beside one that was never interrupted."""
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    found = []
    for name, (options, dtype) in {**FORMATS, **DRAWING}.items():
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).to(device, dtype)
            fully_shard(net, mesh=mesh)
            runs.append((net, FusedAdamW(net.parameters(), **LOUD, **options)))

        def step(net: nn.Module, optimizer: FusedAdamW, number: int) -> None:
            torch.manual_seed(number)
            for param in net.parameters():
                param.grad = torch.ones_like(param) * (number + 1)
            optimizer.step()

        for number in range(2):
            step(*runs[0], number)
        at = Path(folder) / name.replace(" ", "-").replace(",", "")
        states = {"model": runs[0][0].state_dict(), "optim": get_optimizer_state_dict(*runs[0])}
        dcp.save(states, checkpoint_id=at)
        states = {"model": runs[1][0].state_dict(), "optim": get_optimizer_state_dict(*runs[1])}
        dcp.load(states, checkpoint_id=at)
        runs[1][0].load_state_dict(states["model"])
        set_optimizer_state_dict(*runs[1], states["optim"])
        for run in runs:
            step(*run, 2)
        for (key, x), y in zip(runs[0][0].named_parameters(), runs[1][0].parameters(), strict=True):
            if differing(x.to_local(), y.to_local()):
                found.append(f"{name}: {key}")
    return found


def test_checkpoints(tmp_path: Path) -> None:
    ranks = gpus()
    found = on_ranks.run(saved_and_loaded, ranks, "cuda", str(tmp_path), backend=NCCL)
    assert found == [[]] * ranks


@pytest.mark.parametrize("options", [{}, WHOLE], ids=["rule", "whole"])
@pytest.mark.parametrize("name", ["fp32", "split", "8bit"])
def test_several_devices_in_one_optimizer(name: str, options: dict[str, Any]) -> None:
    """Each by an engine of its own; one norm over all."""
    chosen, dtype = {**FORMATS, **DRAWING}[name]
    pair = Pair(
        partial(FusedAdamW, **LOUD, **chosen, **options), SHAPES, dtype, [(None, [])] * len(SHAPES)
    )
    for param in pair.params[::2]:
        param.data = param.data.cuda()
    for step in range(3):
        pair.set_grads(step)
        for param in pair.params:
            param.grad = param.grad.to(param.device)
        pair.optimizer.step()
        pair.reference.step()
    for i, (mine, its) in enumerate(zip(pair.params, pair.whole, strict=True)):
        assert mine.is_cuda == (i % 2 == 0)
        assert not differing(mine.cpu(), its)
        for key, value in pair.optimizer.state[mine].items():
            assert not differing(value.cpu(), pair.reference.state[its][key]), key
    if options:
        assert pair.optimizer.grad_norm is not None
        assert pair.optimizer.grad_norm.cpu() == pair.reference.grad_norm
