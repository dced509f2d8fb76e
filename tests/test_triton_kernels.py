"""The Triton kernel by itself, against the float32 reference: the same bits, and no other byte.

Interpreted on the CPU where there is no GPU, compiled on the GPU where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_memory import BF16, DEVICE, F16, F32, Array, Placed, assert_same, special_values

from fused_adamw import reference, triton_kernels
from fused_adamw.engines import engine_for
from fused_adamw.engines import triton as engine
from fused_adamw.triton_kernels import formats, tables, update

Dtypes = tuple[str, str, str]

TILE = update.TILE.value
THREADS = update.THREADS.value

pytestmark = [] if engine.interpreted() else [pytest.mark.gpu]

ADAM = triton_kernels.RULES["adam"]
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


class Row(NamedTuple):
    """What a row of a launch's coefficients is made of; the factor is no power of two."""

    hyperparameters: Hyperparameters
    grad_factor: float = 0.3
    ema_weight: float = 0.2


BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))
FACTORS = [1.0, 0.3, 1.7e-3, 65536 / 3]
EMA_WEIGHTS = [0.001, BELOW_HALF, 0.5, 0.9, 1.0, 0.0]


def make_rows(l2: bool) -> list[Row]:
    """Hyperparameters that differ and share the variant, with every weight of an average."""
    decays = ["l2"] if l2 else ["lr", "decoupled", "proximal"]
    return [
        Row(
            (LOUD, MAXIMIZE)[i % 2] | {"decay": decays[i // 2 % len(decays)]},
            FACTORS[i % len(FACTORS)],
            weight,
        )
        for i, weight in enumerate(EMA_WEIGHTS)
    ]


def coefficients(rows: Sequence[Row]) -> Array:
    return np.array(
        [
            [
                *dataclasses.astuple(reference.adam_coefficients(np.float32, **h)),
                *(grad_factor, ema_weight, 0.0),  # nothing is drawn
            ]
            for h, grad_factor, ema_weight in rows
        ],
        np.float32,
    )


def slot_dtypes(dtypes: Dtypes, amsgrad: bool, ema: bool = False) -> list[str]:
    param, grad, state = dtypes
    return [param, grad, *[state] * (3 if amsgrad else 2), *[F32] * ema]


Tensors = list[list[Array]]  # for each tensor its slots, as stored; a moving average comes last


def random_slots(
    rng: np.random.Generator, numel: int, dtypes: Dtypes, amsgrad: bool, ema: bool = False
) -> list[Array]:
    names = slot_dtypes(dtypes, amsgrad, ema)
    values = rng.standard_normal((len(names), numel)).astype(np.float32)
    values[3 : 5 if amsgrad else 4] **= 2
    return [reference.store(x, dtype) for x, dtype in zip(values, names, strict=True)]


def launch(
    tensors: list[list[Placed]],
    numels: Sequence[int],
    rows: Sequence[int],
    table: Array,
    dtypes: Dtypes,
    rule: Any,
    options: tuple[bool, ...],
    ema: bool = False,
    zero_grads: bool = False,
) -> None:
    addresses = torch.tensor([[slot.address for slot in slots] for slots in tensors])
    with np.errstate(all="ignore"):
        triton_kernels.launch(
            triton_kernels.TensorList(
                addresses[:, :-1] if ema else addresses,
                torch.tensor(numels),
                torch.tensor(rows, dtype=torch.int32),
                emas=addresses[:, -1] if ema else None,
            ),
            torch.from_numpy(table),
            zero_grads=zero_grads,
            rule=rule,
            options=options,
            format=triton_kernels.Format(*dtypes),
            device=DEVICE,
        )


def check(
    tensors: Tensors,
    rows: Sequence[Row],
    dtypes: Dtypes,
    l2: bool,
    amsgrad: bool,
    misplaced: Callable[[int, int], int] = lambda tensor, slot: 0,
    ema: bool = False,
    zero_grads: bool = False,
) -> None:
    """One launch over the tensors, which take the rows in turn, against the reference."""
    placed = [
        [Placed(stored, misplaced(i, k)) for k, stored in enumerate(slots)]
        for i, slots in enumerate(tensors)
    ]
    numels = [len(slots[0]) for slots in tensors]
    row_of = [i % len(rows) for i in range(len(tensors))]
    options = (l2, amsgrad, False)
    launch(placed, numels, row_of, coefficients(rows), dtypes, ADAM, options, ema, zero_grads)

    names = slot_dtypes(dtypes, amsgrad, ema)
    for i, slots in enumerate(tensors):
        row = rows[row_of[i]]
        for k, wanted in enumerate(stepped(slots, names, row, amsgrad, ema, zero_grads)):
            where = f"tensor {i} of {numels[i]}, slot {k}"
            assert_same(placed[i][k].read(), wanted, names[k], where)


def stepped(
    slots: list[Array], names: list[str], row: Row, amsgrad: bool, ema: bool, zero_grads: bool
) -> list[Array]:
    """The slots after a step of the reference, as stored."""
    values = [reference.load(stored, dtype) for stored, dtype in zip(slots, names, strict=True)]
    average = values.pop() if ema else None
    param, *states = reference.update(
        "adam",
        *values,
        amsgrad=amsgrad,
        grad_factor=row.grad_factor,
        **({"decay": "lr", "maximize": False} | row.hyperparameters),
    )
    grad = np.zeros_like(slots[1]) if zero_grads else slots[1]
    updated = [param, values[1], *states]
    wanted = [reference.store(x, dtype) for x, dtype in zip(updated, names, strict=False)]
    wanted[1] = grad
    if average is not None:
        wanted.append(reference.ema(average, reference.load(wanted[0], names[0]), row.ema_weight))
    return wanted


SIZES = [0, 1, 2, 3, 15, 16, 17, THREADS + 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]


@all_variants
@all_combinations
def test_ragged_sizes_and_rows(dtypes: Dtypes, l2: bool, amsgrad: bool) -> None:
    rng = np.random.default_rng(1)
    tensors = [random_slots(rng, numel, dtypes, amsgrad) for numel in SIZES]
    check(tensors, make_rows(l2), dtypes, l2, amsgrad)


WHOLE_STEP_SIZES = [0, 1, *(n + i for n in (128, 2048, 16384) for i in (-1, 0, 1)), 40000]


@pytest.mark.parametrize("zero_grads", [False, True], ids=["keep", "zero"])
@all_combinations
def test_moving_average_and_zeroed_gradients(dtypes: Dtypes, zero_grads: bool) -> None:
    rng = np.random.default_rng(9)
    tensors = [random_slots(rng, numel, dtypes, False, ema=True) for numel in WHOLE_STEP_SIZES]
    rows = make_rows(l2=False)
    check(tensors, rows, dtypes, l2=False, amsgrad=False, ema=True, zero_grads=zero_grads)


@pytest.mark.parametrize("dtypes", HOMOGENEOUS, ids="-".join)
def test_zeroed_gradients_alone(dtypes: Dtypes) -> None:
    rng = np.random.default_rng(10)
    tensors = [random_slots(rng, numel, dtypes, True) for numel in SIZES]
    check(tensors, make_rows(l2=True), dtypes, l2=True, amsgrad=True, zero_grads=True)


@pytest.mark.parametrize("dtypes", [*HOMOGENEOUS, (BF16, F32, F32)], ids="-".join)
def test_unaligned(dtypes: Dtypes) -> None:
    # One slot in turn lies beside a 16-byte boundary, then all do.
    rng = np.random.default_rng(2)
    sizes = [THREADS + 17, 33, THREADS + 17, 33, THREADS + 17, TILE + 1]
    tensors = [random_slots(rng, numel, dtypes, False, ema=True) for numel in sizes]
    check(
        tensors,
        make_rows(l2=False),
        dtypes,
        l2=False,
        amsgrad=False,
        misplaced=lambda tensor, slot: tensor + 1 if tensor in (slot, 5) else 0,
        ema=True,
        zero_grads=True,
    )


@pytest.mark.skipif(not engine.interpreted(), reason="watches the interpreter")
def test_alignment_is_promised_only_where_it_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    update_range = update.update_range
    promised = []

    def watch(slots: Any, source: Any, begin: Any, end: Any, *rest: Any) -> None:
        *_, layout, aligned = rest
        promised.append(aligned)
        if aligned:
            assert int(end.handle.data[0]) % 16 == 0
            for slot, dtype in zip(slots, layout.DTYPES, strict=True):
                offset = int(begin.handle.data[0]) * dtype.primitive_bitwidth // 8
                assert (int(slot.handle.data[0]) + offset) % 16 == 0
        update_range(slots, source, begin, end, *rest)

    monkeypatch.setattr(update, "update_range", watch)
    dtypes = (BF16, F32, BF16)
    rng = np.random.default_rng(8)
    check(
        [random_slots(rng, 33, dtypes, True, ema=True) for _ in range(7)],
        make_rows(l2=False),
        dtypes,
        l2=False,
        amsgrad=True,
        misplaced=lambda tensor, slot: int(slot == tensor),  # the last tensor lies right
        ema=True,
    )
    assert promised.count(True) == 1


@all_variants
@all_combinations
def test_special_values(dtypes: Dtypes, l2: bool, amsgrad: bool) -> None:
    rng = np.random.default_rng(3)
    tensors = [
        [rng.choice(special_values(dtype), TILE) for dtype in slot_dtypes(dtypes, amsgrad, True)]
        for _ in range(len(EMA_WEIGHTS))
    ]
    first, second, *rows = make_rows(l2)
    second = second._replace(hyperparameters=second.hyperparameters | {"eps": 0.0})
    check(tensors, [first, second, *rows], dtypes, l2, amsgrad, ema=True, zero_grads=True)


@pytest.mark.parametrize("grad_factor", [0.0, np.inf, np.nan])
def test_factor_of_gradients_that_are_not_finite(grad_factor: float) -> None:
    # Clipping makes a factor of 0 of an infinite norm, and a NaN of a NaN.
    dtypes = (F32, BF16, F32)
    slots = [special_values(dtype) for dtype in slot_dtypes(dtypes, False)]
    check([slots], [Row(LOUD, grad_factor)], dtypes, l2=False, amsgrad=False)


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
    table = np.array([[scale, 1, 0, 0]], np.float32)
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
    table = coefficients([Row(LOUD)])
    update.update_kernel[(2,)](
        torch.tensor(chunks, dtype=torch.int32, device=DEVICE),
        torch.tensor([record], device=DEVICE),
        torch.from_numpy(table).to(DEVICE),
        **update.constants(
            ADAM,
            (False, False, False),
            table.shape[1] - update.PASS_COEFFICIENTS.value,
            formats.layout(formats.Format(F32, F32, F32), states=2),
        ),
        **update.COMPILE_OPTIONS,
    )
    wanted = stepped(slots, [F32] * 4, Row(LOUD), amsgrad=False, ema=False, zero_grads=False)
    for i, (slot, want) in enumerate(zip(placed, wanted, strict=True)):
        assert_same(slot.read(), want, F32, f"slot {i}")


def test_chunk_table_lists_every_tile_once() -> None:
    numels = [0, 1, TILE, TILE + 1, 0, 3 * TILE - 1, 0]
    found = tables.chunk_table(np.array(numels).tobytes(), TILE, DEVICE).tolist()
    assert found == [[i, tile] for i, n in enumerate(numels) for tile in range(-(-n // TILE))]
    huge = tables.chunk_table(np.array([1 << 33]).tobytes(), TILE, DEVICE)
    assert huge[-1, 1] == (1 << 33) // TILE - 1


@pytest.mark.parametrize("tensors", [0, 2])
def test_nothing_to_do(tensors: int) -> None:
    table = coefficients([Row(LOUD)])
    triton_kernels.launch(
        triton_kernels.TensorList(
            torch.zeros(tensors, 4, dtype=torch.int64),
            torch.zeros(tensors, dtype=torch.int64),
            torch.zeros(tensors, dtype=torch.int32),
        ),
        torch.from_numpy(table),
        zero_grads=True,
        rule=ADAM,
        options=(False, False, False),
        format=triton_kernels.Format(F32, F32, F32),
        device=DEVICE,
    )


def bucket(slots: list[Placed], numel: int, row: Row, ema: bool, zero_grads: bool) -> Any:
    """A stand-in for what the extension hands out, its arrays read-only."""
    addresses = np.array([[slot.address for slot in slots]], np.int64)
    arrays: dict[str, Array] = {
        "addresses": addresses[:, :-1] if ema else addresses,
        "emas": addresses[:, -1] if ema else np.empty(0, np.int64),
        "scales": np.empty(0, np.int64),
        "numels": np.array([numel], np.int64),
        "rows": np.zeros(1, np.int32),
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
        beside="",
        stochastic=False,
        zero_grads=zero_grads,
        **arrays,
    )


@pytest.mark.parametrize(("ema", "zero_grads"), [(False, False), (True, False), (False, True)])
@pytest.mark.filterwarnings("error")
def test_engine_adapter(ema: bool, zero_grads: bool) -> None:
    assert engine.unavailable_reason() is None
    rng = np.random.default_rng(6)
    dtypes = (BF16, F32, F32)
    slots = random_slots(rng, 100, dtypes, True, ema)
    slots[1][:2] = np.inf, np.nan
    placed = [Placed(stored) for stored in slots]
    engine.run(bucket(placed, 100, Row(LOUD), ema, zero_grads), DEVICE)
    names = slot_dtypes(dtypes, True, ema)
    wanted = stepped(slots, names, Row(LOUD), True, ema, zero_grads)
    for i, (slot, want, dtype) in enumerate(zip(placed, wanted, names, strict=True)):
        assert_same(slot.read(), want, dtype, f"slot {i}")


@pytest.mark.skipif(not engine.interpreted(), reason="Triton compiles here")
def test_engine_refuses_the_wrong_device() -> None:
    with pytest.raises(RuntimeError, match="does not work on tensors on cuda:0"):
        engine_for("triton", torch.device("cuda:0"))


def test_reason_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine.unavailable_reason() == "torch finds no GPU, and TRITON_INTERPRET=1 is not set"
