"""The list of parameters and states on its way through a step, for the class and the function."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_adamw import _C
from fused_adamw.device_step import DeviceInputs, DeviceStep
from fused_adamw.engines import Engine, device_of, engine_for
from fused_adamw.measurements import Measurements, check_observable
from fused_adamw.ranks import CLASSES, Ranks
from fused_adamw.shards import WHOLE, Extent, is_sharded, local_of, mismatch, to_local, wrapped
from fused_adamw.whole_step import EMA, PLAIN, Outcome, StepOptions, zero


def _use_exchange_api() -> None:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(f"fused_adamw needs torch 2.11 or later, found {torch.__version__}")
    _C.use_exchange_api(capsule)


_use_exchange_api()


@torch.no_grad()
def restride(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of ``tensor`` whose strides are those of ``like``, a tensor of the same shape.

    Of a DTensor the strides of the local tensor count.
    """
    own, its = local_of(tensor), local_of(like)
    copy = torch.empty_strided(its.shape, its.stride(), dtype=tensor.dtype, device=own.device)
    return wrapped(copy.copy_(own), tensor)


_FULL_COLLECTION = 2
_live: weakref.WeakSet[RegisteredList] = weakref.WeakSet()


def _let_go(phase: str, info: dict[str, int]) -> None:
    # See [note: holding] in csrc/host/parameter_list.cpp.
    if phase == "start" and info["generation"] == _FULL_COLLECTION:
        for registered in list(_live):
            registered.native.let_go()


gc.callbacks.append(_let_go)


@dataclass
class Member:
    """One parameter of a list.

    Attributes:
        param: the tensor.
        state: its state; ``None`` where it is to be created.
        names: the keys of the arrays in it, in the order of the rule's slots.
        counts: whether it has a "step", the number of steps taken.
        scalar: the key of the number that the rule carries from step to step, if it carries one.
        fresh: whether the state has been created for this step.
        beside: the name and the key of what keeps the parameter's lower bits, if anything does.
        scales: the keys of the scales of coded states; empty where they are not coded.
        stochastic: whether the parameter and its states are rounded stochastically.
        draws: whether random bits decide how anything of it is rounded.
        random_key: of its random bits; see [note: random bits] in csrc/storage/random.h.
        averaged: whether the state has the average of the parameter.
        unaveraged: whether that begins with the next step.
        active: whether it can have a gradient; what cannot may be of any kind.
        group: index of its param group.
        label: how messages call it.
        extent: where its elements are in the whole tensor.
        norm_class: number of its class of `ranks.CLASSES`.
    """

    param: Tensor
    state: dict[str, Any] | None
    names: tuple[str, ...]
    group: int
    label: str
    counts: bool = True
    scalar: str | None = None
    fresh: bool = False
    beside: tuple[str, str] | None = None
    scales: tuple[str, ...] = ()
    stochastic: bool = False
    draws: bool = False
    random_key: int = 0
    averaged: bool = False
    unaveraged: bool = False
    active: bool = True
    extent: Extent = WHOLE
    norm_class: int = 0


@dataclass(eq=False)
class RegisteredList:
    """Parameters and states registered with the extension, and the engine that steps them.

    Raises:
        TypeError: a parameter or state of a dtype that no rule works on.
        ValueError: states of another shape, memory with gaps, or parameters that overlap.
        RuntimeError: a tensor without memory, or a state on another device.
    """

    members: Sequence[Member]
    engine: str
    averages: bool = False  # whether it has averages of its parameters
    device_step: DeviceStep | None = None  # where coefficients are worked out on the device
    ranks: Ranks | None = None  # which share the parameters, or their norm
    seeds: Sequence[int] = ()  # of each group: where the members' random keys are from
    draws: bool = field(init=False)  # whether random bits decide how anything is rounded
    native: _C.ParameterList = field(init=False)
    _sharded: bool = field(init=False)  # whether there is a DTensor
    # Addresses of the parameters that a step updated before an engine failed. Not the buckets: they
    # keep the extension's list alive, unseen by Python's cycle collector.
    _stepped: frozenset[int] = field(init=False, default=frozenset())
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _engines: dict[torch.device, Engine] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        sharded = [is_sharded(member.param) for member in self.members]
        self._sharded = any(sharded)
        self.draws = any(member.draws for member in self.members)
        self.native = _C.ParameterList(
            params=[member.param for member in self.members],
            states=[member.state for member in self.members],
            names=[member.names for member in self.members],
            counts=[member.counts for member in self.members],
            scalars=[member.scalar for member in self.members],
            fresh=[member.fresh for member in self.members],
            besides=[member.beside for member in self.members],
            scales=[member.scales for member in self.members],
            stochastic=[member.stochastic for member in self.members],
            keys=[member.random_key for member in self.members],
            averages=[EMA if member.averaged else None for member in self.members],
            unaveraged=[member.unaveraged for member in self.members],
            active=[member.active for member in self.members],
            groups=[member.group for member in self.members],
            labels=[member.label for member in self.members],
            sharded=sharded,
            extents=[member.extent for member in self.members],
            classes=[member.norm_class for member in self.members],
            on_device=self.device_step is not None,
            restride=restride,
            to_local=to_local,
            mismatch=mismatch,
            tensor_type=Tensor,
            increment_version=torch.autograd.graph.increment_version,
        )
        _live.add(self)

    def step(
        self,
        hyperparameters: Sequence[_C.Hyperparameters],
        grads: list[Tensor | None] | None = None,
        *,
        is_state_held: bool = False,
        steps: Sequence[int] = (),
        options: StepOptions = PLAIN,
        measurements: Measurements | None = None,
        inputs: DeviceInputs | None = None,
    ) -> Outcome:
        """Updates every parameter that has a gradient; nothing is done to a list out of date.

        Args:
            hyperparameters: of each group.
            grads: the gradients; by default those of the parameters.
            is_state_held: whether someone else can reach the states, and may have moved them.
            steps: taken by each group, where a member draws random bits.
            options: what is done beside the rule.
            measurements: where what is measured goes.
            inputs: with a `device_step`, what it takes.

        Raises:
            TypeError, ValueError, RuntimeError: for a gradient that cannot be used, naming the
                parameter; nothing has been written then. Should an engine itself fail, the buckets
                before have been stepped and counted; with a `device_step` all have been counted.
        """
        with self._lock:  # another thread's step would take the buckets from under an engine
            try:
                with self._plain_reads():
                    gathered = self.native.gather(
                        hyperparameters,
                        grads,
                        is_state_held,
                        options.ema_weight,
                        options.zero_grads,
                        steps,
                    )
                if not gathered:
                    return Outcome.STALE
                return self._update(
                    hyperparameters, options, measurements or Measurements(), inputs
                )
            finally:
                self.native.release()

    def _update(
        self,
        hyperparameters: Sequence[_C.Hyperparameters],
        options: StepOptions,
        measurements: Measurements,
        inputs: DeviceInputs | None,
    ) -> Outcome:
        buckets = self.native.buckets()
        engines = [self._engine(device_of(bucket)) for bucket in buckets]
        if options.telemetry:
            check_observable(engines, buckets)
        groups = len(hyperparameters)
        shape = 1 if self.ranks is None else CLASSES, groups
        coefficient = 1.0
        if self.device_step is not None:
            assert inputs is not None
            skip = torch.zeros_like(self.device_step.skip) if options.telemetry else None
            if skip is not None:
                scale = inputs.amp.grad_scale
                # The scaler will change its own.
                kept = scale.clone() if isinstance(scale, torch.Tensor) else scale or 1.0
                measurements.observe(self.native, engines, buckets, shape, kept, skip)
            engine = self._engine(self.device_step.device)
            self.device_step.prepare(self.native, engine, buckets, inputs, options, self.ranks)
            if skip is not None:
                skip.copy_(self.device_step.skip)
            if options.measures_norm:
                measurements.grad_norm = self.device_step.grad_norm
        else:
            # Of each param group; of each class where ranks meet, whose groups may be others.
            sums, rows = (groups, 1) if self.ranks is None else (CLASSES, groups)
            squares, overflow = [0.0] * sums, options.overflow
            if options.telemetry:
                measurements.observe(self.native, engines, buckets, shape, options.grad_scale)
            if options.measures_norm:
                squares = measurements.squares(self.native, engines, buckets, sums, rows)
            if (ranks := self.ranks) is not None:
                total, overflow = ranks.meet(
                    squares,
                    overflow,
                    lambda: (
                        None if options.max_grad_norm is None else float(options.max_grad_norm),
                        options.skip_nonfinite,
                        self.native.sharded_gradients if ranks.have_all else None,
                        [current.values for current in hyperparameters],
                    ),
                )
                squares = [total]
            norm = 0.0
            if options.measures_norm:
                device = next(map(device_of, buckets), torch.device("cpu"))
                norm = measurements.norm_of(squares, options.grad_scale, device)
            if overflow or (options.skip_nonfinite and not math.isfinite(norm)):
                if options.zero_grads:
                    zero(self.native.zeroed)
                if options.telemetry:
                    measurements.observe_skip(groups)
                return Outcome.SKIPPED
            if options.max_grad_norm is not None:
                coefficient = _C.clip_coefficient(norm, float(options.max_grad_norm))
        factor = coefficient / options.grad_scale
        if factor != 1.0:
            self.native.set_grad_factor(factor)
        done = 0
        try:
            for engine, bucket in zip(engines, buckets, strict=True):
                engine.update(bucket, hyperparameters)
                self.native.commit(bucket)
                done += 1
        except BaseException:
            stepped = (bucket.addresses[:, 0] for bucket in buckets[:done])
            self._stepped = frozenset(int(x) for column in stepped for x in column)
            raise
        if options.zero_grads:
            zero(self.native.restrided)
            torch.autograd.graph.increment_version(self.native.zeroed)
        return Outcome.DONE

    def _plain_reads(self) -> AbstractContextManager[object]:
        """A scope in which reading a DTensor's gradient does not look for ``__torch_function__``.

        The search takes longer than all else that a step does with the gradient.
        """
        return torch._C.DisableTorchFunctionSubclass() if self._sharded else nullcontext()

    def has_stepped(self, param: Tensor) -> bool:
        """Whether a step that failed had already updated a parameter."""
        return local_of(param).data_ptr() in self._stepped

    def _engine(self, device: torch.device) -> Engine:
        if (
            self.device_step is None
            and device.type == "cuda"
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(
                "step() under CUDA graph capture: found a step count on the host, which a replay "
                "would repeat; accepted: capturable=True and the engine 'cuda'"
            )
        if device not in self._engines:
            self._engines[device] = engine_for(self.engine, device)
        return self._engines[device]
