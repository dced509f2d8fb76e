"""torch.distributed.checkpoint: saved by some ranks, resumed by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
from sharded_training import DRAWING, F32, FORMATS, LOUD, RULES, differing, drawn, spread
from torch import distributed, nn, optim
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import Replicate, Shard, init_device_mesh

from fused_adamw import FusedAdamW, master_parameters
from fused_adamw.checkpoint import LoadPlanner

pytestmark = on_ranks.needs_gloo

# Coded and not, ragged on 4 and on 2 ranks, empty on some, not divisible into blocks.
SHAPES = {"large": (70, 64), "wide": (2, 4096), "odd": (5, 3), "bias": (3,), "conv": (70, 3, 7, 7)}
ALL_FORMATS = {**FORMATS, **DRAWING}


class Model(nn.Module):  # of Shard(1) the one-dimensional ones are replicated
    """Parameters of `SHAPES`, as DTensors over all ranks; plain without a process group."""

    def __init__(self, dtype: torch.dtype, placement: Any = None) -> None:
        super().__init__()
        mesh = None
        if placement is not None:
            mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for (name, _), value in zip(
            SHAPES.items(), drawn([*SHAPES.values()], dtype, 1), strict=True
        ):
            own = Replicate() if placement == Shard(1) and value.dim() == 1 else placement
            setattr(self, name, nn.Parameter(spread(value, mesh, [own])))

    def train_on(self, optimizer: optim.Optimizer, steps: range) -> None:
        for step in steps:
            params = list(self.parameters())
            grads = drawn([*SHAPES.values()], params[0].dtype, 100 + step)
            for param, grad in zip(params, grads, strict=True):
                mesh = getattr(param, "device_mesh", None)
                param.grad = spread(grad, mesh, getattr(param, "placements", []))
            optimizer.step()
            optimizer.zero_grad()


def make(model: Model, name: str, **more: Any) -> FusedAdamW:
    groups = [
        {"params": [model.large, model.odd]},
        {"params": [model.wide, model.bias, model.conv], "weight_decay": 0.3},
    ]
    return FusedAdamW(groups, **{**LOUD, **ALL_FORMATS[name].options, **more})


def save(rank: int, folder: str, names: list[str], is_async: bool) -> None:
    for name in names:
        model = Model(ALL_FORMATS[name].dtype, Shard(0))
        optimizer = make(model, name, ema_decay=0.9)
        model.train_on(optimizer, range(2))
        found = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        if is_async:
            saving = dcp.async_save(found, checkpoint_id=Path(folder) / name)
            model.train_on(optimizer, range(2, 3))  # while it is saved
            saving.result()
        else:
            dcp.save(found, checkpoint_id=Path(folder) / name)


def resume(rank: int, folder: str, names: list[str]) -> list[str]:
    """What differs, after two more steps, from four steps without a checkpoint."""
    found = []
    for name in names:
        model = Model(ALL_FORMATS[name].dtype, Shard(0))
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        optimizer = make(model, name, ema_decay=0.9)
        state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=Path(folder) / name)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        model.train_on(optimizer, range(2, 4))
        whole = Model(ALL_FORMATS[name].dtype, Shard(0))
        reference = make(whole, name, ema_decay=0.9)
        whole.train_on(reference, range(4))
        for key, param in model.named_parameters():
            other = whole.get_parameter(key)
            if not torch.equal(param.to_local(), other.to_local()):
                found.append(f"{name}: {key}")
            mine, theirs = optimizer.state[param], reference.state[other]
            found += [f"{name}: keys of {key}"] * (mine.keys() != theirs.keys())
            for state_key in mine.keys() & theirs.keys():
                x, y = (
                    getattr(s[state_key], "_local_tensor", s[state_key]) for s in (mine, theirs)
                )
                if not torch.equal(x, y):
                    found.append(f"{name}: {state_key} of {key}")
    return found


FEW = ["fp32", "split", "8bit"]


@pytest.mark.parametrize(
    ("names", "savers", "loaders", "is_async"),
    [
        (list(ALL_FORMATS), 4, (2,), False),
        (FEW, 4, (4, 1), True),
        (FEW, 1, (4,), False),
    ],
    ids=["save in every format", "async_save", "save from one"],
)
def test_resharding(
    tmp_path: Path, names: list[str], savers: int, loaders: tuple[int, ...], is_async: bool
) -> None:
    """Training goes on, on another number of ranks, bit for bit as if never interrupted."""
    on_ranks.run(save, savers, str(tmp_path), names, is_async)
    for ranks in loaders:
        assert on_ranks.run(resume, ranks, str(tmp_path), names) == [[]] * ranks


def before_a_first_step(rank: int) -> list[str]:
    """Whether reading a state dict early is without effect on the training."""
    found = []
    for cls, hyperparameters in RULES:
        models = [Model(F32, Shard(0)) for _ in range(2)]
        optimizers = [cls(model.parameters(), **hyperparameters, ema_decay=0.5) for model in models]
        state = get_optimizer_state_dict(models[0], optimizers[0])
        assert state["state"]["large"]
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train_on(optimizer, range(2))
        for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
            if differing(x.to_local(), y.to_local()):
                found.append(cls.__name__)
            for key, value in optimizers[0].state[x].items():
                other = optimizers[1].state[y][key]
                if differing(*(getattr(z, "_local_tensor", z) for z in (value, other))):
                    found.append(f"{cls.__name__}: {key}")
        if optimizers[0].param_groups[0]["schedule_step"] != 2:
            found.append(f"{cls.__name__}: schedule_step")
    return found


def test_a_state_dict_before_the_first_step_takes_none() -> None:
    assert on_ranks.run(before_a_first_step, 2) == [[], []]


# --- Between formats, between sharded and plain, from torch --------------------------------------


def made(model: Model, name: str, is_torch: bool) -> Any:
    if is_torch:
        return optim.AdamW(model.parameters(), **LOUD)
    return make(model, name)


def save_each(rank: int, folder: str, cases: Any, placement: Any, is_torch: bool) -> list[Any]:
    """Of each case what `whole_of` says of the training that is saved."""
    found = []
    for i, (name, _) in enumerate(cases):
        model = Model(ALL_FORMATS[name].dtype, placement)
        optimizer = made(model, name, is_torch)
        model.train_on(optimizer, range(2))
        state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=Path(folder) / str(i))
        found.append(whole_of(model, optimizer))
    return found


def load_each(rank: int, folder: str, cases: Any, placement: Any, is_torch: bool) -> list[Any]:
    found = []
    for i, (_, name) in enumerate(cases):
        model = Model(ALL_FORMATS[name].dtype, placement)
        if is_torch:  # of one param group
            optimizer = FusedAdamW(model.parameters(), **LOUD, **ALL_FORMATS[name].options)
        else:
            optimizer = make(model, name)
        optimizer.param_groups[0]["lr"] = 7.0
        state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=Path(folder) / str(i), planner=LoadPlanner())
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        assert optimizer.param_groups[0]["lr"] == LOUD["lr"]
        found.append(whole_of(model, optimizer))
        model.train_on(optimizer, range(2, 3))
    return found


def whole_of(model: Model, optimizer: Any) -> dict[str, Any]:
    """Of each parameter the whole of its value, its master and its states, in float32."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    masters = list(params)
    exported = {i: optimizer.state[param] for i, param in enumerate(params)}
    if isinstance(optimizer, FusedAdamW):
        masters = list(master_parameters(optimizer))
        exported = optimizer.export_fp32_state()["state"]
    found: dict[str, Any] = {}
    names = {param: name for name, param in model.named_parameters()}
    for i, (param, master) in enumerate(zip(params, masters, strict=True)):
        values = {"param": param, "master": master, **exported[i]}
        found[names[param]] = {
            key: getattr(value, "full_tensor", value.clone)().detach().clone()
            for key, value in values.items()
        }
    return found


def assert_near(found: dict[str, Any], expected: dict[str, Any], source: str, target: str) -> None:
    """As near as the coarser of two formats can tell; the same where that is exact."""
    coded = "8bit" in source or "8bit" in target
    halves = {"bf16", "kahan", "fp16", "split, bfloat16 states", "fp32, bfloat16 states"}
    for key, values in expected.items():
        assert values.keys() == found[key].keys()
        for name, value in values.items():
            mine = found[key][name].double()
            value = value.double()
            if name == "step":
                assert mine == value
            elif name == "param":
                assert torch.equal(mine, value), f"{name} of {key}, {source} to {target}"
            elif coded and name != "master":
                # A step of a code next to the largest of a block; squares have finer ones.
                error = (mine - value).abs().max() / value.abs().max()
                assert error <= 2**-4, f"{name} of {key}, {source} to {target}"
            else:
                rel = 2**-7 if {source, target} & halves or coded else 0.0
                torch.testing.assert_close(mine, value, rtol=rel, atol=0.0)


BETWEEN = [
    ("8bit of float32", "fp32"),
    ("fp32", "8bit of float32"),
    ("8bit", "split"),
    ("split", "8bit"),
    ("8bit", "8bit, 16-bit remainder"),
    ("split", "master"),
    ("master", "kahan"),
    ("bf16", "split"),
    ("8bit", "8bit"),
]


def one_way(folder: Path, cases: Any, ways: tuple[Any, ...], is_torch: bool = False) -> None:
    """Saved by some ranks with placements in formats, loaded by others in others."""
    savers, saved_as, loaders, loaded_as = ways
    saved = on_ranks.run(save_each, savers, str(folder), cases, saved_as, is_torch)
    for loaded in on_ranks.run(load_each, loaders, str(folder), cases, loaded_as, is_torch):
        for (source, target), found, expected in zip(cases, loaded, saved[0], strict=True):
            assert_near(found, expected, source, target)


def test_between_formats(tmp_path: Path) -> None:
    one_way(tmp_path, BETWEEN, (2, Shard(0), 2, Shard(0)))


@pytest.mark.parametrize(
    "ways",
    [
        (1, None, 2, Shard(0)),
        (2, Shard(0), 1, None),
        (2, Shard(0), 2, Shard(1)),  # of which blocks fit only some
        (2, Replicate(), 4, Shard(0)),
    ],
    ids=["plain to shards", "shards to plain", "rows to columns", "replicas to shards"],
)
def test_between_placements(tmp_path: Path, ways: tuple[Any, ...]) -> None:
    names = ["fp32", "split", "8bit of float32"]
    one_way(tmp_path, list(zip(names, names, strict=True)), ways)


def test_a_checkpoint_of_torchs_optimizer(tmp_path: Path) -> None:
    cases = [("fp32", name) for name in ("fp32", "8bit of float32", "fp32, bfloat16 states")]
    one_way(tmp_path, cases, (4, Shard(0), 2, Shard(0)), is_torch=True)


def by_torchs_planner(rank: int, folder: str) -> str:
    """Codes that were copied into numbers, as torch's planner does."""
    model = Model(F32, Shard(0))
    optimizer = make(model, "fp32")
    wanted = {"optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(wanted, checkpoint_id=Path(folder) / "0")
    try:
        set_optimizer_state_dict(model, optimizer, optim_state_dict=wanted["optim"])
    except ValueError as error:
        return str(error)
    return "no error"


def test_codes_that_were_loaded_as_numbers(tmp_path: Path) -> None:
    cases = [("8bit of float32", "")]
    on_ranks.run(save_each, 2, str(tmp_path), cases, Shard(0), False)
    for message in on_ranks.run(by_torchs_planner, 2, str(tmp_path)):
        assert message.startswith(
            "state_dict: parameter 0: found states that are numbers by their dtype and were not "
            "when they were saved"
        )
        assert message.endswith("planner=fused_adamw.checkpoint.LoadPlanner()")


# --- Options of torch's state dicts --------------------------------------------------------------


# Neither gloo nor NCCL gathers int16, so that 16-bit remainders can only be saved as shards.
GATHERED = ["fp32", "kahan", "8bit of float32"]
FULL = {"full_state_dict": True}


def with_options(rank: int, save_options: Any, load_options: Any) -> list[str]:
    """What differs after a way through a state dict with options."""
    found = []
    for name in GATHERED:
        model = Model(ALL_FORMATS[name].dtype, Shard(0))
        optimizer = make(model, name, ema_decay=0.9)
        model.train_on(optimizer, range(2))
        options = StateDictOptions(**save_options)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        other = Model(ALL_FORMATS[name].dtype, Shard(0))
        other.load_state_dict(model.state_dict())
        resumed = make(other, name, ema_decay=0.9)
        if load_options.get("broadcast_from_rank0") and rank:
            state = {}
        options = StateDictOptions(**load_options)
        set_optimizer_state_dict(other, resumed, optim_state_dict=state, options=options)
        for trained, by in ((model, optimizer), (other, resumed)):
            trained.train_on(by, range(2, 4))
        for key, param in model.named_parameters():
            copied = other.get_parameter(key)
            if differing(param.to_local(), copied.to_local()):
                found.append(f"{name}: {key}")
            mine, theirs = optimizer.state[param], resumed.state[copied]
            found += [f"{name}: keys of {key}"] * (mine.keys() != theirs.keys())
            for state_key in mine.keys() & theirs.keys():
                values = (x[state_key] for x in (mine, theirs))
                if differing(*(getattr(value, "_local_tensor", value) for value in values)):
                    found.append(f"{name}: {state_key} of {key}")
    return found


@pytest.mark.parametrize(
    ("save_options", "load_options"),
    [
        (FULL, FULL),
        ({**FULL, "cpu_offload": True}, {**FULL, "broadcast_from_rank0": True}),
        ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    ],
    ids=["full", "full on rank 0", "flat"],
)
def test_options_of_state_dicts(save_options: dict[str, Any], load_options: dict[str, Any]) -> None:
    assert on_ranks.run(with_options, 2, save_options, load_options) == [[], []]
