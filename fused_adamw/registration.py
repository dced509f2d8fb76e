"""The list of parameters and states on its way through a step, for the class and the function."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_adamw import _C
from fused_adamw.engines import Run, engine_for

_CUDA = 2  # DLPack's code


def _use_exchange_api() -> None:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(f"fused_adamw needs torch 2.11 or later, found {torch.__version__}")
    _C.use_exchange_api(capsule)


_use_exchange_api()


@torch.no_grad()
def restride(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of ``tensor`` whose strides are those of ``like``, a tensor of the same shape."""
    copy = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


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
        active: whether it can have a gradient; what cannot may be of any kind.
        group: index of its param group.
        label: how messages call it.
    """

    param: Tensor
    state: dict[str, Any] | None
    names: tuple[str, ...]
    group: int
    label: str
    counts: bool = True
    scalar: str | None = None
    fresh: bool = False
    active: bool = True


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
    native: _C.ParameterList = field(init=False)
    # Addresses of the parameters that a step updated before an engine failed. Not the buckets: they
    # keep the extension's list alive, unseen by Python's cycle collector.
    _stepped: frozenset[int] = field(init=False, default=frozenset())
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _runs: dict[tuple[int, int], Run] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.native = _C.ParameterList(
            params=[member.param for member in self.members],
            states=[member.state for member in self.members],
            names=[member.names for member in self.members],
            counts=[member.counts for member in self.members],
            scalars=[member.scalar for member in self.members],
            fresh=[member.fresh for member in self.members],
            active=[member.active for member in self.members],
            groups=[member.group for member in self.members],
            labels=[member.label for member in self.members],
            restride=restride,
            increment_version=torch.autograd.graph.increment_version,
        )
        _live.add(self)

    def step(
        self,
        hyperparameters: Sequence[_C.Hyperparameters],
        grads: list[Tensor | None] | None = None,
        *,
        is_state_held: bool = False,
    ) -> bool:
        """Updates every parameter that has a gradient; false, with nothing done, if out of date.

        Args:
            hyperparameters: of each group.
            grads: the gradients; by default those of the parameters.
            is_state_held: whether someone else can reach the states, and may have moved them.

        Raises:
            TypeError, ValueError, RuntimeError: for a gradient that cannot be used, naming the
                parameter; nothing has been written then. Should an engine itself fail, the buckets
                before have been stepped and counted.
        """
        with self._lock:  # another thread's step would take the buckets from under an engine
            if not self.native.gather(hyperparameters, grads, is_state_held):
                return False
            buckets = self.native.buckets()
            runs = [self._run(bucket) for bucket in buckets]
            done = 0
            try:
                for run, bucket in zip(runs, buckets, strict=True):
                    run(bucket, hyperparameters)
                    self.native.commit(bucket)
                    done += 1
            except BaseException:
                stepped = (bucket.addresses[:, 0] for bucket in buckets[:done])
                self._stepped = frozenset(int(x) for column in stepped for x in column)
                raise
        return True

    def has_stepped(self, param: Tensor) -> bool:
        """Whether a step that failed had already updated a parameter."""
        return param.data_ptr() in self._stepped

    def _run(self, bucket: _C.Bucket) -> Run:
        if bucket.device_type == _CUDA and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() under CUDA graph capture is not supported: its step count and "
                "learning rate are host values that a replay would repeat"
            )
        device = bucket.device_type, bucket.device_index
        if device not in self._runs:
            self._runs[device] = engine_for(self.engine, bucket)
        return self._runs[device]
