"""From a state dict to param groups and states: an optimizer's own, torch's, and other formats'.

`loaded_groups` and `loaded_states` change nothing: what they refuse leaves the optimizer as it was.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamw.param_groups import (
    FLAG,
    OF_ALL_GROUPS,
    PARAM_DTYPES,
    RULES_KEYS,
    decay_of_flag,
    label_of,
)
from fused_adamw.precision import (
    BESIDE_KEYS,
    MASTER,
    STATE_KINDS,
    code_key,
    convert_state,
    decoded_states,
    is_master_of,
    localized_state,
    scale_key,
    states_in,
    wrapped_state,
)
from fused_adamw.schedules import from_description
from fused_adamw.shards import (
    is_sharded,
    local_of,
    placements_name,
    same_layout,
    wrapped,
)
from fused_adamw.weight_decay import convert_weight_decay
from fused_adamw.whole_step import EMA

if TYPE_CHECKING:
    from fused_adamw.optimizer import FusedOptimizer

States = defaultdict[Tensor, dict[str, Any]]


def loaded_groups(
    optimizer: FusedOptimizer, saved_groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The optimizer's param groups with the values of saved ones.

    Raises:
        TypeError, ValueError, RuntimeError: another number or size of groups, another algorithm or
            decay convention, or a value out of range; it names the group.
    """
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"state_dict: found {len(saved_groups)} param groups, "
            f"accepted: {len(optimizer.param_groups)}"
        )
    loaded = []
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        where = f"state_dict: param group {index}"
        if "params" not in saved:
            raise ValueError(f"{where} has no 'params'; accepted: an optimizer's state_dict()")
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{where} has {len(saved['params'])} parameters, accepted: {len(group['params'])}"
            )
        if saved.keys() == {"params"}:  # torch found no saved group for these parameters
            raise ValueError(
                f"{where} has no values: its parameters were saved in other param groups; "
                "accepted: the groups that were saved"
            )
        missing = sorted(optimizer._group_keys - saved.keys())
        if missing:
            raise ValueError(
                f"{where} is of another algorithm than {type(optimizer).__name__}: "
                f"it has no {', '.join(missing)}"
            )
        foreign = sorted((RULES_KEYS & saved.keys()) - group.keys())
        if foreign:
            raise ValueError(
                f"{where} is of another algorithm than {type(optimizer).__name__}: "
                f"it has {', '.join(foreign)}"
            )
        left_out = {"params", *OF_ALL_GROUPS}
        new = deepcopy({key: value for key, value in saved.items() if key not in left_out})
        _complete(optimizer, where, group, new)
        new["params"] = group["params"]
        if "param_names" in group:
            new.setdefault("param_names", group["param_names"])
        try:
            if isinstance(new["schedule"], Mapping):
                new["schedule"] = from_description(new["schedule"])
            optimizer._hyperparameters(new)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{where}: {error}") from None
        loaded.append(new)
    return loaded


def _complete(
    optimizer: FusedOptimizer, where: str, group: dict[str, Any], new: dict[str, Any]
) -> None:
    """Completes a loaded group by what torch's checkpoints lack; refuses another convention."""
    if "decay" not in new:  # a checkpoint of torch, whose flag is younger than its AdamW
        new["decay"] = decay_of_flag(new[FLAG]) if FLAG in new else optimizer._torch_decay(group)
    if new["decay"] != group["decay"]:
        raise ValueError(
            f"{where} has decay {new['decay']!r}, this optimizer {group['decay']!r}: "
            "the same weight_decay means something else; accepted: the same convention. "
            + _equivalent(optimizer, new, group["decay"])
        )
    for key, value in {**group, **optimizer._torch_values}.items():
        if key in optimizer.defaults:
            new.setdefault(key, value)


def _equivalent(optimizer: FusedOptimizer, saved: dict[str, Any], decay: str) -> str:
    """The weight decay of a saved group in another convention, as a sentence."""
    plain_sgd = optimizer._is_plain_sgd(saved)
    if "l2" in (saved["decay"], decay) and not plain_sgd:
        return f"There is no equivalent in {decay!r}: 'l2' decays by way of the moments"
    try:
        converted = convert_weight_decay(
            float(saved["weight_decay"]),
            source=saved["decay"],
            target=decay,
            lr=float(saved["lr"]),
            schedule_multiplier=float(saved.get("schedule_multiplier", 1.0)),
            plain_sgd=plain_sgd,
        )
    except (TypeError, ValueError) as error:
        return f"There is no equivalent in {decay!r}: {error}"
    return (
        f"At its learning rate, weight_decay {saved['weight_decay']} there is "
        f"{converted:.9g} in {decay!r}"
    )


def loaded_states(
    optimizer: FusedOptimizer, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[States, set[Tensor]]:
    """The states in the optimizer's format, and the parameters whose first step is still to come.

    Args:
        optimizer: whose states they become.
        state_dict: of this class, or of torch's optimizer of the rule.
        groups: of `loaded_groups`.

    Raises:
        ValueError: states of another algorithm, shape or placement, or out of range; it names the
            parameter.
    """
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = chain.from_iterable(
        ((param, group, i) for i, param in enumerate(group["params"])) for group in groups
    )
    by_id = {
        key: (*member, f"state_dict: {label_of(index, member[1], member[2])}")
        for index, (key, member) in enumerate(zip(saved_ids, members, strict=True))
    }
    states: States = defaultdict(dict)
    unbegun = set()
    for key, saved in state_dict["state"].items():
        if key not in by_id:
            states[key] = saved  # not of a parameter: kept as it is, as torch does
            continue
        param, group, place, where = by_id[key]
        saved = dict(_entries(saved))
        if not saved:
            continue
        state, has_begun = _loaded_state(optimizer, where, group, place, saved)
        if state:
            states[param] = state
        if state and not has_begun:
            unbegun.add(param)
    return states, unbegun


def _loaded_state(
    optimizer: FusedOptimizer, where: str, group: dict[str, Any], place: int, saved: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The state of a parameter, and whether it has taken a step."""
    param = group["params"][place]
    names = optimizer._state_names(group)
    needed = {*names, *(["step"] if optimizer._counts else [])}
    if optimizer._scalar is not None:
        needed.add(optimizer._scalar)
    arrays = [*names, *sorted(optimizer._known_states.difference(names))]
    uncoded = {code_key(name): name for name in arrays}
    known = {*needed, *arrays, *map(scale_key, arrays), *BESIDE_KEYS, EMA}
    found = {uncoded.get(key, key) for key in saved}
    if not needed <= found <= known:
        raise ValueError(
            f"{where} is of another algorithm than {type(optimizer).__name__}: "
            f"found states {sorted(found)}, accepted: {sorted(needed)}"
        )
    state: dict[str, Any] = {}  # in the order of a fresh one, for which graphs are compiled
    if optimizer._counts:
        state["step"] = _loaded_scalar(where, "step", saved["step"], torch.float32)
    if optimizer._scalar is not None:
        scalar = _loaded_scalar(where, optimizer._scalar, saved[optimizer._scalar], torch.float64)
        state[optimizer._scalar] = scalar
    for name in (*arrays, EMA):
        if name in saved:
            _check_loaded(f"{where}: '{name}'", saved[name], param)
    saved = _localized(where, saved, param)
    local = local_of(param)
    average = {}
    if EMA in saved:
        ema = saved[EMA].detach().to(local.device, torch.float32, copy=True)
        average[EMA] = wrapped(ema, param)
    present = states_in(saved, arrays)
    if param.dtype not in PARAM_DTYPES:  # which nothing steps
        state |= {name: saved[name] for name in arrays if name in saved}
        return state | average, True
    layout = optimizer._layout(group, place)
    try:
        if not _has_begun(optimizer, group, saved):
            return optimizer._first_state(param, group, layout), False
        converted = convert_state(
            saved, local, present, [STATE_KINDS[name] for name in present], layout
        )
        master = saved.get(MASTER) if layout.beside not in ("", "master") else None
        if master is not None and not is_master_of(master.to(local.device), local):
            raise ValueError(
                f"'{MASTER}': found other values than the parameter's, accepted: those of the "
                f"parameter, to which it is converted ({layout}); load the model first"
            )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return state | wrapped_state(converted, param) | average, True


def _has_begun(optimizer: FusedOptimizer, group: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether a saved state is of a parameter that has taken a step.

    Of rules that count no steps the group's count tells, and where that was reset the arrays.
    """
    if float(saved["step"] if optimizer._counts else group["schedule_step"]) > 0:
        return True
    names = optimizer._state_names(group)
    decoded = decoded_states(saved, names, [STATE_KINDS[name] for name in names])
    return not all(
        torch.allclose(x, x.new_tensor(optimizer._initial_value(name, group)), rtol=2**-7, atol=0)
        for name, x in decoded.items()
    )


def warn_of_other_masters(optimizer: FusedOptimizer) -> None:
    """Names a parameter whose loaded master has other values, with which the next step goes on."""
    others = []
    for index, i, number in optimizer._places():
        group = optimizer.param_groups[index]
        param = group["params"][i]
        master = optimizer._state.get(param, {}).get(MASTER)
        if master is None or param in optimizer._unbegun:
            continue
        if not is_master_of(local_of(master), local_of(param)):
            others.append(label_of(number, group, i))
    if others:
        warnings.warn(
            f"state_dict: {others[0]}"
            + f" and {len(others) - 1} more" * (len(others) > 1)
            + f": '{MASTER}' has other values than the parameter, and the next step goes on"
            " from it; accepted: the parameter's values, or a model that is loaded later",
            stacklevel=3,  # whoever called load_state_dict()
        )


def _localized(where: str, saved: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """A saved state with this rank's part of every array, of DTensors or of whole tensors.

    Raises:
        ValueError: a DTensor with other placements than the parameter's.
    """
    for name, value in saved.items():
        if is_sharded(value) and not (is_sharded(param) and same_layout(value, param)):
            raise ValueError(
                f"{where}: '{name}' has placements {placements_name(value)}, accepted: the "
                f"parameter's, {placements_name(param)}"
            )
    return localized_state(saved, param)


def _entries(saved: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is in a saved state, or in a dict within it: [note: flat state dicts] in checkpoint.py.

    torch's SGD of old saved a buffer of None.
    """
    for name, value in saved.items():
        if isinstance(value, dict):
            yield from value.items()
        elif value is not None:
            yield name, value


def _loaded_scalar(where: str, name: str, value: Any, dtype: torch.dtype) -> Tensor:
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError):
        found = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise ValueError(f"{where} has a {name} of {found}, accepted: one number") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{where} has a {name} of {number}, accepted: a finite number >= 0")
    return torch.tensor(number, dtype=dtype)


def _check_loaded(where: str, value: Any, param: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}, accepted: a tensor")
    if value.shape != param.shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)}, accepted: {tuple(param.shape)}")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{where} has dtype {value.dtype} and layout {value.layout} on {value.device}, "
            "accepted: a dense floating-point tensor with memory"
        )
