"""Parameters are updated in the backward pass, each as soon as its gradient is there."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from fused_adamw import _C
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.param_groups import Place
from fused_adamw.shards import is_sharded

_FUNCTIONS = sys.modules[torch.autograd.Function.__module__].__file__


def step_in_backward(
    model_or_params: nn.Module | Iterable[Tensor], optimizer: FusedOptimizer
) -> StepInBackward:
    """Lets the backward pass update parameters, so that few gradients are alive at a time.

    Each parameter is updated by the optimizer's rule as soon as its gradient is accumulated, and
    the gradient is freed::

        step_in_backward(model, optimizer)
        for x, y in batches:
            loss_of(model(x), y).backward()  # updates every parameter that it reaches
            scheduler.step()

    The bits are those of ``optimizer.step()`` after the backward pass. States lie in
    ``optimizer.state``, so checkpoints are the same. The values of a param group are read when a
    pass comes to its first parameter; its ``schedule`` is followed, and ``schedule_step`` then
    counts the pass. Hooks of the optimizer's step are not called.

    ``optimizer.step()`` meanwhile updates what has a gradient all the same: groups that are not the
    model's, and gradients that were accumulated. A group of the model in which nothing has one
    stays as it is, and its ``schedule_step`` too, so that a call after each backward pass does no
    harm.

    A parameter that cannot be updated raises from ``backward()``, and nothing of it has been
    written. Those that the pass had come to before are updated and stay so; gradients of others may
    be left, for ``optimizer.zero_grad()``.

    What needs all gradients at once cannot be had: clipping by the global norm, telemetry, skipping
    of steps that are not finite (and so `torch.amp.GradScaler`), gradients that are reduced over
    processes afterwards (DistributedDataParallel, FSDP2 and the like), and activation checkpoints
    with ``use_reentrant=True``, which are backward passes within the backward pass. All of these
    are refused as far as they can be seen: a DistributedDataParallel is when it is given itself,
    FSDP2 and tensor parallel by their DTensors, and a GradScaler when ``optimizer.grad_scale`` or
    ``found_inf`` is set, as within ``scaler.step``. ``capturable=True`` is refused, too.

    Args:
        model_or_params: the model, or parameters. Those that need a gradient now, and that the
            optimizer has, are updated so; they must make up whole param groups, apart from
            parameters that need no gradient.
        optimizer: one of this library. Without a reference to it, or to what is returned, the
            next backward pass raises.

    Raises:
        TypeError: an optimizer of another library, what is no model or tensors, or DTensors.
        ValueError: the optimizer has none of the parameters, or only a part of a group's.
        RuntimeError: done before, for this optimizer or one of the parameters; or an option of the
            optimizer that needs all gradients at once.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"optimizer: found {type(optimizer).__name__}, accepted: an optimizer of fused_adamw"
        )
    if isinstance(model_or_params, DistributedDataParallel):
        raise TypeError(
            "model_or_params: found a DistributedDataParallel, whose gradients are reduced after "
            "they are accumulated; accepted: a model in one process"
        )
    if optimizer._in_backward is not None:
        raise RuntimeError(
            "optimizer: steps in the backward pass already; accepted: remove() of the former "
            "handle first"
        )
    _refuse_unsupported(optimizer)
    handle = StepInBackward(optimizer, _chosen(_params_of(model_or_params), optimizer))
    optimizer._in_backward = handle
    return handle


@dataclass
class _Pass:
    """One backward pass over the graph, on its way through the parameters.

    Attributes:
        task: autograd's number of it.
        places: where the optimizer has its parameters.
        begins: whether averages that it creates begin with its result.
        current: hyperparameters of each param group that the pass has come to, and the steps that
            it had taken before.
    """

    task: int
    places: dict[Tensor, Place]
    begins: bool
    current: dict[int, tuple[_C.Hyperparameters, int]] = field(default_factory=dict)


class StepInBackward:
    """What `step_in_backward` returns."""

    def __init__(self, optimizer: FusedOptimizer, params: list[Tensor]) -> None:
        self.optimizer = optimizer
        self._lock = threading.Lock()  # autograd has a thread for each GPU
        self._pass: _Pass | None = None
        self._accumulating = 0
        self._hooks: dict[Tensor, RemovableHandle] = {}
        hook = _hook(weakref.ref(self))
        register: Any = Tensor.register_post_accumulate_grad_hook  # untyped in torch
        for param in params:
            former = _handles.pop(param, None)
            if former is not None:  # of an optimizer that is gone
                former[1].remove()
            self._hooks[param] = register(param, hook)
            _handles[param] = weakref.ref(self), self._hooks[param]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Leaves gradients alone: the first backward pass outside updates with the sum.

        A parameter that this pass does not reach keeps its gradient until a pass does, or until
        ``optimizer.step()``.
        """
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def remove(self) -> None:
        """Ends it: ``optimizer.step()`` is needed again."""
        for param, hook in self._hooks.items():
            hook.remove()
            del _handles[param]
        self._hooks = {}
        if self.optimizer._in_backward is self:
            self.optimizer._in_backward = None
            self.optimizer._give_up_registered()

    def idle_groups(self) -> frozenset[int]:
        """The param groups that ``optimizer.step()`` has nothing to do for."""
        _refuse_unsupported(self.optimizer)
        return frozenset(
            index
            for index, group in enumerate(self.optimizer.param_groups)
            if any(param in self._hooks for param in group["params"])
            and all(param.grad is None for param in group["params"])
        )

    def update(self, param: Tensor) -> None:
        """Updates a parameter whose gradient has been accumulated, and frees the gradient."""
        if self._accumulating or param.grad is None:
            return
        with self._lock:
            task = torch._C._current_graph_task_id()
            if self._pass is None or self._pass.task != task:
                self._pass = self._begin(task)
            place = self._pass.places.get(param)
            if place is None:
                return  # it has been taken out of the optimizer
            begins = self._pass.begins
            if place[0] in self._pass.current:
                self.optimizer._step_alone(place, *self._pass.current[place[0]], begins)
            else:
                self._pass.current[place[0]] = self._step_first(place, begins)
        param.grad = None

    def _begin(self, task: int) -> _Pass:
        _refuse_unsupported(self.optimizer)
        _refuse_nested()
        groups = self.optimizer.param_groups
        places = {groups[at[0]]["params"][at[1]]: at for at in self.optimizer._places()}
        self.optimizer._opt_called = True
        return _Pass(task, places, self.optimizer._averages_begin())

    def _step_first(self, place: Place, begins: bool) -> tuple[_C.Hyperparameters, int]:
        """Steps the first parameter of a group in a pass, for which the group steps as well."""
        optimizer = self.optimizer
        group = optimizer.param_groups[place[0]]
        if isinstance(group["schedule_step"], Tensor):  # of steps on the device
            group["schedule_step"] = int(group["schedule_step"])
        former = group["schedule_multiplier"]
        try:
            if group["schedule"] is not None:
                group["schedule_multiplier"] = optimizer._scheduled_multiplier(place[0])
            current = optimizer._current(place[0])
            steps = group["schedule_step"]
            optimizer._step_alone(place, current, steps, begins)
        except BaseException:
            group["schedule_multiplier"] = former
            raise
        group["schedule_step"] = steps + 1
        return current, steps


# Of each parameter the handle that updates it, and its hook. The hooks must not keep the optimizer:
# Python's collector cannot see through them, and parameters and optimizer would never be freed.
_handles: Any = WeakTensorKeyDictionary()


def _hook(reference: weakref.ref[StepInBackward]) -> Callable[[Tensor], None]:
    def update(param: Tensor) -> None:
        handle = reference()
        if handle is None:
            raise RuntimeError(
                "the optimizer of step_in_backward is gone, and nothing updates its parameters; "
                "accepted: keep the optimizer, or call remove() of the handle before it goes"
            )
        handle.update(param)

    return update


def _params_of(model_or_params: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(model_or_params, nn.Module):
        return list(model_or_params.parameters())
    found: Any = model_or_params
    if isinstance(found, Iterable) and not isinstance(found, Tensor):
        found = list(found)
        if all(isinstance(param, Tensor) for param in found):
            return list(found)
    raise TypeError(
        f"model_or_params: found {type(model_or_params).__name__}, accepted: a torch.nn.Module or "
        "an iterable of tensors"
    )


def _chosen(params: list[Tensor], optimizer: FusedOptimizer) -> list[Tensor]:
    """Those of the parameters that are to be updated: whole groups, and each once."""
    given = set(params)
    chosen: list[Tensor] = []
    for index, group in enumerate(optimizer.param_groups):
        active = [param for param in group["params"] if param.requires_grad]
        common = [param for param in active if param in given]
        if common and len(common) < len(active):
            raise ValueError(
                f"model_or_params: has {len(common)} of the {len(active)} parameters of param "
                f"group {index}; accepted: all or none of a group, since it counts one "
                "schedule_step"
            )
        for param in common:
            if is_sharded(param):
                raise TypeError(
                    f"model_or_params: found a DTensor in param group {index}, whose gradient "
                    "ranks may yet reduce; accepted: plain tensors"
                )
            if param in _handles and _handles[param][0]() is not None:
                raise RuntimeError(
                    f"model_or_params: a parameter of param group {index} is updated in the "
                    "backward pass already; accepted: remove() of the former handle first"
                )
        chosen += common
    if not chosen:
        raise ValueError(
            "model_or_params: has no parameter that needs a gradient and that the optimizer has; "
            "accepted: the model whose parameters the optimizer was given"
        )
    return chosen


def _refuse_unsupported(optimizer: FusedOptimizer) -> None:
    scaler = ("grad_scale", "found_inf")
    for option in ("max_grad_norm", "skip_nonfinite", "collect_telemetry", *scaler):
        value: object = getattr(optimizer, option, None)
        if value is not None and value is not False:
            name = option.removeprefix("collect_")
            raise RuntimeError(
                f"step_in_backward: found {name} {value!r} of the optimizer; accepted: without, "
                "since what it needs is known only when the backward pass is over"
            )
    for index, group in enumerate(optimizer.param_groups):
        if group["capturable"]:
            raise RuntimeError(
                f"step_in_backward: found capturable=True in param group {index}; accepted: False, "
                "since the host counts the steps of a backward pass"
            )


def _refuse_nested() -> None:
    """Within the backward pass of a function in Python there is another pass around this one.

    It has a number of its own, and would come to a parameter that both use a second time.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == _FUNCTIONS:
            raise RuntimeError(
                "step_in_backward: found a backward pass within a backward pass; accepted: "
                "torch.utils.checkpoint with use_reentrant=False"
            )
