"""What a step measures: the norm of the gradients, and telemetry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fused_adamw import _C
from fused_adamw.engines import Engine, device_of


class GroupTelemetry(NamedTuple):
    """What a step did to the parameters of a group that had a gradient, on this rank.

    The numbers are floats, norms rounded to float32; all are NaN, and the count None, of a step
    that was skipped.

    Attributes:
        grad_norm: of the gradients, unscaled and not clipped.
        update_norm: of the change of the parameters as they are stored.
        param_norm: of the parameters after the step.
        nonfinite_grads: number of elements of gradients that are infinite or NaN.
        lost_fraction: of the elements of parameters, those that the step left as they were though
            their gradient is not zero: the update was rounded to nothing.
        skipped: whether nothing was updated, because of an overflow or ``skip_nonfinite``.
    """

    grad_norm: float
    update_norm: float
    param_norm: float
    nonfinite_grads: int | None
    lost_fraction: float
    skipped: bool = False


_SKIPPED = GroupTelemetry(math.nan, math.nan, math.nan, None, math.nan, skipped=True)


@dataclass(frozen=True)
class _Observed:
    sums: Tensor  # float64 [chunks, fields of core/pass.h's Observation]
    runs: _C.ChunkRuns
    shape: tuple[int, int]  # of the runs' rows: classes, param groups
    numels: list[int]  # of each param group
    grad_scale: float | Tensor
    skip: Tensor | None  # where the device decides, whether it skipped: int32 []


class Measurements:
    """Of an optimizer, the latest.

    Attributes:
        grad_norm: of all gradients, unscaled: float32 []; None before the first.
    """

    def __init__(self) -> None:
        self.grad_norm: Tensor | None = None
        self._observed: _Observed | int | None = None  # of so many groups nothing: skipped

    def squares(
        self,
        native: _C.ParameterList,
        engines: Sequence[Engine],
        buckets: Sequence[_C.Bucket],
        sums: int,
        rows: int = 1,
    ) -> list[float]:
        """This rank's sums of gradients' squares; see [note: square sums].

        Args:
            native: the list, which has a row for each param group of each class.
            engines: of the buckets.
            buckets: of the list.
            sums: how many.
            rows: of how many neighbouring rows each is.
        """
        partials = _columns(native, buckets, 1)
        for engine, bucket in zip(engines, buckets, strict=True):
            engine.square_sums(bucket, partials[device_of(bucket)])
        squares = np.zeros(sums)
        for found in partials.values():  # of a chunk on another device there is a zero
            squares += _folded(found, native.chunk_runs, sums, rows)[:, 0]
        return squares.tolist()

    def norm_of(self, squares: list[float], grad_scale: float, device: torch.device) -> float:
        """The norm of all unscaled gradients, of sums of their squares."""
        total = 0.0
        for square in squares:
            total += square
        norm = _C.norm(total, grad_scale)
        self.grad_norm = torch.tensor(norm, dtype=torch.float32, device=device)
        return norm

    def observe(
        self,
        native: _C.ParameterList,
        engines: Sequence[Engine],
        buckets: Sequence[_C.Bucket],
        shape: tuple[int, int],
        grad_scale: float | Tensor,
        skip: Tensor | None = None,
    ) -> None:
        """Has the buckets observed as they are updated, unless the device then sets `skip`.

        The list has `shape` rows of sums: [classes, groups].

        `check_observable` has been called.
        """
        columns = _columns(native, buckets, _C.OBSERVED)
        numels = [0] * shape[1]
        for bucket in buckets:
            for group, numel in zip(bucket.groups.tolist(), bucket.numels.tolist(), strict=True):
                numels[group] += numel
        sums = next(iter(columns.values()), torch.empty(0, _C.OBSERVED, dtype=torch.float64))
        native.set_observed(sums.data_ptr())
        self._observed = _Observed(sums, native.chunk_runs, shape, numels, grad_scale, skip)

    def observe_skip(self, groups: int) -> None:
        """Notes that a step over `groups` param groups was skipped."""
        self._observed = groups

    def telemetry(self) -> list[GroupTelemetry] | None:
        """Of each param group at the last step that was observed; None before."""
        observed = self._observed
        if observed is None:
            return None
        if isinstance(observed, int):
            return [_SKIPPED] * observed
        if observed.skip is not None and observed.skip.item():
            return [_SKIPPED] * len(observed.numels)
        classes, groups = observed.shape
        folded = _folded(observed.sums, observed.runs, classes * groups)
        first, *others = folded.reshape(classes, groups, -1)
        sums = sum(others, first).tolist()
        return [
            GroupTelemetry(
                _norm(grad, float(observed.grad_scale)),
                _norm(update),
                _norm(param),
                int(nonfinite),
                lost / numel if numel else 0.0,
            )
            for (grad, update, param, nonfinite, lost), numel in zip(
                sums, observed.numels, strict=True
            )
        ]


def check_observable(engines: Sequence[Engine], buckets: Sequence[_C.Bucket]) -> None:
    """Refuses what cannot be observed, before other ranks are met.

    Raises:
        RuntimeError: an engine does not observe, or there are several devices.
    """
    if not all(engine.observes for engine in engines):
        raise RuntimeError(
            "telemetry: found the engine 'triton', accepted: 'cpu', 'cuda' or 'reference'"
        )
    if len({*map(device_of, buckets)}) > 1:
        raise RuntimeError("telemetry: found parameters on several devices, accepted: on one")


def _norm(square: float, scale: float = 1.0) -> float:
    """Rounded to float32: the order of the sums differs between engines, in the last bits."""
    with np.errstate(over="ignore"):
        return float(np.float32(np.sqrt(square) / scale))


def _columns(
    native: _C.ParameterList, buckets: Sequence[_C.Bucket], count: int
) -> dict[torch.device, Tensor]:
    """On each device `count` sums for each chunk of the list: float64 [chunks, count]."""
    devices = dict.fromkeys(map(device_of, buckets))
    make = torch.empty if len(devices) == 1 else torch.zeros  # where a chunk is on another
    return {
        device: make(native.chunks, count, dtype=torch.float64, device=device) for device in devices
    }


def _folded(found: Tensor, runs: _C.ChunkRuns, sums: int, rows: int = 1) -> NDArray[np.float64]:
    """The sums over the chunks of so many neighbouring rows, [sums, columns]; the host waits."""
    on_host = found.cpu()
    return _C.fold(on_host.data_ptr(), on_host.shape[1], runs, sums, rows)
