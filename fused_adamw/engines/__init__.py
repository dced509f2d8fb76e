"""Which engines there are, why one is absent, and which one a tensor gets.

An engine is a function that runs one bucket: tensors of one rule, storage format and device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from fused_adamw import _C
from fused_adamw.engines import reference, triton

Run: TypeAlias = Callable[[_C.Bucket, Sequence[_C.Hyperparameters]], object]

ENGINES = ("cpu", "cuda", "triton", "reference")

# DLPack's device codes, as buckets carry them.
_DEVICE_TYPES = {1: "cpu", 2: "cuda"}


def _run_cpu(bucket: _C.Bucket, hyperparameters: Sequence[_C.Hyperparameters]) -> None:
    _C.update_cpu(bucket, torch.get_num_threads())


def _run_cuda(bucket: _C.Bucket, hyperparameters: Sequence[_C.Hyperparameters]) -> None:
    _C.update_cuda(bucket)


def _run_triton(bucket: _C.Bucket, hyperparameters: Sequence[_C.Hyperparameters]) -> None:
    _C.in_default_float_environment(lambda: triton.run(bucket, device_of(bucket)))


def _run_reference(bucket: _C.Bucket, hyperparameters: Sequence[_C.Hyperparameters]) -> None:
    _C.in_default_float_environment(lambda: reference.run(bucket, hyperparameters))


def _run_cuda_on_host(bucket: _C.Bucket, hyperparameters: Sequence[_C.Hyperparameters]) -> None:
    _C.update_cuda_on_host(bucket)


_RUN: dict[str, Run] = {
    "cpu": _run_cpu,
    "cuda": _run_cuda,
    "triton": _run_triton,
    "reference": _run_reference,
    # The CUDA kernel's body played on the host, thread by thread: for tests, so not in ENGINES.
    "cuda-on-host": _run_cuda_on_host,
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
        return "the extension was built without nvcc"
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
    if engine == "auto" or (engine in _RUN and engine not in ENGINES):
        return
    status = engine_status()
    if engine not in status:
        raise ValueError(f"engine: found {engine!r}, accepted: 'auto' or one of {ENGINES}")
    reason = status[engine]
    if reason is not None:
        raise RuntimeError(f"engine {engine!r} is not available: {reason}")


def engine_for(engine: str, bucket: _C.Bucket) -> Run:
    """The function that runs a bucket.

    Args:
        engine: a checked engine name. ``"auto"`` takes ``"cpu"`` for host memory and for CUDA
            memory ``"cuda"``, or ``"triton"`` where the former is absent.
        bucket: what it is to run.

    Raises:
        RuntimeError: the engine cannot work on the bucket's device, or there is none that can.
    """
    device = device_of(bucket)
    if engine == "auto":
        choices = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        status = engine_status()
        for name in choices:
            if status[name] is None:
                return _RUN[name]
        reasons = "; ".join(f"{name}: {status[name]}" for name in choices)
        raise RuntimeError(f"no engine for tensors on {device}: {reasons}")
    if not _works_on(engine, device):
        raise RuntimeError(f"engine {engine!r} does not work on tensors on {device}")
    return _RUN[engine]


def _works_on(engine: str, device: torch.device) -> bool:
    if engine == "triton":
        return (device.type == "cpu") == triton.interpreted()
    return device.type == ("cuda" if engine == "cuda" else "cpu")
