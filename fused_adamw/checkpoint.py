"""Distributed checkpoints of other formats, and of torch's optimizers.

`torch.distributed.checkpoint.load` loads what the state dict that it is given has, which is what
its optimizer has: of another format it misses keys. With the planner of this module it loads the
states of an optimizer as they were saved, and ``load_state_dict`` converts them::

    state = {"model": ..., "optim": ...}                      # of get_state_dict
    dcp.load(state, checkpoint_id=..., planner=LoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=..., optim_state_dict=state["optim"])

[note: flat state dicts] With ``StateDictOptions(flatten_optimizer_state_dict=True)`` the entries of
a state are "state.<parameter>.<name>" in one dict, of which ``set_state_dict`` takes the names that
the optimizer has. It takes dicts as well, from "state.<parameter>.<name>.<key>": there is put what
has another name, and ``load_state_dict`` takes it out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fused_adamw.precision import BESIDE_KEYS, BLOCK, STATE_KINDS, code_key, scale_key
from fused_adamw.shards import is_sharded, local_of, split_for_blocks, wrapped
from fused_adamw.whole_step import EMA

_GROUPS, _STATE = "param_groups", "state"
# Each of the parameter's shape.
_ARRAYS = (*STATE_KINDS, *map(code_key, STATE_KINDS), *BESIDE_KEYS, EMA)


class _Place(NamedTuple):
    """Where the state of a parameter is: in a dict of its own, or in a flat one."""

    path: tuple[Any, ...]  # of the dict
    stem: str = ""  # with which its keys there begin

    @property
    def prefix(self) -> str:
        """With which its keys in a checkpoint begin."""
        return "".join(f"{part}." for part in self.path) + self.stem


class LoadPlanner(DefaultLoadPlanner):
    """Loads states in the format that they were saved in, of this library's optimizers or torch's.

    What a checkpoint of torch's optimizer lacks (values of a param group, what completes a 16-bit
    parameter, averages) stays as it is in the state dict; anything else that is missing is refused
    as by `DefaultLoadPlanner`, and so are a tensor of another shape and another number of param
    groups. Memory for states that are to be converted is taken beside the optimizer's own, until
    they have been; where blocks of codes do not fit the shards, each rank loads all codes of the
    parameter.

    Args:
        **options: of `torch.distributed.checkpoint.DefaultLoadPlanner`.
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """As in `torch.distributed.checkpoint.LoadPlanner`."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        if metadata is None or not self.flatten_state_dict:
            return
        saved = metadata.state_dict_metadata
        for key, path in list(self.mappings.items()):
            sign = _sign_of_group(path)
            if sign is not None and key not in saved and sign in saved:
                del self.state_dict[key], self.mappings[key]
        self._check_groups(saved)
        for place, names in self._places().items():
            self._adapt(place, names, saved)

    def _at(self, path: tuple[Any, ...]) -> Any:
        """What is at a path of the state dict."""
        found: Any = self.original_state_dict
        for part in path:
            found = found[part]
        return found

    def _check_groups(self, saved: Mapping[str, Any]) -> None:
        """Refuses another number of param groups, which torch would take for another's values."""
        paths = [path for path in self.mappings.values() if _GROUPS in path]
        for path in dict.fromkeys(path[: path.index(_GROUPS) + 1] for path in paths):
            name = ".".join(map(str, path))
            own, found = len(self._at(path)), 0
            while f"{name}.{found}.params" in saved:
                found += 1
            if found not in (0, own):
                raise ValueError(
                    f"{name}: found {found} param groups in the checkpoint, {own} in the optimizer;"
                    " accepted: as many, or both saved and loaded with "
                    "StateDictOptions(flatten_optimizer_state_dict=True), by parameter"
                )

    def _places(self) -> dict[_Place, list[str]]:
        """Where the states of parameters are, and the names in them."""
        found: dict[_Place, list[str]] = {}
        for path in self.mappings.values():
            stem, dot, name = str(path[-1]).rpartition(".")
            if _STATE in path[:-2] and isinstance(path[-1], str):
                found.setdefault(_Place(path[:-1]), []).append(path[-1])
            elif stem.startswith(f"{_STATE}."):
                found.setdefault(_Place(path[:-1], stem + dot), []).append(name)
        return found

    def _adapt(self, place: _Place, names: list[str], saved: Mapping[str, Any]) -> None:
        """Makes room for the state of a parameter as it was saved."""
        state = self._at(place.path)
        entries = {name: state[place.stem + name] for name in names}
        own = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
        like: Any = next((own[name] for name in own if name in _ARRAYS), None)
        if like is None:
            return

        def found(keys: Collection[str]) -> dict[str, TensorStorageMetadata]:
            entries = {key: saved.get(place.prefix + key) for key in keys}
            return {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}

        for name in STATE_KINDS:
            keys = (name, code_key(name), scale_key(name))
            mine, theirs = {key: own[key] for key in keys if key in own}, found(keys)
            scale, its_scale = (x.get(scale_key(name)) for x in (mine, theirs))
            same = getattr(scale, "shape", None) == getattr(its_scale, "size", None)
            if mine and theirs and not (same and mine.keys() == theirs.keys()):
                self._replace(place, mine, _room(name, like, theirs))
        mine, theirs = {key: own[key] for key in BESIDE_KEYS if key in own}, found(BESIDE_KEYS)
        dtypes = {key: value.dtype for key, value in mine.items()}
        saved_dtypes = {key: value.properties.dtype for key, value in theirs.items()}
        if dtypes != saved_dtypes:
            self._replace(place, mine, {k: _empty(like, v) for k, v in saved_dtypes.items()})
        if EMA in own and not found([EMA]):
            self._replace(place, [EMA], {})

    def _replace(self, place: _Place, names: Collection[str], by: dict[str, Tensor]) -> None:
        """Takes entries out of a state, and puts others in: [note: flat state dicts]."""
        state, prefix, stem = self._at(place.path), place.prefix, place.stem
        if stem and not place.path:
            raise ValueError(
                f"state_dict: found the key '{stem}{next(iter([*names, *by]))}', of a flat state "
                'dict in another format than was saved; accepted: {"optim": the flat state dict}'
            )
        for name in names:
            del state[stem + name]
            del self.state_dict[prefix + name], self.mappings[prefix + name]
        under = f"{next(iter(names))}." if stem and names else ""
        for name, tensor in by.items():
            key = f"{stem}{under}{name}"
            state[key] = self.state_dict[prefix + name] = tensor
            self.mappings[prefix + name] = (*place.path, key)


def _sign_of_group(path: tuple[Any, ...]) -> str | None:
    """The key without which a checkpoint has nothing of the param group that a path leads into."""
    for i, part in enumerate(map(str, path)):
        if part == _GROUPS:
            return ".".join(map(str, (*path[: i + 2], "params")))
        if part.startswith(f"{_GROUPS}."):
            return ".".join(map(str, (*path[:i], part.rpartition(".")[0], "lr")))
    return None


def _room(name: str, like: Any, found: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Tensors for a state as it was saved: numbers, or codes and scales."""
    codes, scale = found.get(code_key(name)), found.get(scale_key(name))
    if codes is None or scale is None:
        return {key: _empty(like, value.properties.dtype) for key, value in found.items()}
    device = local_of(like).device
    scales = torch.empty(scale.size, dtype=scale.properties.dtype, device=device)
    fit = is_sharded(like) and split_for_blocks(like, BLOCK) is not None
    if fit and scale.size.numel() * BLOCK == like.numel():
        room = _empty(like, codes.properties.dtype)
    else:
        room = torch.empty(codes.size, dtype=codes.properties.dtype, device=device)
    return {code_key(name): room, scale_key(name): scales}


def _empty(like: Any, dtype: torch.dtype) -> Tensor:
    return wrapped(torch.empty_like(local_of(like), dtype=dtype), like)
