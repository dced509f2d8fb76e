"""Which engines there are, why one is absent, and which one a tensor gets.

An engine runs one bucket: tensors of one rule, storage format and device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_adamw import _C
from fused_adamw.engines import reference, triton

ENGINES = ("cpu", "cuda", "triton", "reference")

# DLPack's device codes, as buckets carry them.
_DEVICE_TYPES = {1: "cpu", 2: "cuda"}


class Engine(NamedTuple):
    """What runs a bucket.

    Attributes:
        update: the whole step, of a bucket and the hyperparameters of each param group.
        square_sums: writes the sum of squares of every chunk of the bucket's gradients to the
            chunk's place in float64 [chunks of the list, 1]; see [note: square sums].
        fold: adds them up for each param group, on the device; None where nothing is worked out
            there.
        tick: works out coefficients and decisions on the device; likewise.
        observes: whether `update` writes the observations of a bucket that asks for them.
    """

    update: Callable[[_C.Bucket, Sequence[_C.Hyperparameters]], object]
    square_sums: Callable[[_C.Bucket, Tensor], object]
    fold: Callable[[_C.FoldArguments, torch.device], object] | None = None
    tick: Callable[[_C.TickArguments, torch.device], object] | None = None
    observes: bool = True


_CPU = Engine(
    lambda bucket, hyperparameters: _C.update_cpu(bucket, torch.get_num_threads()),
    lambda bucket, partials: _C.square_sums_cpu(
        bucket, partials.data_ptr(), torch.get_num_threads()
    ),
)
_CUDA = Engine(
    lambda bucket, hyperparameters: _C.update_cuda(bucket),
    lambda bucket, partials: _C.square_sums_cuda(bucket, partials.data_ptr()),
    lambda arguments, device: _C.fold_cuda(arguments, device.index),
    lambda arguments, device: _C.tick_cuda(arguments, device.index),
)
_TRITON = Engine(
    lambda bucket, hyperparameters: _C.in_default_float_environment(
        lambda: triton.run(bucket, device_of(bucket))
    ),
    lambda bucket, partials: _C.in_default_float_environment(
        lambda: triton.square_sums(bucket, partials)
    ),
    observes=False,
)
_REFERENCE = Engine(
    lambda bucket, hyperparameters: _C.in_default_float_environment(
        lambda: reference.run(bucket, hyperparameters)
    ),
    lambda bucket, partials: reference.square_sums(bucket, partials.numpy()),
)
# The CUDA kernels' bodies played on the host, thread by thread: for tests, so not in ENGINES.
_CUDA_ON_HOST = Engine(
    lambda bucket, hyperparameters: _C.update_cuda_on_host(bucket),
    lambda bucket, partials: _C.square_sums_cuda_on_host(bucket, partials.data_ptr()),
    lambda arguments, device: _C.fold_on_host(arguments),
    lambda arguments, device: _C.tick_on_host(arguments),
)

_BY_NAME = {
    "cpu": _CPU,
    "cuda": _CUDA,
    "triton": _TRITON,
    "reference": _REFERENCE,
    "cuda-on-host": _CUDA_ON_HOST,
}


def device_of(bucket: _C.Bucket) -> torch.device:
    """The device of a bucket's tensors."""
    kind = _DEVICE_TYPES.get(bucket.device_type)
    if kind is None:
        raise RuntimeError(f"no engine runs on DLPack device type {bucket.device_type}")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, bucket.device_index)


@functools.cache
def _cuda_reason() -> str | None:
    if not _C.CUDA_BUILT:
        return "the extension was built without CUDA"
    if torch.version.cuda is None:
        return "this torch is a CPU build, so there are no CUDA tensors"
    return _C.cuda_unavailable_reason() or None


def engine_status() -> dict[str, str | None]:
    """For each engine ``None`` if it can be used here, else the reason in a sentence."""
    return {
        "cpu": None,
        "cuda": _cuda_reason(),
        "triton": triton.unavailable_reason(),
        "reference": None,
    }


def available_engines() -> list[str]:
    """The engines that can be used here."""
    return [name for name, reason in engine_status().items() if reason is None]


def check_engine(engine: str) -> None:
    """Raises ``ValueError`` for an unknown engine, ``RuntimeError`` for one that is absent here."""
    if engine == "auto" or (engine in _BY_NAME and engine not in ENGINES):
        return
    status = engine_status()
    if engine not in status:
        raise ValueError(f"engine: found {engine!r}, accepted: 'auto' or one of {ENGINES}")
    reason = status[engine]
    if reason is not None:
        raise RuntimeError(f"engine {engine!r} is not available: {reason}")


def engine_for(engine: str, device: torch.device) -> Engine:
    """The engine for tensors on a device.

    Args:
        engine: a checked engine name. ``"auto"`` takes ``"cpu"`` for host memory and for CUDA
            memory ``"cuda"``, or ``"triton"`` where the former is absent.
        device: of the tensors, with its index.

    Raises:
        RuntimeError: the engine cannot work on the device, or there is none that can.
    """
    if engine == "auto":
        choices = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        status = engine_status()
        for name in choices:
            if status[name] is None:
                return _BY_NAME[name]
        reasons = "; ".join(f"{name}: {status[name]}" for name in choices)
        raise RuntimeError(f"no engine for tensors on {device}: {reasons}")
    if not _works_on(engine, device):
        raise RuntimeError(f"engine {engine!r} does not work on tensors on {device}")
    return _BY_NAME[engine]


def _works_on(engine: str, device: torch.device) -> bool:
    if engine == "triton":
        return (device.type == "cpu") == triton.interpreted()
    return device.type == ("cuda" if engine == "cuda" else "cpu")
