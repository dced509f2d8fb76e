"""What ranks decide together where they differ: in copies, meshes, stages, errors and options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
from sharded_training import spread
from torch import distributed, nn
from torch.distributed.tensor import DeviceMesh, Placement, Replicate, Shard, init_device_mesh

from fused_adamw import FusedAdamW

pytestmark = on_ranks.needs_gloo

SECONDS = 60.0
ENGINES: list[dict[str, Any]] = [{}, {"engine": "cuda-on-host", "capturable": True}]


def param(
    mesh: DeviceMesh | None, placements: Sequence[Placement], grad: float = 1.0, rows: int = 8
) -> Any:
    """Ones, [rows, 4], whose gradient is the same everywhere."""
    made = nn.Parameter(spread(torch.ones(rows, 4), mesh, placements))
    made.grad = spread(torch.full((rows, 4), grad), mesh, placements)
    return made


def local(tensor: Any) -> torch.Tensor:
    """What of a tensor is in this rank's memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def said(call: Callable[[], object]) -> str:
    """The type and message of what is raised, or nothing."""
    try:
        call()
    except Exception as error:
        if "gloo" in str(error):  # of a rank that ended while another waited for it
            raise
        return f"{type(error).__name__}: {error}"
    return ""


def placed(where: str) -> tuple[list[Any], int]:
    """Parameters on four ranks, and which of them one rank's gradient spoils alone."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    everywhere = param(grid, [Shard(0), Shard(1)])
    others = {
        "copies of shards": lambda: param(grid, [Replicate(), Shard(0)]),
        "copies": lambda: param(grid, [Replicate(), Replicate()]),
        "a plain tensor": lambda: param(None, []),
        "a slice": lambda: param(grid["tp"], [Shard(0)]),
        "copies on a slice": lambda: param(grid["dp"], [Replicate()]),
        "a shard": lambda: param(grid, [Shard(0), Shard(1)]),
    }
    return [everywhere, others[where]()], 1


SPOILED = [
    "copies of shards",
    "copies",
    "a plain tensor",
    "a slice",
    "copies on a slice",
    "a shard",
]


def spoiled_on_one_rank(rank: int) -> dict[str, Any]:
    """Of each place the norms, and whether a step with it was skipped."""
    found: dict[str, Any] = {}
    for engine in ENGINES:
        for where in SPOILED:
            for value in (math.inf, math.nan, 1e3):
                params, spoiled = placed(where)
                if rank == 3:
                    local(params[spoiled].grad)[0, 0] = value
                optimizer = FusedAdamW(
                    params, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True, **engine
                )
                optimizer.step()
                assert optimizer.grad_norm is not None
                changed = [bool((local(x.detach()) != 1).any()) for x in params]
                found[f"{engine} {where} {value}"] = optimizer.grad_norm.item(), changed
    return found


def test_what_one_rank_sees_in_its_copy() -> None:
    """Skips the step on all, or is no part of the norm of any."""
    ranks = on_ranks.run(spoiled_on_one_rank, 4, seconds=SECONDS)
    for case in ranks[0]:
        norms, changes = zip(*(rank[case] for rank in ranks), strict=True)
        assert len({str(norm) for norm in norms}) == 1, f"{case}: {norms}"
        assert all(change == changes[0] for change in changes), f"{case}: {changes}"
        assert math.isfinite(norms[0]) == case.endswith("1000.0"), f"{case}: {norms}"
        assert changes[0] == [math.isfinite(norms[0])] * 2, f"{case}: {changes}"


def on_many_meshes(rank: int) -> dict[str, float]:
    """Norms of parameters whose meshes are not alike; every element's gradient is 1."""
    world = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    first, last = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])
    cases: dict[str, list[Any]] = {
        "without some ranks": [param(world, [Shard(0)]), param(first, [Shard(0)])],
        "without the first": [param(last, [Shard(0)]), param(world, [Replicate()])],
        "slices alone": [param(grid["dp"], [Shard(0)]), param(grid["tp"], [Replicate()])],
        "slices and all": [
            *(param(grid["dp"], [Shard(0)]), param(grid["tp"], [Shard(0)])),
            *(param(grid, [Shard(0), Replicate()]), param(None, [])),
        ],
        "made twice": [
            param(init_device_mesh("cpu", (4,)), [Shard(0)]),
            param(world, [Shard(1)]),
            param(grid, [Shard(0), Shard(0)]),
        ],
    }
    found = {}
    for one in cases["without some ranks"] + cases["without the first"]:
        if one.device_mesh.get_coordinate() is None:
            one.grad = None  # as backward leaves it on a rank that has no part of it
    for engine in ENGINES:
        for name, params in cases.items():
            FusedAdamW(params, lr=0.1, **engine).step()  # no meeting but that of a first step
            optimizer = FusedAdamW(params, lr=0.1, max_grad_norm=1.0, **engine)
            for _ in range(2):
                optimizer.step()
            assert optimizer.grad_norm is not None
            found[f"{engine} {name} {len(params)}"] = optimizer.grad_norm.item()
    return found


def test_meshes_that_have_not_all_ranks() -> None:
    ranks = on_ranks.run(on_many_meshes, 4, seconds=SECONDS)
    assert all(rank == ranks[0] for rank in ranks)
    for case, norm in ranks[0].items():
        assert norm == pytest.approx(math.sqrt(32 * int(case.split()[-1]))), case


def without_a_mesh_of_all(rank: int) -> tuple[str, str, float]:
    """Two meshes that have no rank in common, with nothing that is asked of both, then with it."""
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    params = [param(mesh, [Shard(0)]) for mesh in meshes]
    optimizer = FusedAdamW(params, lr=0.1)
    before = said(optimizer.step)
    optimizer.max_grad_norm = 1.0
    refused = said(optimizer.step)
    optimizer.norm_process_groups = [distributed.group.WORLD]
    optimizer.step()
    assert optimizer.grad_norm is not None
    return before, refused, optimizer.grad_norm.item()


def test_no_mesh_has_the_ranks_of_all() -> None:
    for before, refused, norm in on_ranks.run(without_a_mesh_of_all, 4, seconds=SECONDS):
        assert not before
        assert "a mesh of ranks [0, 1] and a mesh of ranks [2, 3]" in refused
        assert norm == pytest.approx(8.0)


def stages(rank: int, how: str) -> tuple[str, float]:
    """Two stages of two ranks each: other parameters, in other param groups."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    mesh, stage = world["dp"], rank // 2
    groups: list[Any] = [{"params": [param(mesh, [Shard(0)])]}]
    if stage == 0:
        copies = [param(mesh, [Replicate()], rows=5), param(None, [], rows=3)]
        groups.append({"params": copies, "weight_decay": 0.0})
    pipeline = world["dp" if how == "shared" else "pp"].get_group()
    optimizer = FusedAdamW(groups, lr=0.1, max_grad_norm=1.0, norm_process_groups=[pipeline])
    message = said(optimizer.step)
    norm = optimizer.grad_norm
    if how == "an error" and not message:
        if rank == 3:
            optimizer.param_groups[0]["lr"] = -1.0
        message = said(optimizer.step)
    return message, math.nan if norm is None else norm.item()


def test_stages_with_other_param_groups() -> None:
    for message, norm in on_ranks.run(stages, 4, "", seconds=SECONDS):
        assert not message
        assert norm == pytest.approx(math.sqrt(4 * (8 + 8 + 5 + 3)))


def one_stage_sharded(rank: int) -> list[tuple[str, float]]:
    """Of two stages one has DTensors, in steps that clip, that a scaler drives, and that do not."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    mesh = world["dp"] if rank < 2 else None
    optimizer = FusedAdamW(
        [param(mesh, [Shard(0)])], lr=0.1, norm_process_groups=[world["pp"].get_group()]
    )
    found = []
    for limit, is_scaled in [
        *((None, False), (None, True), (1.0, False), (1.0, True), (None, True), (None, False)),
        *((1.0, False), (None, False), (None, False)),
    ]:
        optimizer.max_grad_norm = limit
        if is_scaled:
            optimizer.found_inf = torch.tensor(0.0)
        message = said(optimizer.step)
        if is_scaled:
            del optimizer.found_inf
        norm = optimizer.grad_norm
        found.append((message, math.nan if norm is None or limit is None else norm.item()))
    return found


def test_one_of_two_stages_has_dtensors() -> None:
    for rank in on_ranks.run(one_stage_sharded, 4, seconds=SECONDS):
        assert [message for message, _ in rank] == [""] * 9
        assert [norm for _, norm in rank if norm == norm] == pytest.approx([8.0] * 3)


def wrong_at_first_in_one_stage(rank: int) -> str:
    """Of the stage that has DTensors, in a step in which the other stage meets nobody."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    mesh = world["dp"] if rank < 2 else None
    groups = [world["pp"].get_group()]
    optimizer = FusedAdamW([param(mesh, [Shard(0)])], lr=0.1, norm_process_groups=groups)
    if rank == 1:
        optimizer.param_groups[0]["lr"] = -1.0
    message = said(optimizer.step)
    distributed.barrier()
    return message


def test_an_error_that_concerns_one_stage() -> None:
    first, second, *others = on_ranks.run(wrong_at_first_in_one_stage, 4, seconds=SECONDS)
    assert first == second
    assert first.startswith("ValueError: rank 1: param group 0: lr: found -1.0")
    assert others == ["", ""]


def parts_that_stop_clipping(rank: int) -> list[str]:
    """Of plain parts: all stop, as an overflow is found on one; all stop, as one cannot step."""
    found = []
    for trouble in ("overflow", "error"):
        optimizer = FusedAdamW(
            [param(None, [])],
            lr=0.1,
            max_grad_norm=1.0,
            norm_process_groups=[distributed.group.WORLD],
        )
        optimizer.step()
        optimizer.max_grad_norm = None
        if rank == 1 and trouble == "overflow":
            optimizer.found_inf = torch.tensor(1.0)
        if rank == 1 and trouble == "error":
            optimizer.param_groups[0]["lr"] = -1.0
        found.append(said(optimizer.step))
        distributed.barrier()
    return found


def test_parts_that_all_stop_clipping() -> None:
    for overflow, error in on_ranks.run(parts_that_stop_clipping, 2, seconds=SECONDS):
        assert not overflow
        assert error.startswith("ValueError: rank 1: param group 0: lr: found -1.0")


def test_an_error_in_another_stage() -> None:
    found = on_ranks.run(stages, 4, "an error", seconds=SECONDS)
    (message,) = {message for message, _ in found}
    assert message.startswith("ValueError: rank 3: param group 0: lr: found -1.0")


def test_a_process_group_of_ranks_that_share_parameters() -> None:
    for rank, (message, _) in enumerate(on_ranks.run(stages, 4, "shared", seconds=SECONDS)):
        ranks = [0, 1] if rank < 2 else [2, 3]
        assert f"norm_process_groups: found a group with the ranks {ranks}" in message


Undo = Callable[[], object]


def break_options(optimizer: FusedAdamW) -> Undo:
    optimizer.max_grad_norm = -1.0
    return lambda: setattr(optimizer, "max_grad_norm", 1.0)


def break_memory(optimizer: FusedAdamW) -> Undo:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    optimizer._give_up_registered()
    optimizer._step_anew = out_of_memory  # type: ignore[assignment, method-assign]
    return lambda: delattr(optimizer, "_step_anew")


def break_group(optimizer: FusedAdamW) -> Undo:
    del optimizer.param_groups[0]["lr"]
    return lambda: optimizer.param_groups[0].update(lr=0.1)


def add_group(optimizer: FusedAdamW) -> Undo:
    optimizer.add_param_group({"params": [param(None, [])]})
    return lambda: optimizer.param_groups.pop()


def break_telemetry(optimizer: FusedAdamW) -> Undo:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    optimizer.collect_telemetry = True
    optimizer._measurements.observe = out_of_memory  # type: ignore[method-assign]

    def undo() -> None:
        optimizer.collect_telemetry = False
        del optimizer._measurements.observe

    return undo


def break_process_groups(optimizer: FusedAdamW) -> Undo:
    optimizer.norm_process_groups = [None]
    return lambda: setattr(optimizer, "norm_process_groups", ())


def break_words(optimizer: FusedAdamW) -> Undo:
    """A value that cannot be told to others."""
    optimizer.param_groups[0]["tag"] = torch.ones(2).to_sparse()
    optimizer._ranks_known = [], ()
    return lambda: optimizer.param_groups[0].pop("tag")


def change_lr(optimizer: FusedAdamW) -> Undo:
    optimizer.param_groups[0]["lr"] = 0.2
    return lambda: optimizer.param_groups[0].update(lr=0.1)


def change_limit(optimizer: FusedAdamW) -> Undo:
    optimizer.max_grad_norm = 2.0
    return lambda: setattr(optimizer, "max_grad_norm", 1.0)


def stop_clipping(optimizer: FusedAdamW) -> Undo:
    optimizer.max_grad_norm = None
    return lambda: setattr(optimizer, "max_grad_norm", 1.0)


def lose_gradient(optimizer: FusedAdamW) -> Undo:
    param = optimizer.param_groups[0]["params"][1]
    grad, param.grad = param.grad, None
    return lambda: setattr(param, "grad", grad)


CHANGES: dict[Callable[[FusedAdamW], Undo], str] = {
    break_options: "ValueError: rank 1: max_grad_norm: found -1.0",
    break_memory: "RuntimeError: rank 1: CUDA out of memory",
    break_group: "RuntimeError: rank 1: KeyError: 'lr'",
    break_telemetry: "RuntimeError: rank 1: CUDA out of memory",
    add_group: "ValueError: rank 1: found 2 param groups; on rank 0 1 param groups; accepted",
    change_lr: "ValueError: rank 1: found param group 0: lr 0.2; on rank 0 param group 0: lr 0.1;",
    change_limit: "ValueError: rank 1: found max_grad_norm 2.0; on rank 0 max_grad_norm 1.0;",
    stop_clipping: "ValueError: rank 1: found max_grad_norm None; on rank 0 max_grad_norm 1.0;",
    lose_gradient: "ValueError: rank 1: found parameter 1 of param group 0 without a gradient",
}


def changed_on_one_rank(rank: int, steps: int) -> list[tuple[list[str], bool, bool]]:
    """Of every change what is said, twice, and once it is undone; what moved before and then."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for change in CHANGES:
        params = [param(mesh, [Shard(0)]), param(mesh, [Replicate()])]
        optimizer = FusedAdamW(params, lr=0.1, max_grad_norm=1.0)
        for _ in range(steps):
            optimizer.step()
        before = [local(x.detach()).clone() for x in params]

        def moved(before: list[torch.Tensor] = before, params: list[Any] = params) -> bool:
            pairs = zip(before, params, strict=True)
            return not all(torch.equal(x, local(y.detach())) for x, y in pairs)

        undo = change(optimizer) if rank == 1 else lambda: None
        messages = [said(optimizer.step), said(optimizer.step)]
        too_early = moved()
        undo()
        messages.append(said(optimizer.step))
        found.append((messages, too_early, moved()))
    return found


@pytest.mark.parametrize("steps", [0, 2])
def test_what_one_rank_changes_alone(steps: int) -> None:
    """All raise the same, at the first step or later, until it is mended."""
    ranks = on_ranks.run(changed_on_one_rank, 2, steps, seconds=SECONDS)
    for number, (change, named) in enumerate(CHANGES.items()):
        name = change.__name__
        (message,) = {message for rank in ranks for message in rank[number][0][:2]}
        assert message.startswith(named), f"{name}: {message}"
        for messages, too_early, moved in (rank[number] for rank in ranks):
            assert not too_early, name
            assert not messages[2], f"{name}: {messages[2]}"
            assert moved, name


class Tag:
    """Of which every process has its own."""


def alike_but_for_types(rank: int) -> list[str]:
    """Numbers of other types, objects of a rank's own, a state that one rank loads alone."""
    mesh = init_device_mesh("cpu", (2,))
    optimizer = FusedAdamW(
        [{"params": [param(mesh, [Shard(0)])], "tag": Tag(), "lr": [1, np.float64(1)][rank]}],
        max_grad_norm=[1, 1.0][rank],
    )
    found = [said(optimizer.step)]
    if rank == 1:
        optimizer.load_state_dict(optimizer.state_dict())
    return [*found, said(optimizer.step)]


def test_what_need_not_be_the_same() -> None:
    assert on_ranks.run(alike_but_for_types, 2, seconds=SECONDS) == [["", ""]] * 2


def on_grids_alike(rank: int) -> list[float]:
    """Grids of all ranks with other neighbours; names of process groups tell nothing."""
    found = []
    for _ in range(3):
        by_rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        order = torch.tensor([[0, 2], [1, 3]])
        by_columns = DeviceMesh("cpu", order, mesh_dim_names=("rows", "columns"))
        params = [param(mesh, [Shard(0), Shard(1)]) for mesh in (by_rows, by_columns, by_rows)]
        optimizer = FusedAdamW(params, lr=0.1, max_grad_norm=1.0)
        optimizer.step()
        assert optimizer.grad_norm is not None
        found.append(optimizer.grad_norm.item())
    return found


def test_one_of_several_meshes_is_chosen_alike() -> None:
    for norms in on_ranks.run(on_grids_alike, 4, seconds=SECONDS):
        assert norms == pytest.approx([math.sqrt(96)] * 3)


def stopped_on_the_device(rank: int) -> list[int]:
    """Counts of steps where rank 1 stops clipping, then both, and both clip again."""
    mesh = init_device_mesh("cpu", (2,))
    optimizer = FusedAdamW([param(mesh, [Shard(0)])], lr=0.1, **ENGINES[1])
    counts = []
    for limits in [(1.0, 1.0), (1.0, None), (1.0, None), (None, None), (1.0, 1.0)]:
        optimizer.max_grad_norm = limits[rank]
        optimizer.step()
        counts.append(int(optimizer.param_groups[0]["schedule_step"]))
    return counts


def test_a_rank_that_stops_clipping_on_the_device() -> None:
    """No step is taken while it does, on any rank."""
    assert on_ranks.run(stopped_on_the_device, 2, seconds=SECONDS) == [[1, 1, 1, 2, 3]] * 2


def other_gradients_on_each(rank: int) -> str:
    """As many of them as on the other rank."""
    mesh = init_device_mesh("cpu", (2,))
    params = [param(mesh, [Replicate()]) for _ in range(2)]
    optimizer = FusedAdamW(params, lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    params[rank].grad = None
    return said(optimizer.step)


def test_other_gradients_on_each_rank() -> None:
    (message,) = {*on_ranks.run(other_gradients_on_each, 2, seconds=SECONDS)}
    assert "without a gradient; on rank 0" in message or "with a gradient; on rank 0" in message


def bad_words_and_groups(rank: int) -> list[str]:
    """What fails on one rank before anything is compared, once ranks have met."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for change in (break_process_groups, break_words):
        optimizer = FusedAdamW([param(mesh, [Shard(0)])], lr=0.1, max_grad_norm=1.0)
        optimizer.step()
        if rank == 1:
            change(optimizer)
        found.append(said(optimizer.step))
        distributed.barrier()
    return found


def test_what_fails_before_anything_is_compared() -> None:
    ranks = on_ranks.run(bad_words_and_groups, 2, seconds=SECONDS)
    assert ranks[0][0] == ranks[1][0]
    assert ranks[0][0].startswith("TypeError: rank 1: norm_process_groups: found [None]")


def outside_of_the_mesh(rank: int) -> str:
    """Rank 2 has none of the ranks of the only mesh, and a plain parameter."""
    optimizer = FusedAdamW(
        [param(DeviceMesh("cpu", [0, 1]), [Shard(0)]), param(None, [])], lr=0.1, max_grad_norm=1.0
    )
    return said(optimizer.step)


def test_a_rank_outside_of_every_mesh() -> None:
    *inside, outside = on_ranks.run(outside_of_the_mesh, 3, seconds=SECONDS)
    assert inside == ["", ""]
    assert "params: found DTensors of a mesh of ranks [0, 1]" in outside


def turned_off_on_all(rank: int) -> list[int]:
    """How many collectives each step has: with clipping, the one after it, and later ones."""
    mesh = init_device_mesh("cpu", (2,))
    calls: list[Any] = []
    all_reduce = distributed.all_reduce
    distributed.all_reduce = lambda *args, **kwargs: calls.append(0) or all_reduce(*args, **kwargs)
    optimizer = FusedAdamW(
        [param(mesh, [Shard(0)])], lr=0.1, max_grad_norm=1.0, telemetry=rank == 1
    )
    found = []
    for limit in (1.0, 1.0, None, None, 1.0):
        optimizer.max_grad_norm = limit
        calls.clear()
        optimizer.step()
        found.append(len(calls))
    return found


def test_a_clipping_that_all_turn_off() -> None:
    assert on_ranks.run(turned_off_on_all, 2, seconds=SECONDS) == [[1, 1, 1, 0, 1]] * 2


def replaced(rank: int) -> list[float]:
    """Norms after the parameters of a group were replaced in place."""
    mesh = init_device_mesh("cpu", (2,))
    optimizer = FusedAdamW([param(None, [])], lr=0.1, max_grad_norm=1.0)
    found = []
    for params in ([param(mesh, [Shard(0)])], [param(mesh, [Shard(0)]), param(None, [])]):
        optimizer.step()
        optimizer.param_groups[0]["params"] = params
        optimizer.step()
        assert optimizer.grad_norm is not None
        found.append(optimizer.grad_norm.item())
    return found


def test_parameters_replaced_in_place() -> None:
    expected = [pytest.approx(math.sqrt(32)), pytest.approx(8.0)]
    assert on_ranks.run(replaced, 2, seconds=SECONDS) == [expected] * 2


def failing_on_the_device(rank: int) -> tuple[list[str], list[int]]:
    """A later step that rank 1 cannot take: its message; the counts of steps of all."""
    mesh = init_device_mesh("cpu", (2,))
    params = [param(mesh, [Shard(0)])]
    optimizer = FusedAdamW(params, lr=0.1, max_grad_norm=1.0, **ENGINES[1])
    messages, counts = [], []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = -1.0 if (rank, step) == (1, 1) else 0.1
        messages.append(said(optimizer.step))
        counts.append(int(optimizer.param_groups[0]["schedule_step"]))
    return messages, counts


def test_the_others_skip_a_step_that_the_device_decides() -> None:
    (good, counts), (bad, own_counts) = on_ranks.run(failing_on_the_device, 2, seconds=SECONDS)
    assert good == ["", "", ""]
    assert bad[1].startswith("ValueError: rank 1: param group 0: lr: found -1.0")
    assert counts == own_counts == [1, 1, 2]
