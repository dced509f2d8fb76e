"""The Triton kernel of the squared norm, against the reference: the same bits, and no other byte.

Interpreted on the CPU where there is no GPU, compiled on the GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton_memory import BF16, DEVICE, F16, F32, Array, Placed, special_values

from fused_adamw import reference, triton_kernels
from fused_adamw.engines import triton as engine
from fused_adamw.triton_kernels import norm

pytestmark = [] if engine.interpreted() else [pytest.mark.gpu]

CHUNK = norm.CHUNK.value
SIZES = [0, 1, 15, 16, 17, *(n + i for n in (32, 2048, CHUNK) for i in (-1, 0, 1)), 0, 40000]

all_dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16])


def check(grads: Sequence[Array], dtype: str, misplaced: Sequence[int]) -> None:
    """One launch over the gradients, whose partials lie in the other order with gaps between."""
    placed = [Placed(grad, off) for grad, off in zip(grads, misplaced, strict=True)]
    wanted = [reference.squared_norm_partials(grad, dtype) for grad in grads]
    offsets, end = [], 1
    for partials in reversed(wanted):
        offsets.insert(0, end)
        end += len(partials) + 1
    found = torch.full((end,), -1.0, dtype=torch.float64, device=DEVICE)
    with np.errstate(all="ignore"):
        triton_kernels.launch_norm(
            torch.tensor([grad.address for grad in placed]),
            torch.tensor([len(grad) for grad in grads]),
            torch.tensor(offsets),
            found,
            dtype=dtype,
            device=DEVICE,
        )
    everything = np.full(end, -1.0)
    for offset, partials in zip(offsets, wanted, strict=True):
        everything[offset : offset + len(partials)] = partials
    np.testing.assert_array_equal(found.cpu().numpy(), everything)
    for grad, stored in zip(placed, grads, strict=True):
        np.testing.assert_array_equal(grad.read().view(np.uint8), stored.view(np.uint8))


def draw(rng: np.random.Generator, numel: int, dtype: str) -> Array:
    """Numbers of many magnitudes, so that nearly every order of their sum has other bits."""
    values = rng.standard_normal(numel) * np.exp2(rng.integers(-8, 8, numel))
    return reference.store(values.astype(np.float32), dtype)


@all_dtypes
def test_ragged_sizes(dtype: str) -> None:
    rng = np.random.default_rng(1)
    check([draw(rng, numel, dtype) for numel in SIZES], dtype, [0] * len(SIZES))


@all_dtypes
def test_unaligned(dtype: str) -> None:
    rng = np.random.default_rng(2)
    sizes = [33, 129, 2049, CHUNK, CHUNK + 1, 40000]
    check([draw(rng, numel, dtype) for numel in sizes], dtype, [1, 2, 3, 1, 3, 1])


def test_many_chunks() -> None:
    """In some of which the wrong order of any two additions shows."""
    check([draw(np.random.default_rng(5), 30 * CHUNK, F32)], F32, [0])


@pytest.mark.skipif(not engine.interpreted(), reason="watches the interpreter")
def test_alignment_is_promised_only_where_it_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    add_aligned_rows = norm.add_aligned_rows
    promised = []

    def watch(lanes: Any, grad: Any, index: Any, end: Any) -> Any:
        promised.append(int(end.handle.data[0]))
        assert promised[-1] % 16 == int(grad.handle.data[0]) % 16 == 0
        return add_aligned_rows(lanes, grad, index, end)

    monkeypatch.setattr(norm, "add_aligned_rows", watch)
    rng = np.random.default_rng(6)
    check([draw(rng, CHUNK + 45, BF16) for _ in range(9)], BF16, range(9))
    assert promised == [CHUNK, 32, CHUNK, 32]  # of the first and the last


@all_dtypes
def test_special_values(dtype: str) -> None:
    """Infinities, NaNs, denormals, the largest numbers: in separate chunks, and all together."""
    values = special_values(dtype)
    rng = np.random.default_rng(3)
    finite = values[np.isfinite(reference.load(values, dtype))]
    grads = [np.full(n, value, values.dtype) for value in values for n in (1, 300)]
    grads += [rng.choice(finite, CHUNK + 9), rng.choice(values, 3000)]
    check(grads, dtype, [i % 2 for i in range(len(grads))])


def test_every_position_counts_once() -> None:
    """A lone number in every row, lane group and segment, where the others are zero."""
    grads = []
    for at in [*range(0, CHUNK, 509), 31, 32, 2047, 2048, CHUNK - 1]:
        grad = np.zeros(CHUNK, np.float32)
        grad[at] = 3.0
        grads.append(grad)
    assert all(reference.squared_norm_partials(grad, F32) == [9.0] for grad in grads)
    check(grads, F32, [0] * len(grads))


@pytest.mark.parametrize("tensors", [0, 2])
def test_nothing_to_do(tensors: int) -> None:
    nothing = torch.zeros(tensors, dtype=torch.int64)
    partials = torch.empty(0, dtype=torch.float64, device=DEVICE)
    triton_kernels.launch_norm(nothing, nothing, nothing, partials, dtype=F32, device=DEVICE)


def test_index_beyond_31_bits() -> None:
    # The last chunks of a tensor of 2^33: its address points far before the memory in use.
    elements, tail = 1 << 33, CHUNK + 100
    grad = draw(np.random.default_rng(4), tail, F32)
    placed = Placed(grad)
    record = [placed.address - 4 * elements, elements + tail, -(elements // CHUNK)]
    chunks = [[0, elements // CHUNK], [0, elements // CHUNK + 1]]
    found = torch.full((2,), -1.0, dtype=torch.float64, device=DEVICE)
    norm.norm_kernel[(2,)](
        torch.tensor(chunks, dtype=torch.int32, device=DEVICE),
        torch.tensor([record], device=DEVICE),
        found,
        **norm.constants(F32),
        **norm.COMPILE_OPTIONS,
    )
    np.testing.assert_array_equal(found.cpu(), reference.squared_norm_partials(grad, F32))
