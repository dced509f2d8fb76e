"""The reference as an engine: `fused_adamw.reference` on the memory of a bucket of tensors.

It computes a rule's coefficients anew from the hyperparameters, where the other engines take those
the extension computed, so that a comparison with it covers the coefficients too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fused_adamw import reference


def _view(address: int, numel: int, dtype: str) -> NDArray[Any]:
    """A writable array over ``numel`` elements of memory that someone else owns."""
    storage: np.dtype[Any] = np.dtype(reference.STORAGE_DTYPES.get(dtype, dtype))
    memory = (ctypes.c_byte * (numel * storage.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), storage)


def run(bucket: Any, hyperparameters: Sequence[Any]) -> None:
    """Updates every tensor of a bucket in place.

    Args:
        bucket: tensors in host memory of one dtype combination, as the extension hands them out:
            ``param_dtype``, ``grad_dtype``, ``state_dtype`` are names of dtypes; ``addresses``
            [tensors, slots] has the param, the gradient and the states, ``emas`` [tensors] the
            float32 averages of the params, or nothing; ``numels``, ``groups``, ``rows`` and
            ``steps`` are integers [tensors], ``scalars`` [tensors] what the rule carries; each row
            of ``coefficients`` ends with the gradient's factor and the weight of the average;
            ``zero_grads`` says whether the gradients are zeroed; ``observed`` is the address of
            what `reference.observed` has of each chunk of the list, whose places are in ``chunks``
            [tensors], or 0.
        hyperparameters: for each param group, which ``bucket.groups`` are indices of, an object
            with the name of its ``rule`` and the ``values`` by name.
    """
    state_dtype = bucket.state_dtype
    slots = bucket.addresses.shape[1]
    dtypes = (bucket.param_dtype, bucket.grad_dtype, *[state_dtype] * (slots - 2))
    averages = bucket.emas if len(bucket.emas) else [None] * len(bucket.numels)
    shared = bucket.coefficients[bucket.rows, -3:-1]
    columns = (bucket.addresses, averages, bucket.numels, bucket.chunks, bucket.groups)
    for addresses, average, numel, chunk, group, step, scalar, (grad_factor, ema_weight) in zip(
        *columns, bucket.steps, bucket.scalars, shared, strict=True
    ):
        if numel == 0:  # such a tensor may have a null address
            continue
        views = [
            _view(int(address), int(numel), dtype)
            for address, dtype in zip(addresses, dtypes, strict=True)
        ]
        values = [reference.load(view, dtype) for view, dtype in zip(views, dtypes, strict=True)]
        rule = hyperparameters[group].rule
        position: dict[str, Any] = {"step": int(step)}
        if rule in reference.CARRIES:
            position["scalar"] = float(scalar)
        updated = reference.update(
            rule, *values, grad_factor=grad_factor, **position, **hyperparameters[group].values
        )
        param, grad, *states = zip(views, dtypes, strict=True)
        for (view, dtype), array in zip([param, *states], updated, strict=True):
            view[...] = reference.store(array, dtype)
        if bucket.observed:
            found = reference.observed(values[1], values[0], reference.load(*param))
            at = bucket.observed + 8 * found.shape[1] * int(chunk)
            _view(at, found.size, "float64").reshape(found.shape)[...] = found
        if average is not None:
            ema = _view(int(average), int(numel), "float32")
            ema[...] = reference.ema(ema, reference.load(*param), ema_weight)
        if bucket.zero_grads:
            grad[0][...] = 0


def square_sums(bucket: Any, partials: NDArray[np.float64]) -> None:
    """Writes the sums of squares of the gradients' chunks.

    Args:
        bucket: see `run`.
        partials: [chunks of the list, 1].
    """
    dtype = bucket.grad_dtype
    for address, numel, chunk in zip(
        bucket.addresses[:, 1], bucket.numels, bucket.chunks, strict=True
    ):
        if numel == 0:
            continue
        sums = reference.squared_norm_partials(_view(int(address), int(numel), dtype), dtype)
        partials[chunk : chunk + len(sums), 0] = sums
