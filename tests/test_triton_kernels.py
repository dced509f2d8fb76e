"""The Triton kernel by itself, against the float32 reference: the same bits, and no other byte.

Interpreted on the CPU where there is no GPU, compiled on the GPU where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_adamw import reference, triton_kernels
from fused_adamw.engines import engine_for
from fused_adamw.engines import triton as engine
from fused_adamw.triton_kernels import update

Array = np.ndarray[Any, Any]
Dtypes = tuple[str, str, str]

DEVICE = torch.device("cpu" if engine.interpreted() else "cuda")
TILE = update.TILE.value
THREADS = update.THREADS.value

pytestmark = [] if engine.interpreted() else [pytest.mark.gpu]

ADAM = triton_kernels.RULES["adam"]
F32, BF16, F16 = "float32", "bfloat16", "float16"
# param, grad, state
COMBINATIONS: list[Dtypes] = [
    (F32, F32, F32),
    (F32, BF16, F32),
    (F32, F16, F32),
    (F32, F32, BF16),
    (F32, BF16, BF16),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
    (BF16, F32, F32),
    (BF16, F32, BF16),
    (F16, F16, F16),
    (F16, F16, F32),
    (F16, F32, F32),
    (F16, F32, F16),
]
HOMOGENEOUS = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16)]

all_combinations = pytest.mark.parametrize("dtypes", COMBINATIONS, ids="-".join)
all_variants = pytest.mark.parametrize(
    ("l2", "amsgrad"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["plain", "amsgrad", "l2", "l2-amsgrad"],
)

# Loud values, so that nothing hides in rounding.
Hyperparameters = dict[str, Any]
LOUD: Hyperparameters = {
    "step": 3,
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "schedule_multiplier": 0.5,
}
MAXIMIZE = LOUD | {"step": 1, "lr": 0.3, "maximize": True}


def hyperparameter_rows(l2: bool) -> list[Hyperparameters]:
    """Hyperparameters that differ and share the variant: the rows of a launch's coefficients."""
    if l2:
        return [row | {"decay": "l2"} for row in (LOUD, MAXIMIZE)]
    decays = ("lr", "decoupled", "proximal")
    return [row | {"decay": decay} for row in (LOUD, MAXIMIZE) for decay in decays]


def coefficients(rows: Sequence[Hyperparameters]) -> Array:
    return np.array(
        [dataclasses.astuple(reference.adam_coefficients(np.float32, **row)) for row in rows],
        np.float32,
    )


class Placed:
    """An array copied to the device, between guard bytes that nobody may touch."""

    GUARD = 4 * TILE  # bytes: as far as a tile without a mask would reach
    PATTERN = 0xA5

    def __init__(self, stored: Array, misplaced: int = 0) -> None:
        """Puts `stored` as many elements after a 16-byte boundary as `misplaced` says."""
        self.dtype = stored.dtype
        memory = torch.full(
            (stored.nbytes + 3 * self.GUARD,), self.PATTERN, dtype=torch.uint8, device=DEVICE
        )
        begin = self.GUARD - memory.data_ptr() % 16 + misplaced * stored.itemsize
        self.memory, self.inside = memory, slice(begin, begin + stored.nbytes)
        memory[self.inside] = torch.from_numpy(stored.view(np.uint8)).to(DEVICE)
        self.address = memory.data_ptr() + begin

    def read(self) -> Array:
        everything = self.memory.cpu().numpy()
        outside = np.ones(len(everything), bool)
        outside[self.inside] = False
        assert (everything[outside] == self.PATTERN).all(), "wrote outside the array"
        return everything[self.inside].view(self.dtype)


def slot_dtypes(dtypes: Dtypes, amsgrad: bool) -> list[str]:
    param, grad, state = dtypes
    return [param, grad, *[state] * (3 if amsgrad else 2)]


Tensors = list[list[Array]]  # for each tensor its slots, as stored


def random_slots(
    rng: np.random.Generator, numel: int, dtypes: Dtypes, amsgrad: bool
) -> list[Array]:
    values = rng.standard_normal((5, numel)).astype(np.float32)
    values[3:] **= 2
    return [
        reference.store(x, dtype)
        for x, dtype in zip(values, slot_dtypes(dtypes, amsgrad), strict=False)
    ]


def launch(
    tensors: list[list[Placed]],
    numels: Sequence[int],
    rows: Sequence[int],
    table: Array,
    dtypes: Dtypes,
    rule: Any,
    options: tuple[bool, ...],
) -> None:
    with np.errstate(all="ignore"):
        triton_kernels.launch(
            torch.tensor([[slot.address for slot in slots] for slots in tensors]),
            torch.tensor(numels),
            torch.tensor(rows, dtype=torch.int32),
            torch.from_numpy(table),
            rule=rule,
            options=options,
            dtypes=dtypes,
            device=DEVICE,
        )


def check(
    tensors: Tensors,
    rows: Sequence[Hyperparameters],
    dtypes: Dtypes,
    l2: bool,
    amsgrad: bool,
    misplaced: Callable[[int, int], int] = lambda tensor, slot: 0,
) -> None:
    """One launch over the tensors, which take the rows in turn, against the reference."""
    placed = [
        [Placed(stored, misplaced(i, k)) for k, stored in enumerate(slots)]
        for i, slots in enumerate(tensors)
    ]
    numels = [len(slots[0]) for slots in tensors]
    row_of = [i % len(rows) for i in range(len(tensors))]
    launch(placed, numels, row_of, coefficients(rows), dtypes, ADAM, (l2, amsgrad, False))

    names = slot_dtypes(dtypes, amsgrad)
    for i, slots in enumerate(tensors):
        values = [reference.load(stored, dtype) for stored, dtype in zip(slots, names, strict=True)]
        updated = reference.adamw(*values, **rows[row_of[i]])
        wanted = [updated.param, None, updated.exp_avg, updated.exp_avg_sq, updated.max_exp_avg_sq]
        for k, dtype in enumerate(names):
            want = wanted[k]
            stored = slots[k] if want is None else reference.store(want, dtype)
            assert_same(placed[i][k].read(), stored, dtype, f"tensor {i} of {numels[i]}, slot {k}")


def assert_same(found: Array, wanted: Array, dtype: str, where: str) -> None:
    x, y = reference.load(found, dtype), reference.load(wanted, dtype)
    same = (x.view(np.uint32) == y.view(np.uint32)) | (np.isnan(x) & np.isnan(y))
    at = np.flatnonzero(~same)
    assert at.size == 0, f"{where}: {at.size} differ, first [{at[0]}]: {x[at[0]]!r}, {y[at[0]]!r}"


SIZES = [0, 1, 2, 3, 15, 16, 17, THREADS + 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]


@all_variants
@all_combinations
def test_ragged_sizes_and_rows(dtypes: Dtypes, l2: bool, amsgrad: bool) -> None:
    rng = np.random.default_rng(1)
    tensors = [random_slots(rng, numel, dtypes, amsgrad) for numel in SIZES]
    check(tensors, hyperparameter_rows(l2), dtypes, l2, amsgrad)


@pytest.mark.parametrize("dtypes", [*HOMOGENEOUS, (BF16, F32, F32)], ids="-".join)
def test_unaligned(dtypes: Dtypes) -> None:
    # One slot in turn lies beside a 16-byte boundary, then all do.
    rng = np.random.default_rng(2)
    sizes = [THREADS + 17, 33, THREADS + 17, 33, TILE + 1]
    tensors = [random_slots(rng, numel, dtypes, False) for numel in sizes]
    check(
        tensors,
        hyperparameter_rows(l2=False),
        dtypes,
        l2=False,
        amsgrad=False,
        misplaced=lambda tensor, slot: tensor + 1 if tensor in (slot, 4) else 0,
    )


@pytest.mark.skipif(not engine.interpreted(), reason="watches the interpreter")
def test_alignment_is_promised_only_where_it_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    update_range = update.update_range
    promised = []

    def watch(slots: Any, begin: Any, end: Any, *rest: Any) -> None:
        *_, dtypes, aligned = rest
        promised.append(aligned)
        if aligned:
            assert int(end.handle.data[0]) % 16 == 0
            for slot, dtype in zip(slots, dtypes, strict=True):
                offset = int(begin.handle.data[0]) * dtype.primitive_bitwidth // 8
                assert (int(slot.handle.data[0]) + offset) % 16 == 0
        update_range(slots, begin, end, *rest)

    monkeypatch.setattr(update, "update_range", watch)
    dtypes = (BF16, F32, BF16)
    rng = np.random.default_rng(8)
    check(
        [random_slots(rng, 33, dtypes, True) for _ in range(6)],
        hyperparameter_rows(l2=False),
        dtypes,
        l2=False,
        amsgrad=True,
        misplaced=lambda tensor, slot: int(slot == tensor),  # the last tensor lies right
    )
    assert promised.count(True) == 1


def special_values(dtype: str) -> Array:
    smallest = {F32: 2.0**-149, BF16: 2.0**-133, F16: 2.0**-24}[dtype]
    normal, largest = {
        F32: (2.0**-126, float(np.finfo(np.float32).max)),
        BF16: (2.0**-126, float.fromhex("0x1.fep127")),
        F16: (2.0**-14, 65504.0),
    }[dtype]
    positive = [0, smallest, 3 * smallest, normal / 2, normal, 1e-3, 1, 3, largest, np.inf, np.nan]
    values = np.array([sign * x for x in positive for sign in (1, -1)], np.float32)
    return reference.store(values, dtype)


@all_variants
@all_combinations
def test_special_values(dtypes: Dtypes, l2: bool, amsgrad: bool) -> None:
    rng = np.random.default_rng(3)
    tensors = [
        [rng.choice(special_values(dtype), TILE) for dtype in slot_dtypes(dtypes, amsgrad)]
        for _ in range(2)
    ]
    rows = hyperparameter_rows(l2)
    check(tensors, [rows[0], rows[1] | {"eps": 0.0}], dtypes, l2, amsgrad)


@triton.jit  # type: ignore[untyped-decorator]
def take_grad(param, grad, states, coefficients, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A rule of another shape: param <- scale * grad, one state <- the old param."""
    (scale,) = coefficients
    return scale * grad, (param,)


def run_take_grad(
    param: Array, grad: Array, dtypes: Dtypes, scale: float = 1
) -> tuple[Array, Array]:
    state = np.zeros(len(param), reference.STORAGE_DTYPES[dtypes[2]])
    placed = [Placed(param), Placed(grad), Placed(state)]
    table = np.array([[scale]], np.float32)
    launch([placed], [len(param)], [0], table, dtypes, take_grad, ())
    return placed[0].read(), placed[2].read()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_to_storage(dtype: str) -> None:
    # Every midpoint between two numbers of the dtype, and the float32 on either side of it.
    infinity = {BF16: 0x7F80, F16: 0x7C00}[dtype]
    bits = np.arange(infinity + 1, dtype=np.uint16)
    numbers = reference.load(bits.view(reference.STORAGE_DTYPES[dtype]), dtype).astype(np.float64)
    numbers[-1] = 2 * numbers[-2] - numbers[-3]  # where infinity begins to be the nearest
    midpoints = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32).view(np.uint32)
    beyond = np.array([0x7F800000, 0x7F800001, 0x7FFFFFFF], np.uint32)  # infinity, NaNs
    positive = np.concatenate([midpoints - 1, midpoints, midpoints + 1, beyond])
    values = np.concatenate([positive, positive | np.uint32(1 << 31)]).view(np.float32)

    old = np.zeros(len(values), reference.STORAGE_DTYPES[dtype])
    found, _ = run_take_grad(old, values, (dtype, F32, F32))
    assert_same(found, reference.store(values, dtype), dtype, dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_widening_is_exact(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits.view(reference.STORAGE_DTYPES[dtype])
    found, _ = run_take_grad(np.zeros(len(bits), np.float32), numbers, (F32, dtype, F32))
    assert_same(found, reference.load(numbers, dtype), F32, dtype)


def test_kernel_takes_a_rule_of_another_shape() -> None:
    rng = np.random.default_rng(4)
    param, grad = rng.standard_normal((2, TILE + 3)).astype(np.float32)
    new_param, state = run_take_grad(param, grad, (F32, F32, F32), scale=3)
    assert (new_param == np.float32(3) * grad).all()
    assert (state == param).all()


def test_index_beyond_31_bits() -> None:
    # The last elements of a tensor of 2^33: its addresses point far before the memory in use.
    elements, tail = 1 << 33, TILE + 100
    rng = np.random.default_rng(5)
    slots = random_slots(rng, tail, (F32, F32, F32), False)
    placed = [Placed(stored) for stored in slots]
    record = [slot.address - 4 * elements for slot in placed] + [elements + tail, 0]
    chunks = [[0, elements // TILE], [0, elements // TILE + 1]]
    table = coefficients([LOUD])
    update.update_kernel[(2,)](
        torch.tensor(chunks, dtype=torch.int32, device=DEVICE),
        torch.tensor([record], device=DEVICE),
        torch.from_numpy(table).to(DEVICE),
        **update.constants(ADAM, (False, False, False), (F32, F32, F32), 4, table.shape[1]),
        **update.COMPILE_OPTIONS,
    )
    param, exp_avg, exp_avg_sq, _ = reference.adamw(*slots, **LOUD)
    for slot, want in zip([0, 2, 3], [param, exp_avg, exp_avg_sq], strict=True):
        assert_same(placed[slot].read(), want, F32, f"slot {slot}")


def test_chunk_table_lists_every_tile_once() -> None:
    numels = [0, 1, TILE, TILE + 1, 0, 3 * TILE - 1, 0]
    found = update.chunk_table(np.array(numels).tobytes(), DEVICE).tolist()
    assert found == [[i, tile] for i, n in enumerate(numels) for tile in range(-(-n // TILE))]
    assert update.chunk_table(np.array([1 << 33]).tobytes(), DEVICE)[-1, 1] == (1 << 33) // TILE - 1


@pytest.mark.parametrize("tensors", [0, 2])
def test_nothing_to_do(tensors: int) -> None:
    table = coefficients([LOUD])
    triton_kernels.launch(
        torch.zeros(tensors, 4, dtype=torch.int64),
        torch.zeros(tensors, dtype=torch.int64),
        torch.zeros(tensors, dtype=torch.int32),
        torch.from_numpy(table),
        rule=ADAM,
        options=(False, False, False),
        dtypes=(F32, F32, F32),
        device=DEVICE,
    )


def bucket(tensors: list[list[Placed]], numels: list[int], row: Hyperparameters) -> Any:
    """A stand-in for what the extension hands out, its arrays read-only."""
    arrays: dict[str, Array] = {
        "addresses": np.array([[slot.address for slot in slots] for slots in tensors], np.int64),
        "numels": np.array(numels, np.int64),
        "rows": np.zeros(len(tensors), np.int32),
        "coefficients": coefficients([row]),
    }
    for array in arrays.values():
        array.setflags(write=False)
    return SimpleNamespace(
        functor="adam",
        options=(False, True, False),
        param_dtype=BF16,
        grad_dtype=F32,
        state_dtype=F32,
        **arrays,
    )


@pytest.mark.filterwarnings("error")
def test_engine_adapter() -> None:
    assert engine.unavailable_reason() is None
    rng = np.random.default_rng(6)
    dtypes = (BF16, F32, F32)
    slots = random_slots(rng, 100, dtypes, True)
    slots[1][:2] = np.inf, np.nan
    placed = [Placed(stored) for stored in slots]
    engine.run(bucket([placed], [100], LOUD), DEVICE)
    values = [reference.load(x, d) for x, d in zip(slots, slot_dtypes(dtypes, True), strict=True)]
    updated = reference.adamw(*values, **LOUD)
    assert_same(placed[0].read(), reference.store(updated.param, BF16), BF16, "param")


@pytest.mark.skipif(not engine.interpreted(), reason="Triton compiles here")
def test_engine_refuses_the_wrong_device() -> None:
    on_gpu = SimpleNamespace(device_type=2, device_index=0)
    with pytest.raises(RuntimeError, match="does not work on tensors on cuda:0"):
        engine_for("triton", on_gpu)


def test_reason_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine.unavailable_reason() == "torch finds no GPU, and TRITON_INTERPRET=1 is not set"
