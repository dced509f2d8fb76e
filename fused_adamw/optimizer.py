"""What every optimizer of the library shares: registration, the step, checkpoints."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_adamw import _C
from fused_adamw.engines import check_engine
from fused_adamw.registration import Member, RegisteredList

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = frozenset({float, int, bool, str})
Loss = TypeVar("Loss")
States = defaultdict[Tensor, dict[str, Any]]


class FusedOptimizer(Optimizer):
    """An optimizer whose step is one pass over all its parameters by one of the engines.

    A subclass names the states of its rule and turns a param group into hyperparameters. States
    are created, like torch's, when a parameter first has a gradient.
    """

    # What a group of a checkpoint must have, and its states may have, to be of this algorithm.
    _group_keys: frozenset[str]
    _known_states: frozenset[str]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        engine: str,
        state_dtype: torch.dtype | None,
    ) -> None:
        check_engine(engine)
        if state_dtype is not None and state_dtype not in PARAM_DTYPES:
            raise TypeError(f"state_dtype: found {state_dtype}, accepted: None or {PARAM_DTYPES}")
        self.engine = engine
        self.state_dtype = state_dtype
        self._registered: RegisteredList | None = None
        self._known: dict[int, tuple[tuple[Any, ...], _C.Hyperparameters]] = {}
        super().__init__(params, defaults)

    # The values of a group that make its hyperparameters, as a tuple.
    _values: Callable[[dict[str, Any]], tuple[Any, ...]]

    @abstractmethod
    def _hyperparameters(self, group: dict[str, Any]) -> _C.Hyperparameters:
        """The values of a group, checked."""

    @abstractmethod
    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of what the rule keeps for a parameter, in the order of its slots."""

    # --- State and param groups ------------------------------------------------------------------

    @property
    def state(self) -> States:
        """Per parameter a dict of its state, as in torch.

        Whoever reads this may change it, or move it to free memory, so the registered list, which
        holds references to every tensor, is given up; the next step registers anew.
        """
        self._registered = None
        return self._state

    @state.setter
    def state(self, state: States) -> None:
        self._registered = None
        self.__dict__["state"] = state

    @property
    def _state(self) -> States:
        state: States = self.__dict__["state"]
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch; refused whole if anything in it cannot be used."""
        count = len(self.param_groups)
        self._refuse_repeated(param_group)
        try:
            super().add_param_group(param_group)
            self._check_group(count)
        except Exception:
            del self.param_groups[count:]
            raise
        self._registered = None

    def _refuse_repeated(self, param_group: dict[str, Any]) -> None:
        """Names the parameter, where torch only warns, or does not say which."""
        if not isinstance(param_group, dict) or not isinstance(param_group["params"], Iterable):
            return  # torch refuses it
        if isinstance(param_group["params"], Tensor | set):
            return
        params = param_group["params"] = list(param_group["params"])
        names = [item[0] if isinstance(item, tuple) else None for item in params]
        seen = {param for group in self.param_groups for param in group["params"]}
        first = self._count_params(len(self.param_groups))
        for i, item in enumerate(params):
            param = item[1] if isinstance(item, tuple) else item
            if not isinstance(param, Tensor):
                continue
            if param in seen:
                label = _label(first + i, {"param_names": names} if names[i] else {}, i)
                raise ValueError(
                    f"params: {label} is given twice; accepted: each parameter once, in one group"
                )
            seen.add(param)

    def _count_params(self, groups: int) -> int:
        return sum(len(group["params"]) for group in self.param_groups[:groups])

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        for i, param in enumerate(group["params"]):
            if param.dtype not in PARAM_DTYPES:
                label = _label(self._count_params(index) + i, group, i)
                raise TypeError(
                    f"{label} has dtype {param.dtype}; accepted: float32, bfloat16, float16"
                )
        self._checked_hyperparameters(index)

    def _checked_hyperparameters(self, index: int) -> _C.Hyperparameters:
        try:
            return self._hyperparameters(self.param_groups[index])
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"param group {index}: {error}") from None

    # --- The step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            TypeError, ValueError, RuntimeError: something cannot be used; the message names the
                param group or parameter, and nothing has been written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hyperparameters = [self._current(index) for index in range(len(self.param_groups))]
        registered = self._registered
        if (
            registered is None
            or not registered.native.matches(self._param_lists(), self._state)
            or not registered.step(hyperparameters)
        ):
            self._register_and_step(hyperparameters)
        return loss

    def _current(self, index: int) -> _C.Hyperparameters:
        """The hyperparameters of a group: those of the last step where its values are the same."""
        values = self._values(self.param_groups[index])
        if not all(map(_is_plain, values)):
            return self._checked_hyperparameters(index)
        known = self._known.get(index)
        if known is None or known[0] != values:
            known = self._known[index] = values, self._checked_hyperparameters(index)
        return known[1]

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's wrapper of a step, with its hooks and its profiler mark, where there are any.

        The mark alone costs as much as a step over a dozen tensors.
        """
        torchs = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
            ):
                return torchs(self, *args, **kwargs)
            result = func(self, *args, **kwargs)
            self._optimizer_step_code()
            return result

        return step

    def _param_lists(self) -> list[list[Tensor]]:
        return [group["params"] for group in self.param_groups]

    def _register_and_step(self, hyperparameters: list[_C.Hyperparameters]) -> None:
        """Steps over a new registration, which is kept for the steps that follow."""
        new: list[tuple[Tensor, bool]] = []  # and whether it had an empty state
        try:
            members: list[Member] = []
            for index, group in enumerate(self.param_groups):
                names = self._state_names(group)
                for i, param in enumerate(group["params"]):
                    if param.grad is not None and not self._state.get(param):
                        new.append((param, param in self._state))
                        self._state[param].update(self._initial_state(param, names))
                    label = _label(len(members), group, i)
                    state = self._state.get(param) or None
                    members.append(Member(param, state, names, index, label))
            registered = RegisteredList(members, self.engine)
            if not registered.step(hyperparameters):
                raise RuntimeError("a tensor was given other memory while the step was under way")
        except Exception:
            for param, had_state in new:
                self._state[param].clear()
                if not had_state:
                    del self._state[param]
            raise
        registered.native.remember(self._param_lists(), self._state)
        self._registered = registered

    def _initial_state(self, param: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        for name in names:
            state[name] = torch.zeros_like(
                param, dtype=self.state_dtype, memory_format=torch.preserve_format
            )
        return state

    # --- Checkpoints -----------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's optimizer of the same rule, whole or not.

        States are copied to their parameter's device and to ``state_dtype`` (by default the
        parameter's dtype); nothing is shared with ``state_dict``.

        Raises:
            ValueError: another algorithm, decay convention, number or size of groups, shape, or a
                value out of range; the optimizer is then as it was.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        for key in ("param_groups", "state"):
            if key not in state_dict:
                raise ValueError(
                    f"state_dict: found no {key!r}; accepted: an optimizer's state_dict()"
                )
        groups = self._loaded_groups(state_dict["param_groups"])
        states = self._loaded_states(state_dict, groups)
        self.__setstate__({"state": states, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"state_dict: found {len(saved_groups)} param groups, "
                f"accepted: {len(self.param_groups)}"
            )
        loaded = []
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            where = f"state_dict: param group {index}"
            if "params" not in saved:
                raise ValueError(f"{where} has no 'params'; accepted: an optimizer's state_dict()")
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"{where} has {len(saved['params'])} parameters, "
                    f"accepted: {len(group['params'])}"
                )
            missing = sorted(self._group_keys - saved.keys())
            if missing:
                raise ValueError(
                    f"{where} is of another algorithm than {type(self).__name__}: "
                    f"it has no {', '.join(missing)}"
                )
            new = deepcopy({key: value for key, value in saved.items() if key != "params"})
            self._adopt_group(where, group, new)
            new["params"] = group["params"]
            if "param_names" in group:
                new.setdefault("param_names", group["param_names"])
            try:
                self._hyperparameters(new)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"{where}: {error}") from None
            loaded.append(new)
        return loaded

    def _adopt_group(self, where: str, group: dict[str, Any], new: dict[str, Any]) -> None:
        """Completes a loaded group by what torch's checkpoints lack; refuses another convention."""
        for key, value in group.items():
            if key in self.defaults:
                new.setdefault(key, value)

    def _loaded_states(self, state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> States:
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        members = chain.from_iterable(
            ((param, group, i) for i, param in enumerate(group["params"])) for group in groups
        )
        by_id = {
            key: (*member, f"state_dict: {_label(index, member[1], member[2])}")
            for index, (key, member) in enumerate(zip(saved_ids, members, strict=True))
        }
        states: States = defaultdict(dict)
        for key, saved in state_dict["state"].items():
            if key not in by_id:
                states[key] = saved  # not of a parameter: kept as it is, as torch does
                continue
            param, group, _, where = by_id[key]
            if saved:
                states[param] = self._loaded_state(where, param, self._state_names(group), saved)
        return states

    def _loaded_state(
        self, where: str, param: Tensor, names: tuple[str, ...], saved: dict[str, Any]
    ) -> dict[str, Any]:
        found, needed = set(saved), {"step", *names}
        if not needed <= found <= needed | self._known_states:
            raise ValueError(
                f"{where} is of another algorithm than {type(self).__name__}: "
                f"found states {sorted(found)}, accepted: {sorted(needed)}"
            )
        state: dict[str, Any] = {"step": _loaded_step(where, saved["step"])}
        for name in saved:
            if name != "step":
                _check_loaded(f"{where}: '{name}'", saved[name], param)
                state[name] = (
                    saved[name]
                    .detach()
                    .to(device=param.device, dtype=self.state_dtype or param.dtype, copy=True)
                )
        return state

    # --- Pickling and copying --------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "engine": self.engine, "state_dtype": self.state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._registered = None
        self._known = {}


def _is_plain(value: Any) -> bool:
    """Whether a value cannot change in place, as a tensor can."""
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value))


def _label(index: int, group: dict[str, Any], place: int) -> str:
    names = group.get("param_names")
    return f"parameter {index}" + (f" ('{names[place]}')" if names else "")


def _loaded_step(where: str, step: Any) -> Tensor:
    try:
        count = float(step)
    except (RuntimeError, TypeError, ValueError):
        found = f"a tensor of shape {tuple(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise ValueError(f"{where} has a step of {found}, accepted: one number") from None
    if not 0 <= count < math.inf:
        raise ValueError(f"{where} has a step of {count}, accepted: a finite number >= 0")
    return torch.tensor(count, dtype=torch.float32)


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
