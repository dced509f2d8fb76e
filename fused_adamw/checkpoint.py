"""Distributed checkpoints of other formats, and of torch's optimizers.

`torch.distributed.checkpoint.load` copies what was saved into the tensors of the state dict that it
is given, whatever their dtype: codes of 8 bits would be copied as if they were numbers. With the
planner of this module it loads the states of an optimizer as they were saved, and
``load_state_dict`` converts them::

    state = {"model": ..., "optim": ...}                      # of get_state_dict
    dcp.load(state, checkpoint_id=..., planner=LoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=..., optim_state_dict=state["optim"])
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fused_adamw.precision import BESIDE_KEYS, BLOCK, CODED, STATE_KINDS, scale_key
from fused_adamw.shards import is_sharded, local_of, split_for_blocks, wrapped
from fused_adamw.whole_step import EMA

_GROUPS, _STATE = "param_groups", "state"


class LoadPlanner(DefaultLoadPlanner):
    """Loads states in the format that they were saved in, of this library's optimizers or torch's.

    What a checkpoint of torch's optimizer lacks (values of a param group, what completes a 16-bit
    parameter, averages) stays as it is in the state dict; anything else that is missing is refused
    as by `DefaultLoadPlanner`, and so is a tensor of another shape. Memory for states that are to
    be converted is taken beside the optimizer's own, until they have been; where blocks of codes do
    not fit the shards, each rank loads all codes of the parameter.

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
            if _GROUPS in path and key not in saved:
                if path[-1] == CODED:  # it speaks of the states that were saved
                    del self._at(path[:-1])[CODED]
                del self.state_dict[key], self.mappings[key]
        for path in list(self._states()):
            self._adapt(path, saved)

    def _at(self, path: tuple[Any, ...]) -> Any:
        """What is at a path of the state dict."""
        found: Any = self.original_state_dict
        for part in path:
            found = found[part]
        return found

    def _states(self) -> Iterator[tuple[Any, ...]]:
        """The paths of parameters' states."""
        paths = [path[:-1] for path in self.mappings.values() if _STATE in path[:-2]]
        return iter(dict.fromkeys(paths))

    def _adapt(self, path: tuple[Any, ...], saved: dict[str, Any]) -> None:
        """Makes room for the state of a parameter as it was saved."""
        state = self._at(path)
        prefix = ".".join(map(str, path)) + "."
        names = [name for name in state if isinstance(state[name], Tensor)]
        arrays = [name for name in names if name in STATE_KINDS]
        like: Any = next((state[name] for name in arrays), None)
        if like is None:
            like = next((state[name] for name in names if name in (*BESIDE_KEYS, EMA)), None)
        if like is None:
            return
        wanted: dict[str, Tensor] = {}
        for name in arrays:
            found, scale = saved.get(prefix + name), saved.get(prefix + scale_key(name))
            if not isinstance(found, TensorStorageMetadata):
                continue  # refused as missing
            own_scale = state.get(scale_key(name))
            if (None if scale is None else scale.size) != getattr(own_scale, "shape", None):
                wanted.update(_room(name, like, found, scale))
                if scale is None:
                    self._drop(state, prefix, scale_key(name))
        for name in (*BESIDE_KEYS, EMA):
            found = saved.get(prefix + name)
            if name in state and found is None:
                self._drop(state, prefix, name)
            elif isinstance(found, TensorStorageMetadata) and name in BESIDE_KEYS:
                own = state.get(name)
                if own is None or own.dtype != found.properties.dtype:
                    wanted[name] = _empty(like, found.properties.dtype)
        for name, tensor in wanted.items():
            state[name] = self.state_dict[prefix + name] = tensor
            self.mappings[prefix + name] = (*path, name)

    def _drop(self, state: dict[str, Any], prefix: str, name: str) -> None:
        """Takes what was not saved out of the state dict."""
        state.pop(name, None)
        for known in (self.state_dict, self.mappings):
            known.pop(prefix + name, None)


def _room(
    name: str, like: Any, found: TensorStorageMetadata, scale: TensorStorageMetadata | None
) -> dict[str, Tensor]:
    """Tensors for a state, and its scales, as they were saved."""
    dtype = found.properties.dtype
    if scale is None:
        return {name: _empty(like, dtype)}
    device = local_of(like).device
    scales = torch.empty(scale.size, dtype=scale.properties.dtype, device=device)
    fit = is_sharded(like) and split_for_blocks(like, BLOCK) is not None
    if fit and scale.size.numel() * BLOCK == like.numel():
        return {name: _empty(like, dtype), scale_key(name): scales}
    return {name: torch.empty(found.size, dtype=dtype, device=device), scale_key(name): scales}


def _empty(like: Any, dtype: torch.dtype) -> Tensor:
    return wrapped(torch.empty_like(local_of(like), dtype=dtype), like)
