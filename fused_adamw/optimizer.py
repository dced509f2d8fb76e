"""What every optimizer of the library shares: registration, the step, checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_adamw import _C
from fused_adamw.engines import check_engine
from fused_adamw.registration import Member, RegisteredList

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Loss = TypeVar("Loss")
States = defaultdict[Tensor, dict[str, Any]]


class FusedOptimizer(Optimizer):
    """An optimizer whose step is one pass over all its parameters by one of the engines.

    A subclass names the states of its rule and turns a param group into hyperparameters. States
    are created, like torch's, when a parameter first has a gradient.
    """

    # What a group of a checkpoint must have for it to be of this algorithm.
    _group_keys: frozenset[str]

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
        super().__init__(params, defaults)

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
        super().add_param_group(param_group)
        try:
            self._check_group(count)
        except Exception:
            del self.param_groups[count:]
            raise
        self._registered = None

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        seen: set[Tensor] = set()
        for i, param in enumerate(group["params"]):
            label = _label(sum(len(g["params"]) for g in self.param_groups[:index]) + i, group, i)
            if param in seen:
                raise ValueError(f"params: {label} is given twice")
            seen.add(param)
            if param.dtype not in PARAM_DTYPES:
                raise TypeError(
                    f"{label} has dtype {param.dtype}; accepted: float32, bfloat16, float16"
                )
        self._checked_hyperparameters(index)

    def _checked_hyperparameters(self, index: int) -> _C.Hyperparameters:
        try:
            return self._hyperparameters(self.param_groups[index])
        except (TypeError, ValueError) as error:
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
        hyperparameters = [
            self._checked_hyperparameters(index) for index in range(len(self.param_groups))
        ]
        registered = self._registered
        if (
            registered is None
            or not registered.native.matches(self._param_lists(), self._state)
            or not registered.step(hyperparameters)
        ):
            self._register_and_step(hyperparameters)
        return loss

    def _param_lists(self) -> list[list[Tensor]]:
        return [group["params"] for group in self.param_groups]

    def _register_and_step(self, hyperparameters: list[_C.Hyperparameters]) -> None:
        """Steps over a new registration, which is kept for the steps that follow."""
        new: list[Tensor] = []
        try:
            members: list[Member] = []
            for index, group in enumerate(self.param_groups):
                names = self._state_names(group)
                for i, param in enumerate(group["params"]):
                    if param.grad is not None and not self._state.get(param):
                        new.append(param)
                        self._state[param] = self._initial_state(param, names)
                    label = _label(len(members), group, i)
                    state = self._state.get(param) or None
                    members.append(Member(param, state, names, index, label))
            registered = RegisteredList(members, self.engine)
            if not registered.step(hyperparameters):
                raise RuntimeError("a tensor was given other memory while the step was under way")
        except Exception:
            for param in new:
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
            new = {**deepcopy({k: v for k, v in saved.items() if k != "params"})}
            self._adopt_group(where, group, new)
            new["params"] = group["params"]
            if "param_names" in group:
                new.setdefault("param_names", group["param_names"])
            try:
                self._hyperparameters(new)
            except (TypeError, ValueError) as error:
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
        found, expected = set(saved), {"step", *names}
        if found != expected:
            raise ValueError(
                f"{where} is of another algorithm than {type(self).__name__}: "
                f"found states {sorted(found)}, accepted: {sorted(expected)}"
            )
        step = saved["step"]
        if isinstance(step, Tensor) and step.numel() != 1:
            raise ValueError(f"{where} has a step of shape {tuple(step.shape)}, accepted: ()")
        count = float(step)
        if not count >= 0:
            raise ValueError(f"{where} has a step of {count}, accepted: a number >= 0")
        state: dict[str, Any] = {"step": torch.tensor(count, dtype=torch.float32)}
        for name in names:
            value = saved[name]
            if not isinstance(value, Tensor) or value.shape != param.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{where}: '{name}' has shape {shape}, accepted: {tuple(param.shape)}"
                )
            state[name] = value.detach().to(
                device=param.device, dtype=self.state_dtype or param.dtype, copy=True
            )
        return state

    # --- Pickling and copying --------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "engine": self.engine, "state_dtype": self.state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._registered = None


def _label(index: int, group: dict[str, Any], place: int) -> str:
    names = group.get("param_names")
    return f"parameter {index}" + (f" ('{names[place]}')" if names else "")
