"""Steps whose counts, coefficients and decisions are worked out on the device.

What a step needs to know beside its arrays (the count of steps, the learning rate where that is a
tensor, the schedule's eta, the gradients' norm, whether there was an overflow) stays in the
device's memory: csrc/cuda/tick.h. The host enqueues three or four kernels and waits for nothing,
and a CUDA graph that captured them replays with what the memory holds then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fused_adamw import _C
from fused_adamw.device_schedules import program
from fused_adamw.engines import Engine, device_of
from fused_adamw.ranks import Ranks
from fused_adamw.whole_step import StepOptions, one_number

_FLOATS = (torch.float32, torch.float64)
# What stands for a value that only the device knows: within the range of every hyperparameter.
_UNKNOWN = 0.5


class DeviceInputs(NamedTuple):
    """What a step on the device takes beside what every step takes.

    Attributes:
        plans: of each param group.
        amp: what the scaler has set.
    """

    plans: Sequence[GroupPlan]
    amp: Amp


class Amp(NamedTuple):
    """What torch.amp.GradScaler sets: float32 tensors of one element, numbers or None."""

    grad_scale: Tensor | float | None
    found_inf: Tensor | float | None


@dataclass(frozen=True)
class GroupPlan:
    """A param group as the device is told of it.

    Attributes:
        hyperparameters: checked; a number stands where only the device knows the value.
        sources: of each field of the rule the tensor that holds it, or None.
        schedule: its program, empty where there is none.
        schedule_step: steps taken, int64 [] on the device.
        values: the group as `hyperparameters` has it.
    """

    hyperparameters: _C.Hyperparameters
    sources: tuple[Tensor | None, ...]
    schedule: tuple[float, ...]
    schedule_step: Tensor
    values: dict[str, Any]


def is_read_on_host(value: Any, device: torch.device) -> bool:
    """Whether a value is a tensor that a step on `device` takes as the number it holds now.

    A captured step does not: a replay would repeat the number.
    """
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu" != device.type
        and value.numel() == 1
        and not _capturing(device)
    )


def refuse_capture(device: torch.device, found: str) -> None:
    """Refuses what a step creates or writes on the host's behalf, if it is being captured.

    Raises:
        RuntimeError: with what was `found`.
    """
    if _capturing(device):
        raise RuntimeError(
            f"step() under CUDA graph capture: found {found}; accepted: as at a step before the "
            "capture"
        )


def on_device(
    name: str, value: Tensor, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Tensor:
    """A tensor that a step reads on the device.

    Raises:
        ValueError: of more than one element, or on another device.
        TypeError: of another dtype.
    """
    accepted = f"one element of {' or '.join(map(str, dtypes))} on {device}"
    found = f"a tensor of shape {tuple(value.shape)} and {value.dtype} on {value.device}"
    if value.numel() != 1 or value.device != device:
        raise ValueError(f"{name}: found {found}, accepted: {accepted}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: found {found}, accepted: {accepted}")
    return value.detach()


def plan_group(
    rule: str,
    group: dict[str, Any],
    device: torch.device,
    check: Callable[[dict[str, Any]], _C.Hyperparameters],
) -> GroupPlan:
    """What the device is told of a param group.

    Args:
        rule: the group's.
        group: whose values may be tensors on the device; one on the CPU is a number.
        device: of the parameters.
        check: makes hyperparameters of a group without such tensors.

    Raises:
        TypeError, ValueError: as `hyperparameters`; a tensor that the device cannot read; a
            schedule that has no program.
    """
    sources: list[Tensor | None] = []
    values = {**group, "schedule_step": 0}
    for _, argument, _ in _C.RULES[rule][0]:
        value = group.get(argument)
        if is_read_on_host(value, device):
            sources.append(None)
            values[argument] = one_number(argument, value)
        elif isinstance(value, Tensor):
            sources.append(on_device(argument, value, device, _FLOATS))
            values[argument] = _UNKNOWN
        else:
            sources.append(None)
    return GroupPlan(
        check(values),
        tuple(sources),
        tuple(program(group["schedule"])) if group["schedule"] is not None else (),
        group["schedule_step"],
        values,
    )


@dataclass
class _Table:
    """Words in the device's memory.

    Attributes:
        content: what they are.
        memory: where they are.
        is_captured: whether a captured graph reads them, so that they must stay as they are.
    """

    content: bytes
    memory: Tensor
    is_captured: bool = False


class DeviceStep:
    """The device's memory for the steps of one registered list.

    Args:
        device: of all parameters.
        steps: of each parameter the count of steps, float32 [], which rules use that keep none in
            their state; None where there is no state.
        averaged: of each parameter whether its average has begun, float32 [], or None likewise.
        sums: number of sums of squares: one for each param group, or for each of `ranks.CLASSES`.
        captured: the optimizer's, to which steps add what captured graphs use: it must live as long
            as they may be replayed, which is longer than the list is registered.
    """

    def __init__(
        self,
        device: torch.device,
        steps: list[Tensor | None],
        averaged: list[Tensor | None],
        sums: int,
        captured: list[Any],
    ) -> None:
        self.device = device
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self._steps, self._averaged = steps, averaged
        self._rows = torch.zeros(len(steps), _C.DEVICE_ROW, dtype=torch.float32, device=device)
        self._skip = torch.zeros((), dtype=torch.int32, device=device)
        self._squares = torch.zeros(sums, dtype=torch.float64, device=device)
        self._tables: dict[str, _Table] = {}
        self._captured = captured

    @property
    def skip(self) -> Tensor:
        """Whether the latest step was skipped, int32 []."""
        return self._skip

    def prepare(
        self,
        native: _C.ParameterList,
        engine: Engine,
        buckets: Sequence[_C.Bucket],
        inputs: DeviceInputs,
        options: StepOptions,
        ranks: Ranks | None,
    ) -> None:
        """Enqueues all that precedes the update, and points the buckets at its results.

        Also where nothing has a gradient: the step counts, and other ranks wait for this one's part
        of the norm.

        Raises:
            RuntimeError: tables are to be written while a graph is captured.
        """
        plans = inputs.plans
        if not {self.device}.issuperset(map(device_of, buckets)):
            raise RuntimeError("step: found parameters on several devices, accepted: on one")
        fold, tick = engine.fold, engine.tick
        assert fold is not None
        assert tick is not None
        scale = self._amp("grad_scale", inputs.amp.grad_scale)
        overflow = self._amp("found_inf", inputs.amp.found_inf)
        limit: Any = options.max_grad_norm
        limit_at = (
            on_device("max_grad_norm", limit, self.device, _FLOATS[:1])
            if isinstance(limit, Tensor)
            else None
        )
        squares: Tensor | None = None
        if options.measures_norm:
            partials = torch.empty(native.chunks, dtype=torch.float64, device=self.device)
            for bucket in buckets:
                engine.square_sums(bucket, partials)
            sums = self._squares.numel()
            rows = 1 if ranks is None else len(plans)
            ends = self._table("ends", np.array(native.chunk_ends(sums, rows), np.int64))
            fold(
                _C.FoldArguments(
                    partials=partials.data_ptr(),
                    ends=ends,
                    squares=self._squares.data_ptr(),
                    groups=sums,
                ),
                self.device,
            )
            squares = self._squares
        if ranks is not None:
            found = torch.zeros_like(self._squares) if squares is None else squares
            total, overflow = ranks.meet_on_device(found, overflow)
            if squares is not None:
                squares = torch.zeros(len(plans), dtype=torch.float64, device=self.device)
                squares[0] = total
        records = np.concatenate([self._record(g, plan, options) for g, plan in enumerate(plans)])
        parameters = native.device_records(
            list(map(_address, self._steps)), list(map(_address, self._averaged))
        )
        tick(
            _C.TickArguments(
                groups=self._table("groups", records),
                parameters=self._table("parameters", parameters) if len(parameters) else 0,
                group_count=len(plans),
                parameter_count=len(parameters),
                squares=_address(squares),
                grad_scale=_address(scale),
                found_inf=_address(overflow),
                clips=limit is not None,
                max_grad_norm_at=_address(limit_at),
                max_grad_norm=0.0 if limit is None or limit_at is not None else limit,
                skip_nonfinite=options.skip_nonfinite,
                rows=self._rows.data_ptr(),
                grad_norm=self.grad_norm.data_ptr(),
                skip=self._skip.data_ptr(),
            ),
            self.device,
        )
        native.set_device(self._rows.data_ptr(), self._skip.data_ptr())
        if _capturing(self.device):
            for table in self._tables.values():
                table.is_captured = True
            own = self._rows, self._skip, self._squares, self.grad_norm, self._steps, self._averaged
            tables = [table.memory for table in self._tables.values()]
            self._captured.append((own, tables, plans, limit_at, scale, overflow, squares))

    def _amp(self, name: str, value: Tensor | float | None) -> Tensor | None:
        if value is None or isinstance(value, Tensor):
            return None if value is None else on_device(name, value, self.device, _FLOATS[:1])
        refuse_capture(self.device, f"{name} {value!r}, a number that a replay would repeat")
        return torch.full((), one_number(name, value), dtype=torch.float32, device=self.device)

    def _record(self, index: int, plan: GroupPlan, options: StepOptions) -> NDArray[np.int64]:
        schedule = 0
        if plan.schedule:
            words = np.array(plan.schedule, np.float64).view(np.int64)
            schedule = self._table(f"schedule {index}", words)
        doubles = sum(
            1 << k
            for k, source in enumerate(plan.sources)
            if source is not None and source.dtype == torch.float64
        )
        return _C.group_record(
            plan.hyperparameters,
            list(map(_address, plan.sources)),
            doubles,
            schedule,
            plan.schedule_step.data_ptr(),
            options.ema_weight,
        )

    def _table(self, name: str, words: NDArray[np.int64]) -> int:
        """The address of words in the device's memory, which are written where they changed."""
        content = words.tobytes()
        known = self._tables.get(name)
        if known is not None and known.content == content:
            return known.memory.data_ptr()
        refuse_capture(
            self.device, "param groups, gradients or options that changed since the last step"
        )
        on_host = torch.from_numpy(np.ascontiguousarray(words).reshape(-1))
        if self.device.type == "cuda":
            on_host = on_host.pin_memory()
        if known is None or known.is_captured or known.memory.numel() != on_host.numel():
            known = _Table(content, torch.empty_like(on_host, device=self.device))
        known.memory.copy_(on_host, non_blocking=True)
        known.content = content
        self._tables[name] = known
        return known.memory.data_ptr()


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
