"""The reference as an engine: `fused_adamw.reference` on the memory of a bucket of tensors.

It computes a rule's coefficients anew from the hyperparameters, where the other engines take those
the extension computed, so that a comparison with it covers the coefficients too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fused_adamw import reference
from fused_adamw import reference_formats as formats


def _view(address: int, numel: int, dtype: str) -> NDArray[Any]:
    """A writable array over ``numel`` elements of memory that someone else owns."""
    storage: np.dtype[Any] = np.dtype(reference.STORAGE_DTYPES.get(dtype, dtype))
    memory = (ctypes.c_byte * (numel * storage.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), storage)


def run(bucket: Any, hyperparameters: Sequence[Any]) -> None:
    """Updates every tensor of a bucket in place.

    Args:
        bucket: tensors in host memory of one storage format, as the extension hands them out:
            ``param_dtype``, ``grad_dtype``, ``state_dtype`` are names of dtypes, "code8" that of
            coded states, whose kinds are ``state_kinds``; ``beside`` is the name of what is beside
            the params, or empty; ``stochastic`` says whether rounding is; ``addresses`` [tensors,
            slots] has the param, the gradient and the states, ``besides`` [tensors] what is beside
            the params, ``scales`` [tensors, states] the scales of coded states, ``emas`` [tensors]
            the float32 averages of the params, each of these three empty where there are none;
            ``numels``, ``groups``, ``rows`` and ``steps`` are integers [tensors], ``scalars``
            [tensors] what the rule carries; ``keys`` [tensors] are those of the random bits and
            ``extents`` [tensors, 3], see `element_numbers`, tell for which; each row of
            ``coefficients`` ends with the gradient's factor, the weight of the average and the
            bits of the number of steps taken before this one; ``zero_grads`` says whether the
            gradients are zeroed; ``observed`` is the address of what `reference.observed` has of
            each chunk of the list, whose places are in ``chunks`` [tensors], or 0.
        hyperparameters: for each param group, which ``bucket.groups`` are indices of, an object
            with the name of its ``rule`` and the ``values`` by name.
    """
    for i, numel in enumerate(bucket.numels):
        if numel:  # a tensor without elements may have a null address
            _update(bucket, i, int(numel), hyperparameters[bucket.groups[i]])


class _State(NamedTuple):
    """A state in memory; the kind and the scales of one that is coded."""

    stored: NDArray[Any]
    kind: str = ""
    scales: NDArray[np.float32] | None = None


def _states(bucket: Any, i: int, numel: int) -> list[_State]:
    """The states of tensor number ``i`` of a bucket; see `run`."""
    addresses = map(int, bucket.addresses[i, 2:])
    if bucket.state_dtype != "code8":
        return [_State(_view(address, numel, bucket.state_dtype)) for address in addresses]
    blocks = -(-numel // formats.CODE_BLOCK)
    return [
        _State(
            _view(address, numel, formats.CODINGS[kind].dtype),
            kind,
            _view(scale, blocks, "float32"),
        )
        for address, scale, kind in zip(
            addresses, map(int, bucket.scales[i]), bucket.state_kinds, strict=True
        )
    ]


def _update(bucket: Any, i: int, numel: int, of_group: Any) -> None:
    """Updates tensor number ``i`` of a bucket; see `run`."""
    param_dtype, grad_dtype, state_dtype = bucket.param_dtype, bucket.grad_dtype, bucket.state_dtype
    param = _view(int(bucket.addresses[i, 0]), numel, param_dtype)
    grad = _view(int(bucket.addresses[i, 1]), numel, grad_dtype)
    states = _states(bucket, i, numel)
    beside, kept = bucket.beside, None
    if beside:
        kept = _view(int(bucket.besides[i]), numel, formats.BESIDES[beside].dtype)
    coefficients = bucket.coefficients[bucket.rows[i]]
    grad_factor, ema_weight = coefficients[-3:-1]
    indices = formats.element_numbers(numel, *map(int, bucket.extents[i]))
    drawn = int(bucket.keys[i]), indices, int(coefficients.view(np.uint32)[-1])

    position: dict[str, Any] = {"step": int(bucket.steps[i])}
    if of_group.rule in reference.CARRIES:
        position["scalar"] = float(bucket.scalars[i])
    before = formats.load_param(param, param_dtype, beside, kept)
    gradient = reference.load(grad, grad_dtype)
    updated, *numbers = reference.update(
        of_group.rule,
        before,
        gradient,
        *[formats.load_state(state.stored, state_dtype, *state[1:]) for state in states],
        grad_factor=grad_factor,
        **position,
        **of_group.values,
    )

    random = None
    if bucket.stochastic:
        random = formats.random_halves(*drawn)
    elif beside == "remainder8":
        random = formats.random_bytes(*drawn)
    param[...], beside_it = formats.store_param(
        updated, param_dtype, beside, bucket.stochastic, random
    )
    if kept is not None:
        kept[...] = beside_it
    for k, (state, values) in enumerate(zip(states, numbers, strict=True)):
        random = formats.random_halves(*drawn, k) if bucket.stochastic else None
        state.stored[...], scales = formats.store_state(values, state_dtype, state.kind, random)
        if state.scales is not None:
            state.scales[...] = scales

    after = formats.load_param(param, param_dtype, beside, kept)
    if bucket.observed:
        found = reference.observed(gradient, before, after)
        at = bucket.observed + 8 * found.shape[1] * int(bucket.chunks[i])
        _view(at, found.size, "float64").reshape(found.shape)[...] = found
    if len(bucket.emas):
        ema = _view(int(bucket.emas[i]), numel, "float32")
        ema[...] = reference.ema(ema, after, ema_weight)
    if bucket.zero_grads:
        grad[...] = 0


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
