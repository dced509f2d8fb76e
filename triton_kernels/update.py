"""One kernel over a whole list of tensors: look up, load, apply a rule, store. It knows no rule.

It does the whole step in one pass: before the rule it unscales and clips the gradient, after it it
averages the parameter and zeroes the gradient, where that is asked for.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton does not unpack tuples)

from typing import Any

import torch
import triton
import triton.language as tl

from .storage import STORAGE_DTYPES, narrow, widen
from .tables import chunk_table, load_scalars, resident, table_memory

# [note: tile]
# One program updates one tile, and a thread 8 elements of it: one 16-byte access of an array of 16
# bits an element, two of 32. Adam then takes 55 to 84 registers a thread, which leaves room for 2
# to 4 tiles on an SM at a time: 64 KB of loads in flight in bfloat16, 128 KB in float32, where an
# H200 wants about 48 KB. With fewer elements a thread bfloat16 would fall to narrower accesses;
# with more, fewer tiles would fit and more of the time would pass without loads.
# Where dtypes are mixed, the loads of a tile are all under way before Triton carries results of 32
# bits through shared memory to the threads that store them.
# Nothing is tuned at run time: trial runs of a kernel that works in place would be steps.
NUM_WARPS = 8
THREADS = tl.constexpr(32 * NUM_WARPS)
TILE = tl.constexpr(8 * THREADS.value)

COMPILE_OPTIONS: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

# The arrays of a tensor, in the order of an address table. A moving average comes last.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST_STATE = tl.constexpr(2)

# What ends a row of coefficients: what the gradient is multiplied by, the weight of the average,
# and the bits of the number of steps taken, for random bits.
PASS_COEFFICIENTS = tl.constexpr(3)


@triton.jit
def averaged(ema, param, weight):
    """The exponential moving average of the parameter: torch.lerp."""
    near = ema + weight * (param - ema)
    far = param - (1 - weight) * (param - ema)
    return tl.where(weight == 1, param, tl.where(weight < 0.5, near, far))


@triton.jit
def update_range(
    slots,
    begin,
    end,
    coefficients,
    rule: tl.constexpr,
    OPTIONS: tl.constexpr,
    DTYPES: tl.constexpr,
    EMA: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates elements [begin, end): at most TILE that are ALIGNED, or THREADS that are not."""
    BLOCK: tl.constexpr = TILE if ALIGNED else THREADS
    index = begin + tl.arange(0, BLOCK)
    inside = index < end

    pointers = ()
    values = ()
    for k in tl.static_range(len(DTYPES)):
        pointer = slots[k].to(tl.pointer_type(DTYPES[k]))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)  # which nothing read from a table can tell Triton
        pointers = pointers + (pointer + index,)
        values = values + (widen(tl.load(pointers[k], inside)),)

    STATES_END: tl.constexpr = len(DTYPES) - EMA
    RULE_END: tl.constexpr = len(coefficients) - PASS_COEFFICIENTS
    grad = values[GRAD] * coefficients[RULE_END]
    states = values[FIRST_STATE:STATES_END]
    param, states = rule(values[PARAM], grad, states, coefficients[:RULE_END], OPTIONS)

    stored_param = narrow(param, DTYPES[PARAM])
    tl.store(pointers[PARAM], stored_param, inside)
    for k in tl.static_range(FIRST_STATE, STATES_END):
        tl.store(pointers[k], narrow(states[k - FIRST_STATE], DTYPES[k]), inside)
    if EMA:
        ema = averaged(values[STATES_END], widen(stored_param), coefficients[RULE_END + 1])
        tl.store(pointers[STATES_END], ema, inside)
    if ZERO_GRADS:
        tl.store(pointers[GRAD], tl.zeros([BLOCK], DTYPES[GRAD]), inside)


# The alignment of a table says nothing about that of the tensors it lists.
@triton.jit(do_not_specialize_on_alignment=["chunks", "tensors", "coefficients"])
def update_kernel(
    chunks,
    tensors,
    coefficients,
    rule: tl.constexpr,
    OPTIONS: tl.constexpr,
    DTYPES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    EMA: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
):
    """Updates one tile of one tensor.

    Args:
        chunks: int32 [programs, 2]: index of the tensor, index of the tile in it.
        tensors: int64 [tensors, slots + 2]: address of each slot, number of elements, row.
        coefficients: float32 [rows, COEFFICIENTS + 2]: those of the rule, the gradient's factor,
            the weight of the average.
        rule: see `rules`.
        OPTIONS: passed on to the rule.
        DTYPES: storage dtype of each slot: param, grad, the states, the average.
        COEFFICIENTS: how many the rule takes.
        EMA: whether the last slot is a moving average of the param.
        ZERO_GRADS: whether the gradient is overwritten with zeros.
    """
    chunk = chunks + 2 * tl.program_id(0)
    tensor = tl.load(chunk).to(tl.int64)
    begin = tl.load(chunk + 1).to(tl.int64) * TILE

    SLOTS: tl.constexpr = len(DTYPES)
    record = tensors + tensor * (SLOTS + 2)
    slots = load_scalars(record, SLOTS)
    numel = tl.load(record + SLOTS)
    row = tl.load(record + SLOTS + 1)
    COLUMNS: tl.constexpr = COEFFICIENTS + PASS_COEFFICIENTS
    scalars = load_scalars(coefficients + row * COLUMNS, COLUMNS)

    address_bits = slots[0]
    for k in tl.static_range(1, SLOTS):
        address_bits = address_bits | slots[k]

    # Aligned memory goes by 16-byte accesses, which a mask keeps whole when it ends at a multiple
    # of 16 elements. What is left, up to 15 elements at the end of a tensor or all of an unaligned
    # one, goes an element a thread. The branch is the same for all threads of a program, and costs
    # less than a launch for each kind would.
    end = tl.minimum(begin + TILE, numel)
    rest = begin
    if address_bits % 16 == 0:
        rest = tl.multiple_of(end // 16 * 16, 16)
        update_range(slots, begin, rest, scalars, rule, OPTIONS, DTYPES, EMA, ZERO_GRADS, True)
    while rest < end:
        update_range(slots, rest, end, scalars, rule, OPTIONS, DTYPES, EMA, ZERO_GRADS, False)
        rest += THREADS


def constants(
    rule: Any,
    options: tuple[bool, ...],
    dtypes: tuple[str, str, str],
    states: int,
    coefficients: int,
    ema: bool = False,
    zero_grads: bool = False,
) -> dict[str, Any]:
    """What `update_kernel` is compiled for. Takes `launch`'s arguments and the sizes of its lists.

    Args:
        rule: see `launch`.
        options: see `launch`.
        dtypes: see `launch`.
        states: how many the rule has.
        coefficients: how many the rule takes.
        ema: whether there are moving averages.
        zero_grads: see `launch`.
    """
    param, grad, state = (STORAGE_DTYPES[dtype] for dtype in dtypes)
    return {
        "rule": rule,
        "OPTIONS": options,
        "DTYPES": (param, grad, *[state] * states, *[tl.float32] * ema),
        "COEFFICIENTS": coefficients,
        "EMA": ema,
        "ZERO_GRADS": zero_grads,
    }


def launch(
    addresses: torch.Tensor,
    numels: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    emas: torch.Tensor | None,
    zero_grads: bool,
    rule: Any,
    options: tuple[bool, ...],
    dtypes: tuple[str, str, str],
    device: torch.device,
) -> None:
    """Applies a rule to every tensor of a list, in place and in one launch.

    It goes to torch's current stream of the device and leaves the current device as it was. The
    tables are given in host memory; one copy, which the host does not wait for, takes them to the
    device.

    Args:
        addresses: int64 [tensors, slots]: where the arrays of each tensor begin: param, grad, then
            the states that the rule has under these options. The arrays of a tensor have their
            elements in one dense order. The address of an empty tensor is not used.
        numels: int64 [tensors]: elements of each tensor.
        rows: int32 [tensors]: which row of the coefficients each tensor takes.
        coefficients: float32 [rows, coefficients + 2], the columns in the order the rule has them,
            then what the gradient is multiplied by and the weight of the param in its average.
        emas: int64 [tensors]: where the float32 moving average of each param begins, in the order
            of its elements; None: there is none.
        zero_grads: whether the gradients are overwritten with zeros.
        rule: a Triton function of `rules`.
        options: what the rule is compiled for; see its OPTIONS.
        dtypes: storage of param, grad and states: "float32", "bfloat16" or "float16".
        device: where the tensors are: a GPU, or the CPU in Triton's interpreter.
    """
    if not torch.any(numels):
        return  # a grid cannot be empty
    chunks = chunk_table(numels.numpy().tobytes(), TILE.value, device)

    tensors, slots = addresses.shape
    record = slots + (emas is not None) + 2
    words = tensors * record + (coefficients.numel() + 1) // 2  # two float32 in a word
    table = table_memory(words, device)
    records = table[: tensors * record].view(tensors, record)
    records[:, :slots] = addresses
    if emas is not None:
        records[:, slots] = emas
    records[:, -2] = numels
    records[:, -1] = rows
    flat = coefficients.reshape(-1)
    table[tensors * record :].view(torch.float32)[: len(flat)] = flat

    with resident(chunks, table, device) as table:
        update_kernel[(len(chunks),)](
            chunks,
            table,
            table[tensors * record :].view(torch.float32),
            **constants(
                rule,
                options,
                dtypes,
                states=slots - FIRST_STATE.value,
                coefficients=coefficients.shape[1] - PASS_COEFFICIENTS.value,
                ema=emas is not None,
                zero_grads=zero_grads,
            ),
            **COMPILE_OPTIONS,
        )
