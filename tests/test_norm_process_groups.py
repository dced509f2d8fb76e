"""Gradients that lie on several ranks are clipped by the norm of all of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_ranks
import pytest
import torch
from drawn_training import assert_same_bits, make_params, set_grads, state_tensors
from torch import Tensor, distributed

from fused_adamw import FusedAdamW
from fused_adamw.ranks import device_for

pytestmark = on_ranks.needs_gloo

RANKS = 2
SHAPES = [(7, 5), (33,), (300,), (2000, 11)]
OPTIONS: dict[str, Any] = {"lr": 0.1, "max_grad_norm": 0.5, "skip_nonfinite": True}


def drawn(step: int) -> list[Tensor]:
    """The parameters with the gradients of a step; one of the second step is infinite."""
    params = make_params(SHAPES)
    set_grads(params, step)
    if step == 1:
        params[3].grad[5, 5] = torch.inf
    return params


def part(rank: int, tensors: list[Tensor]) -> list[Tensor]:
    return tensors[rank * 2 : rank * 2 + 2]


def run(optimizer: FusedAdamW, params: list[Tensor], rank: int | None) -> list[Tensor]:
    norms = []
    for step in range(3):
        grads = [param.grad for param in drawn(step)]
        for param, grad in zip(params, grads if rank is None else part(rank, grads), strict=True):
            param.grad = grad
        optimizer.step()
        assert optimizer.grad_norm is not None
        norms.append(optimizer.grad_norm)
    return norms


def train_parts(rank: int, folder: str) -> None:
    params = part(rank, make_params(SHAPES))
    alone = distributed.new_group([0]), distributed.new_group([1])
    groups = [alone[rank], distributed.group.WORLD]  # one after the other
    norms = run(FusedAdamW(params, **OPTIONS, norm_process_groups=groups), params, rank)
    torch.save((norms, [param.detach() for param in params]), Path(folder) / str(rank))


def test_two_ranks_clip_as_one_process(tmp_path: Path) -> None:
    """The same bits as one process where each rank's gradients are a param group.

    A step whose norm is infinite because of one rank is skipped by both.
    """
    on_ranks.run(train_parts, RANKS, str(tmp_path))
    params = make_params(SHAPES)
    optimizer = FusedAdamW([{"params": part(rank, params)} for rank in range(RANKS)], **OPTIONS)
    norms = run(optimizer, params, None)
    assert [norm.isfinite().item() for norm in norms] == [True, False, True]
    for rank in range(RANKS):
        found_norms, found = torch.load(tmp_path / str(rank))
        assert_same_bits(found_norms, norms)
        assert_same_bits(found, [param.detach() for param in part(rank, params)])


def train_unevenly(rank: int, folder: str) -> None:
    """Rank 1 has no gradients in one step, and in another the scaler finds an overflow on it."""
    results = []
    for on_device in (False, True):
        params = part(rank, make_params(SHAPES))
        optimizer = FusedAdamW(
            params,
            lr=0.1,
            max_grad_norm=0.5,
            norm_process_groups=[distributed.group.WORLD],
            capturable=on_device,
            engine="cuda-on-host" if on_device else "cpu",
        )
        norms = []
        for step, inputs in enumerate(UNEVEN):
            for param, grad in zip(params, part(rank, drawn(inputs)), strict=True):
                param.grad = None if rank == 1 and step in (0, 2) else grad.grad
            overflow = rank == 1 and inputs == 1
            optimizer.found_inf = torch.tensor(float(overflow))
            optimizer.step()
            assert optimizer.grad_norm is not None
            norms.append(optimizer.grad_norm.clone())
        steps = int(optimizer.param_groups[0]["schedule_step"])
        results.append((norms, [param.detach() for param in params], steps))
    torch.save(results, Path(folder) / str(rank))


UNEVEN = (0, 2, 3, 1, 4)  # of which 1 has an infinite gradient on rank 1


def test_a_rank_without_gradients_and_one_with_an_overflow(tmp_path: Path) -> None:
    """The others do not wait in vain, and all skip the step of the overflow."""
    on_ranks.run(train_unevenly, RANKS, str(tmp_path))
    found = [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]
    for on_host, on_device in found:
        assert_same_bits(on_host[0], on_device[0])
        assert_same_bits(on_host[1], on_device[1])
        assert [norm.isfinite().item() for norm in on_host[0]] == [True, True, True, False, True]
        assert on_host[2] == on_device[2] == len(UNEVEN) - 1
        assert all(param.isfinite().all() for param in on_host[1])
    assert_same_bits(found[0][0][0], found[1][0][0])


@pytest.mark.parametrize(
    ("kinds", "device", "expected"),
    [
        (("cuda",), "cuda:1", "cuda:1"),  # nccl, also where it is called "cuda:nccl"
        (("cuda",), "cpu", "cuda"),  # this rank has no gradients
        (("cuda", "cpu"), "cuda:1", "cpu"),  # as a rank without gradients
        (("cpu",), "cuda:1", "cpu"),
    ],
)
def test_ranks_agree_where_the_norm_is_summed(
    kinds: tuple[str, ...], device: str, expected: str
) -> None:
    group = SimpleNamespace(_device_types=list(map(torch.device, kinds)))
    assert device_for(group, torch.device(device)) == torch.device(expected)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    """The only process of a group."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_copies_share_the_groups_and_pickles_have_none(one_rank: Any) -> None:
    params = make_params(SHAPES)
    optimizer = FusedAdamW(params, **OPTIONS, norm_process_groups=[one_rank])
    set_grads(params, 0)
    optimizer.step()
    copied_params, copied = copy.deepcopy((params, optimizer))
    assert copied.norm_process_groups == [one_rank]
    pickled_params, unpickled = pickle.loads(pickle.dumps((params, optimizer)))
    assert unpickled.norm_process_groups == ()
    for own, its in ((optimizer, params), (copied, copied_params), (unpickled, pickled_params)):
        set_grads(its, 2)
        own.step()
        assert_same_bits(
            [*its, *state_tensors(own, its)], [*params, *state_tensors(optimizer, params)]
        )
