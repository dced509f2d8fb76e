"""torch.distributed.checkpoint: saved by some ranks, resumed by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
from sharded_training import BF16, DRAWING, F32, FORMATS, LOUD, RULES, differing, drawn, spread
from torch import distributed, nn, optim
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
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
                if not param.requires_grad:
                    continue
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


def both(model: Model, optimizer: Any, options: Any = None) -> dict[str, Any]:
    """The state dicts of a checkpoint."""
    found = get_state_dict(model, optimizer, options=options)
    return dict(zip(("model", "optim"), found, strict=True))


def load(
    model: Model, optimizer: Any, folder: Path, planner: Any = None, options: Any = None
) -> None:
    state = both(model, optimizer, options)
    dcp.load(state, checkpoint_id=folder, planner=planner)
    model_state, optim_state = state["model"], state["optim"]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optim_state,
        options=options,
    )


def differences(model: Model, optimizer: Any, whole: Model, reference: Any) -> list[str]:
    """What is not bit for bit the same on this rank."""
    found = []
    for key, param in model.named_parameters():
        other = whole.get_parameter(key)
        if not torch.equal(param.to_local(), other.to_local()):
            found.append(key)
        mine, theirs = optimizer.state[param], reference.state[other]
        found += [f"keys of {key}"] * (mine.keys() != theirs.keys())
        for state_key in mine.keys() & theirs.keys():
            x, y = (getattr(s[state_key], "_local_tensor", s[state_key]) for s in (mine, theirs))
            if not torch.equal(x, y):
                found.append(f"{state_key} of {key}")
    return found


def save(rank: int, folder: str, names: list[str], is_async: bool) -> None:
    for name in names:
        model = Model(ALL_FORMATS[name].dtype, Shard(0))
        optimizer = make(model, name, ema_decay=0.9)
        model.train_on(optimizer, range(2))
        found = both(model, optimizer)
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
        load(model, optimizer, Path(folder) / name)
        model.train_on(optimizer, range(2, 4))
        whole = Model(ALL_FORMATS[name].dtype, Shard(0))
        reference = make(whole, name, ema_decay=0.9)
        whole.train_on(reference, range(4))
        found += [f"{name}: {what}" for what in differences(model, optimizer, whole, reference)]
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


FLAT = {"flatten_optimizer_state_dict": True}


def save_each(
    rank: int, folder: str, cases: Any, placement: Any, is_torch: bool, options: dict[str, Any]
) -> list[Any]:
    """Of each case what `whole_of` says of the training that is saved."""
    found = []
    of = StateDictOptions(**options)
    for i, (name, _) in enumerate(cases):
        model = Model(ALL_FORMATS[name].dtype, placement)
        optimizer = made(model, name, is_torch)
        model.train_on(optimizer, range(2))
        dcp.save(both(model, optimizer, of), checkpoint_id=Path(folder) / str(i))
        found.append(whole_of(model, optimizer))
    return found


def load_each(
    rank: int, folder: str, cases: Any, placement: Any, is_torch: bool, options: dict[str, Any]
) -> list[Any]:
    found = []
    of = StateDictOptions(**options)
    for i, (_, name) in enumerate(cases):
        model = Model(ALL_FORMATS[name].dtype, placement)
        if is_torch:  # of one param group
            optimizer = FusedAdamW(model.parameters(), **LOUD, **ALL_FORMATS[name].options)
        else:
            optimizer = make(model, name)
        optimizer.param_groups[0]["lr"] = 7.0
        load(model, optimizer, Path(folder) / str(i), LoadPlanner(), of)
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


def one_way(
    folder: Path,
    cases: Any,
    ways: tuple[Any, ...],
    is_torch: bool = False,
    options: Any = None,
) -> None:
    """Saved by some ranks with placements in formats, loaded by others in others."""
    savers, saved_as, loaders, loaded_as = ways
    of_all = is_torch, options or {}
    saved = on_ranks.run(save_each, savers, str(folder), cases, saved_as, *of_all)
    for loaded in on_ranks.run(load_each, loaders, str(folder), cases, loaded_as, *of_all):
        for (source, target), found, expected in zip(cases, loaded, saved[0], strict=True):
            assert_near(found, expected, source, target)


@pytest.mark.parametrize("options", [{}, FLAT], ids=["nested", "flat"])
def test_between_formats(tmp_path: Path, options: dict[str, Any]) -> None:
    one_way(tmp_path, BETWEEN, (2, Shard(0), 2, Shard(0)), options=options)


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


@pytest.mark.parametrize("options", [{}, FLAT], ids=["nested", "flat"])
def test_a_checkpoint_of_torchs_optimizer(tmp_path: Path, options: dict[str, Any]) -> None:
    cases = [("fp32", name) for name in ("fp32", "8bit of float32", "fp32, bfloat16 states")]
    one_way(tmp_path, cases, (4, Shard(0), 2, Shard(0)), is_torch=True, options=options)


def said_of_loading(
    rank: int, folder: str, name: str, options: dict[str, Any], planner: Any
) -> str:
    """The refusal of the first case of `save_each`."""
    model = Model(ALL_FORMATS[name].dtype, Shard(0))
    try:
        load(
            model,
            FusedAdamW(model.parameters(), **LOUD, **ALL_FORMATS[name].options),
            Path(folder) / "0",
            planner,
            StateDictOptions(**options),
        )
    except (CheckpointException, ValueError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("options", [{}, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("source", "target", "missing"),
    [
        ("8bit of float32", "fp32", "exp_avg"),
        ("fp32", "8bit of float32", "exp_avg_codes"),
        ("split", "master", "param_master"),
    ],
)
def test_torchs_planner_takes_no_format_for_another(
    tmp_path: Path, source: str, target: str, missing: str, options: dict[str, Any]
) -> None:
    on_ranks.run(save_each, 2, str(tmp_path), [(source, "")], Shard(0), False, options)
    for message in on_ranks.run(said_of_loading, 2, str(tmp_path), target, options, None):
        assert f"Missing key in checkpoint state_dict: optim.state.large.{missing}." in message


def test_param_groups_that_were_divided_otherwise(tmp_path: Path) -> None:
    """Saved as two, loaded as one."""
    cases = [("fp32", "")]
    on_ranks.run(save_each, 2, str(tmp_path), cases, Shard(0), False, {})
    for message in on_ranks.run(said_of_loading, 2, str(tmp_path), "fp32", {}, LoadPlanner()):
        assert "optim.param_groups: found 2 param groups in the checkpoint, 1 in the" in message
    on_ranks.run(save_each, 2, str(tmp_path / "flat"), cases, Shard(0), False, FLAT)
    for message in on_ranks.run(
        said_of_loading, 2, str(tmp_path / "flat"), "fp32", FLAT, LoadPlanner()
    ):
        assert message == "no error"


def in_another_order(rank: int, folder: str) -> list[str]:
    """Codes and numbers change places in a param group."""
    model, other = (Model(F32, Shard(0)) for _ in range(2))
    optimizer = FusedAdamW(model.parameters(), precision="8bit", **LOUD)
    model.train_on(optimizer, range(2))
    dcp.save(both(model, optimizer), checkpoint_id=folder)
    resumed = FusedAdamW(reversed(list(other.parameters())), precision="8bit", **LOUD)
    load(other, resumed, Path(folder))
    return differences(other, resumed, model, optimizer)


def test_parameters_in_another_order(tmp_path: Path) -> None:
    assert on_ranks.run(in_another_order, 2, str(tmp_path)) == [[], []]


# --- Before the first step -----------------------------------------------------------------------


def saved_before_a_first_step(rank: int, folder: str) -> list[str]:
    found = []
    for i, (cls, hyperparameters) in enumerate(RULES):
        for ema in (None, 0.9):
            models = [Model(F32, Shard(0)) for _ in range(3)]
            optimizers = [cls(m.parameters(), **hyperparameters, ema_decay=ema) for m in models]
            saved, resumed, whole = models
            dcp.save(both(saved, optimizers[0]), checkpoint_id=Path(folder) / f"{i} {ema}")
            with torch.no_grad():
                for param in resumed.parameters():
                    param.zero_()
            load(resumed, optimizers[1], Path(folder) / f"{i} {ema}")
            for model, optimizer in zip(models[1:], optimizers[1:], strict=True):
                model.train_on(optimizer, range(2))
            apart = differences(resumed, optimizers[1], whole, optimizers[2])
            found += [f"{cls.__name__} {hyperparameters} {ema}: {what}" for what in apart]
    return found


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    """Training from it has the bits of training without."""
    assert on_ranks.run(saved_before_a_first_step, 2, str(tmp_path)) == [[], []]


def warm_start(rank: int, folder: str) -> list[str]:
    """The weights of a checkpoint alone, through the functions that take both."""
    found = []
    for name, (options, dtype) in ALL_FORMATS.items():
        model, whole = (Model(dtype, Shard(0)) for _ in range(2))
        dcp.save({"model": get_model_state_dict(whole)}, checkpoint_id=Path(folder) / name)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(7.0)
        optimizer, reference = (
            FusedAdamW(m.parameters(), **LOUD, **options, ema_decay=0.9) for m in (model, whole)
        )
        state = both(model, optimizer)
        dcp.load({"model": state["model"]}, checkpoint_id=Path(folder) / name)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        for m, by in ((model, optimizer), (whole, reference)):
            m.train_on(by, range(2))
        found += [f"{name}: {x}" for x in differences(model, optimizer, whole, reference)]
    return found


def test_a_warm_start_with_weights_alone(tmp_path: Path) -> None:
    assert on_ranks.run(warm_start, 2, str(tmp_path)) == [[], []]


def without_a_state(rank: int, folder: str) -> list[str]:
    """One parameter had no gradient before the checkpoint."""
    found = []
    for name in ("8bit", "master"):
        for i, planner in enumerate((DefaultLoadPlanner, LoadPlanner)):
            models = [Model(BF16, Shard(0)) for _ in range(2)]
            optimizers = [
                FusedAdamW(m.parameters(), **LOUD, **ALL_FORMATS[name].options) for m in models
            ]
            whole, resumed = models
            whole.wide.requires_grad_(False)
            whole.train_on(optimizers[0], range(1))
            folder_of = Path(folder) / f"{name} {i}"
            dcp.save(both(whole, optimizers[0]), checkpoint_id=folder_of)
            whole.wide.requires_grad_(True)
            with torch.no_grad():
                for param in resumed.parameters():
                    param.fill_(7.0)
            load(resumed, optimizers[1], folder_of, planner(allow_partial_load=True))
            for model, optimizer in zip(models, optimizers, strict=True):
                model.train_on(optimizer, range(1, 3))
            apart = differences(resumed, optimizers[1], whole, optimizers[0])
            found += [f"{name}, {planner.__name__}: {what}" for what in apart]
    return found


def test_a_parameter_without_a_saved_state(tmp_path: Path) -> None:
    """Its first step is still to come, on the weights that were loaded."""
    assert on_ranks.run(without_a_state, 2, str(tmp_path)) == [[], []]


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
        (FLAT, FLAT),
    ],
    ids=["full", "full on rank 0", "flat"],
)
def test_options_of_state_dicts(save_options: dict[str, Any], load_options: dict[str, Any]) -> None:
    assert on_ranks.run(with_options, 2, save_options, load_options) == [[], []]
