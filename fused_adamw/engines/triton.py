"""The Triton engine: hands a bucket of tensors to `fused_adamw.triton_kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fused_adamw import _C


def unavailable_reason() -> str | None:
    """Why this engine cannot run here, in a sentence; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "torch finds no GPU, and TRITON_INTERPRET=1 is not set"


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1) instead of compiling."""
    import fused_adamw.triton_kernels as triton_kernels  # triton is optional, and slow

    return bool(triton_kernels.INTERPRETED.value)


def run(bucket: _C.Bucket, device: torch.device) -> None:
    """Updates every tensor of a bucket in place.

    Args:
        bucket: tensors of one functor and one dtype combination.
        device: where the tensors are.
    """
    import fused_adamw.triton_kernels as triton_kernels

    is_coded = bucket.scales.size > 0
    format = triton_kernels.Format(
        bucket.param_dtype,
        bucket.grad_dtype,
        bucket.state_dtype,
        bucket.beside,
        bucket.stochastic,
        bucket.state_kinds if is_coded else (),
    )
    tensors = triton_kernels.TensorList(
        _tensor(bucket.addresses),
        _tensor(bucket.numels),
        _tensor(bucket.rows),
        besides=_tensor(bucket.besides) if format.beside else None,
        emas=_tensor(bucket.emas) if len(bucket.emas) else None,
        scales=_tensor(bucket.scales) if is_coded else None,
        sources=_sources(bucket) if format.draws else None,
        runs=_runs(bucket) if format.draws else None,
    )
    with np.errstate(all="ignore"):  # the interpreter is NumPy, which would warn of infinities
        triton_kernels.launch(
            tensors,
            _tensor(bucket.coefficients),
            zero_grads=bucket.zero_grads,
            rule=triton_kernels.RULES[bucket.functor],
            options=bucket.options,
            format=format,
            device=device,
        )


def square_sums(bucket: _C.Bucket, partials: torch.Tensor) -> None:
    """Writes the sums of squares of the gradients' chunks.

    Args:
        bucket: see `run`.
        partials: float64 [chunks of the list, 1] on the tensors' device.
    """
    import fused_adamw.triton_kernels as triton_kernels

    with np.errstate(all="ignore"):
        triton_kernels.launch_norm(
            _tensor(np.ascontiguousarray(bucket.addresses[:, 1])),
            _tensor(bucket.numels),
            _tensor(bucket.chunks),
            partials,
            dtype=bucket.grad_dtype,
            device=partials.device,
        )


def _sources(bucket: _C.Bucket) -> torch.Tensor:
    """int64 [tensors, 2]: of random bits the key, all of whose bits count, and the first index."""
    return _tensor(np.stack((bucket.keys.view(np.int64), bucket.extents[:, 0]), axis=1))


def _runs(bucket: _C.Bucket) -> torch.Tensor | None:
    """int64 [tensors, 2]: length and distance of runs, one of which may be all; None: all are."""
    runs: NDArray[np.int64] = bucket.extents[:, 1:]
    if not runs.any():
        return None
    runs[:, 0] = np.where(runs[:, 0] == 0, np.maximum(bucket.numels, 1), runs[:, 0])
    return _tensor(np.ascontiguousarray(runs))


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array's memory as a tensor; a copy where torch would warn that it is read-only."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
