"""A step over shards is bit for bit the step over the whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import on_ranks
import pytest
import torch
from sharded_training import DRAWING, F32, FORMATS, LOUD, RULES, Pair
from torch import Tensor, nn
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Placement,
    Replicate,
    Shard,
    init_device_mesh,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adamw import FusedAdamW, FusedSGD
from fused_adamw.engines import triton

pytestmark = on_ranks.needs_gloo

# Large enough to be coded, in ragged shards and on two ranks of four; small; with empty shards.
SHAPES = [(70, 64), (2, 2048), (5, 3), (3,), (1, 7), (0, 4)]


def on_rows(rank: int, one_in: int) -> list[str]:
    """One in so many pairs of rule and format, sharded by rows; returns what differs."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found = []
    for i, (name, (options, dtype)) in enumerate({**FORMATS, **DRAWING}.items()):
        for cls, hyperparameters in RULES[i % one_in :: one_in]:
            pair = Pair(
                lambda params, c=cls, h=hyperparameters, o=options: c(params, **h, **o),
                SHAPES,
                dtype,
                [(mesh, [Shard(0)])] * len(SHAPES),
            )
            for step in range(2):
                pair.step(step)
            found += [f"{cls.__name__} {name}: {what}" for what in pair.differences()]
    return found


@pytest.mark.parametrize(("ranks", "one_in"), [(1, 5), (2, 1), (4, 3)])
def test_every_rule_and_format_in_shards_of_rows(ranks: int, one_in: int) -> None:
    assert on_ranks.run(on_rows, ranks, one_in) == [[]] * ranks


def placed() -> list[tuple[DeviceMesh, list[Placement]]]:
    """Every way of four ranks over two dimensions of a tensor."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,))
    each: list[Placement] = [Shard(0), Shard(1), Replicate()]
    return [
        *((grid, [x, y]) for x in each for y in each),
        *((line, [x]) for x in each),
        *((grid["tp"], [x]) for x in each),
    ]


def on_every_placement(rank: int) -> list[str]:
    """Parameters of all placements, and plain ones, in one group."""
    found = []
    for name, (options, dtype) in {**FORMATS, **DRAWING}.items():
        meshes: list[Any] = [*placed(), (None, [])]
        # 256 columns so that shards of columns are of whole blocks; and a ragged one.
        for shape in [(24, 256), (7, 9)]:
            pair = Pair(
                lambda params, o=options: FusedAdamW(params, **LOUD, ema_decay=0.5, **o),
                [shape] * len(meshes),
                dtype,
                meshes,
            )
            for step in range(3):
                pair.step(step)
            buckets = pair.optimizer._registered.native.buckets()
            found += [f"{name} {shape}: {what}" for what in pair.differences()]
            if len(buckets) != 1:
                found.append(f"{name} {shape}: {len(buckets)} launches")
    return found


def test_every_placement_and_plain_tensors_in_one_launch() -> None:
    assert on_ranks.run(on_every_placement, 4) == [[]] * 4


# A shape and the dimension that two ranks share (None: they have copies), and whether blocks of 64
# fit the shards.
BLOCKS = [
    ((64, 64), 0, True),
    ((65, 64), 0, True),  # 33 and 32 rows
    ((128, 65), 0, True),  # 65 blocks each, whose bounds are not those of rows
    ((64, 65), 0, False),  # 32 and a half
    ((8, 576), 0, True),
    ((8, 576), 1, False),  # four and a half in a row
    ((8, 640), 1, True),
    ((8192,), 0, True),
    ((4160,), 0, False),
    ((70, 59), 0, False),  # not divisible
    ((70, 59), None, False),
    ((32, 16, 3, 3), 0, True),  # 144 in a row: only 4 rows are whole blocks, 16 are 36
    ((10, 64, 3, 3), 1, False),
    ((10, 128, 3, 3), 1, True),
    ((16, 16, 4, 4), 2, False),  # within a block
    ((64, 1, 64), 1, True),  # all on one rank
]


def blocks_that_fit(rank: int) -> list[str]:
    """Coded where they do, with the bits of the whole; otherwise with the bits of float states."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for shape, dim, fits in BLOCKS:
        placements = [Replicate() if dim is None else Shard(dim)]
        pair = Pair(
            partial(FusedAdamW, **LOUD, precision="8bit"), [shape], F32, [(mesh, placements)]
        )
        if not fits:
            pair.reference = FusedAdamW(pair.whole, **LOUD, precision="fp32")
        pair.step(0)
        pair.step(1)
        state = pair.optimizer.state[pair.params[0]]
        if ("exp_avg_scale" in state) != fits:
            found.append(f"{shape} by {dim}: {sorted(state)}")
        found += [f"{shape} by {dim}: {what}" for what in pair.differences()]
    return found


def test_blocks_of_codes_that_fit_and_do_not_fit_shards() -> None:
    assert on_ranks.run(blocks_that_fit, 2) == [[], []]


def in_strides(rank: int) -> list[str]:
    """As FSDP2 over tensor parallel cuts one dimension: a rank has one piece of the whole."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cube = init_device_mesh("cpu", (2, 1, 2))
    rows, columns = _StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2)
    found = []
    cases: list[tuple[tuple[int, ...], DeviceMesh, list[Placement]]] = [
        ((64, 128), grid, [rows, Shard(0)]),
        ((64, 256), grid, [columns, Shard(1)]),
        ((16, 8, 64), grid, [columns, Shard(1)]),
        ((8, 544), grid, [rows, Shard(0)]),  # 17 blocks each
        ((8, 5), cube, [rows, rows, Shard(0)]),
    ]
    for name in (*DRAWING, "8bit of float32"):
        options, dtype = {**FORMATS, **DRAWING}[name]
        for shape, mesh, placements in cases:
            pair = Pair(
                lambda params, o=options: FusedAdamW(params, **LOUD, **o),
                [shape],
                dtype,
                [(mesh, placements)],
            )
            pair.step(0)
            pair.step(1)
            found += [f"{name} {shape}: {what}" for what in pair.differences()]
    return found


def test_strided_shards_of_one_piece() -> None:
    assert on_ranks.run(in_strides, 4) == [[]] * 4


def in_several_pieces(rank: int) -> list[str]:
    """Rows that are not adjacent in the whole: coded where blocks are within rows."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for shape, fits in [((64, 64), True), ((8, 528), False)]:
        pair = Pair(
            partial(FusedAdamW, **LOUD, precision="8bit"),
            [shape],
            F32,
            [(mesh, [_StridedShard(0, split_factor=2)])],
        )
        if not fits:
            pair.reference = FusedAdamW(pair.whole, **LOUD, precision="fp32")
        pair.step(0)
        pair.step(1)
        found += [f"{shape}: {what}" for what in pair.differences()]
    return found


def test_blocks_of_codes_in_strided_shards_of_several_pieces() -> None:
    assert on_ranks.run(in_several_pieces, 2) == [[], []]


def column_major(rank: int) -> list[str]:
    """Random bits follow the order of memory, in shards as in the whole."""
    mesh = init_device_mesh("cpu", (2,))
    orders = {(64, 128): (1, 0), (7, 6): (1, 0), (4, 6, 8): (1, 2, 0), (1, 6, 4): (2, 0, 1)}
    found = []
    for shape, order in orders.items():
        for dim in range(len(shape)):
            for name in ("fp32", *DRAWING):
                options, dtype = {**FORMATS, **DRAWING}[name]
                pair = Pair(
                    lambda params, o=options: FusedAdamW(params, **LOUD, **o),
                    [shape],
                    dtype,
                    [(mesh, [Shard(dim)])],
                    lambda x, order=order: stored_in(x, order),
                )
                if name == "8bit":  # its codes are row-major where there are shards
                    pair.reference = FusedAdamW(pair.whole, **LOUD, precision="split")
                pair.step(0)
                pair.step(1)
                found += [f"{shape} by {dim} {name}: {what}" for what in pair.differences()]
    return found


def stored_in(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values in memory whose dimensions are nested in this order, outermost first."""
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def test_shards_of_column_major_memory() -> None:
    assert on_ranks.run(column_major, 2) == [[], []]


def columns_on_other_engines(rank: int, engines: list[str]) -> list[str]:
    """Shards that are not one run of the whole, where random bits are drawn by place in it."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    shapes = [(33, 128), (3, 34), (2, 5, 7), (5, 7, 3)]  # the first is coded
    for engine in engines:
        for name in ("stochastic", "8bit"):
            options, dtype = DRAWING[name]
            pair = Pair(
                lambda params, o=options, e=engine: FusedAdamW(params, **LOUD, engine=e, **o),
                shapes,
                dtype,
                [(mesh, [Shard(1)])] * len(shapes),
            )
            pair.step(0)
            found += [f"{engine} {name}: {what}" for what in pair.differences()]
    return found


def test_shards_of_columns_on_other_engines() -> None:
    engines = ["reference", "cuda-on-host"]
    if triton.unavailable_reason() is None and triton.interpreted():
        engines.append("triton")
    assert on_ranks.run(columns_on_other_engines, 2, engines) == [[]] * 2


class Seen(TorchDispatchMode):
    """What torch does within, by its dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def without_dispatch(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    pair = Pair(partial(FusedAdamW, **LOUD), SHAPES, F32, [(mesh, [Shard(0)])] * len(SHAPES))
    pair.step(0)
    pair.set_grads(1)
    with Seen() as seen:
        pair.optimizer.step()
    return seen.names


def test_a_step_calls_nothing_of_torch() -> None:
    """No DTensor is dispatched, nothing is gathered."""
    assert on_ranks.run(without_dispatch, 2) == [[], []]


def with_new_memory(rank: int) -> list[str]:
    """Local tensors that are replaced under a DTensor, as FSDP2 does, are noticed."""
    mesh = init_device_mesh("cpu", (2,))
    pair = Pair(partial(FusedAdamW, **LOUD), SHAPES, F32, [(mesh, [Shard(0)])] * len(SHAPES))
    pair.step(0)
    for param in pair.params:
        param._local_tensor = param._local_tensor.detach().clone()
    states = [dict(pair.optimizer.state[param]) for param in pair.params]
    for state in states:
        for value in state.values():
            if isinstance(value, DTensor):
                value._local_tensor = value._local_tensor.clone()
    pair.step(1)
    return pair.differences()


def test_local_tensors_may_be_replaced() -> None:
    assert on_ranks.run(with_new_memory, 2) == [[], []]


def some_gradients_missing(rank: int) -> list[str]:
    """Gradients that come and go, strides of their own, and zero_grads."""
    mesh = init_device_mesh("cpu", (2,))
    pair = Pair(
        partial(FusedAdamW, **LOUD, zero_grads=True, ema_decay=0.9, telemetry=True),
        SHAPES,
        F32,
        [(mesh, [Shard(0)])] * len(SHAPES),
    )
    found: list[str] = []
    for step in range(4):
        pair.set_grads(step)
        if step % 2 == 0:
            pair.params[0].grad = pair.whole[0].grad = None
        local = pair.params[2].grad.to_local()
        pair.params[2].grad._local_tensor = local.t().contiguous().t()
        pair.optimizer.step()
        pair.reference.step()
        found += [
            f"gradient {i} is not zero"
            for i, param in enumerate(pair.params)
            if param.grad is not None and param.grad.to_local().count_nonzero()
        ]
    with pair.optimizer.swap_ema(), pair.reference.swap_ema():
        found += pair.differences()
    return found + pair.differences()


def test_missing_gradients_strides_averages_and_zeroed_gradients() -> None:
    assert on_ranks.run(some_gradients_missing, 2) == [[], []]


def overflow(rank: int) -> list[str]:
    """That the scaler found, where nothing asks for the gradients: they are zeroed all the same."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    meshes: list[Any] = [(mesh, [Shard(0)]), (None, [])]
    pair = Pair(partial(FusedAdamW, **LOUD, zero_grads=True), [(8, 4), (4,)], F32, meshes)
    pair.set_grads(0)
    grads = [param.grad for param in pair.params]
    local = grads[0].to_local()
    versions = local._version, grads[1]._version
    pair.optimizer.found_inf = pair.reference.found_inf = torch.ones(())
    pair.optimizer.step()
    pair.reference.step()
    found = [f"gradient {i}" for i, x in enumerate([local, grads[1]]) if x.count_nonzero()]
    if (local._version, grads[1]._version) <= versions:
        found.append("autograd does not know")
    return found + pair.differences()


@pytest.mark.parametrize("ranks", [1, 2])
def test_overflow_with_zeroed_gradients(ranks: int) -> None:
    assert on_ranks.run(overflow, ranks) == [[]] * ranks


def deferred(rank: int) -> list[str]:
    """Gradients as collectives hand them out, still on their way."""
    from torch.distributed._functional_collectives import all_reduce

    mesh = init_device_mesh("cpu", (2,))
    pair = Pair(partial(FusedSGD, **LOUD, momentum=0.9), [(8, 3)], F32, [(mesh, [Replicate()])])
    for step in range(3):
        pair.set_grads(step)
        local = all_reduce(pair.whole[0].grad, "sum", mesh.get_group())
        pair.params[0].grad = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
        pair.whole[0].grad = pair.whole[0].grad * 2
        pair.optimizer.step()
        pair.reference.step()
    return pair.differences()


def test_gradients_on_their_way() -> None:
    assert on_ranks.run(deferred, 2) == [[], []]


# --- FSDP2 ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """With a bias that has fewer rows than there are ranks."""

    def __init__(self, dtype: torch.dtype, width: int = 70) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, width, dtype=dtype)
        self.second = nn.Linear(width, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def fully_sharded(rank: int, names: list[str], is_grid: bool, width: int = 70) -> list[str]:
    """Against an optimizer of the gathered parameters that gets the gathered gradients."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    found = []
    for name in names:
        options, dtype = {**FORMATS, **DRAWING}[name]
        net, whole = Net(dtype, width), Net(dtype, width)
        if is_grid:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
            parallelize_module(net, mesh["tp"], plan)
            fully_shard(net, mesh=mesh["dp"])
        else:
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            fully_shard(net.first, mesh=mesh)
            fully_shard(net, mesh=mesh)
        make = partial(FusedAdamW, **LOUD, max_grad_norm=0.5, **options)
        optimizer, reference = make(net.parameters()), make(whole.parameters())
        for step in range(3):
            torch.manual_seed(10 * step + mesh.get_coordinate()[0])
            net(torch.randn(4, 16, dtype=dtype)).square().sum().backward()
            for param, other in zip(net.parameters(), whole.parameters(), strict=True):
                other.grad = param.grad.full_tensor()
            optimizer.step()
            reference.step()
            optimizer.zero_grad()
        for (label, param), other in zip(net.named_parameters(), whole.parameters(), strict=True):
            if optimizer.state[param].keys() != reference.state[other].keys():
                found.append(f"{name}: states of {label}")
            if not torch.equal(param.full_tensor(), other):
                found.append(f"{name}: {label}")
        if optimizer.grad_norm != reference.grad_norm:
            found.append(f"{name}: norm {optimizer.grad_norm} {reference.grad_norm}")
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fully_shard(ranks: int) -> None:
    found = on_ranks.run(fully_sharded, ranks, ["fp32", "split", "kahan", "stochastic"], False)
    assert found == [[]] * ranks


def test_fully_shard_and_tensor_parallel() -> None:
    assert on_ranks.run(fully_sharded, 4, ["fp32", "split"], True) == [[]] * 4


def test_fully_shard_and_tensor_parallel_where_random_bits_are_drawn() -> None:
    """Both cut the rows of the first layer, whose states "8bit" codes."""
    found = on_ranks.run(fully_sharded, 4, ["stochastic", "8bit"], True, 256)
    assert found == [[]] * 4


def evaluated_with_averages(rank: int) -> list[bool]:
    """Losses of training with an evaluation in each step, beside those without, and what it saw."""
    from torch.distributed.fsdp import fully_shard

    losses: dict[bool, list[Tensor]] = {False: [], True: []}
    found = []
    for evaluates, seen in losses.items():
        net, other = Net(F32), Net(F32)
        fully_shard(net.first)
        fully_shard(net)
        optimizer = FusedAdamW(net.parameters(), **LOUD, ema_decay=0.5)
        for step in range(4):
            torch.manual_seed(step)
            x = torch.randn(4, 16)
            loss = net(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
            if evaluates:
                with optimizer.swap_ema(), torch.no_grad():
                    for param, its in zip(net.parameters(), other.parameters(), strict=True):
                        its.copy_(param.full_tensor())
                    found.append(torch.equal(net(x), other(x)))
                    net.reshard()
    return [*found, torch.equal(torch.stack(losses[False]), torch.stack(losses[True]))]


def test_an_evaluation_with_averages_under_fsdp() -> None:
    assert on_ranks.run(evaluated_with_averages, 2) == [[True] * 5] * 2
