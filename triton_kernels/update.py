"""One kernel over a whole list of tensors: look up, load, apply a rule, store. It knows no rule."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton does not unpack tuples)

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .storage import narrow, widen

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

STORAGE_DTYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}

# The arrays of a tensor, in the order of an address table.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST_STATE = tl.constexpr(2)


@triton.jit
def load_scalars(pointer, COUNT: tl.constexpr):
    """COUNT neighbouring scalars as a tuple."""
    scalars = ()
    for k in tl.static_range(COUNT):
        scalars = scalars + (tl.load(pointer + k),)
    return scalars


@triton.jit
def update_range(
    slots,
    begin,
    end,
    coefficients,
    rule: tl.constexpr,
    OPTIONS: tl.constexpr,
    DTYPES: tl.constexpr,
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

    param, states = rule(values[PARAM], values[GRAD], values[FIRST_STATE:], coefficients, OPTIONS)

    tl.store(pointers[PARAM], narrow(param, DTYPES[PARAM]), inside)
    for k in tl.static_range(FIRST_STATE, len(DTYPES)):
        tl.store(pointers[k], narrow(states[k - FIRST_STATE], DTYPES[k]), inside)


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
):
    """Updates one tile of one tensor.

    Args:
        chunks: int32 [programs, 2]: index of the tensor, index of the tile in it.
        tensors: int64 [tensors, slots + 2]: address of each slot, number of elements, row.
        coefficients: float32 [rows, COEFFICIENTS].
        rule: see `rules`.
        OPTIONS: passed on to the rule.
        DTYPES: storage dtype of each slot: param, grad, then the states.
        COEFFICIENTS: how many the rule takes.
    """
    chunk = chunks + 2 * tl.program_id(0)
    tensor = tl.load(chunk).to(tl.int64)
    begin = tl.load(chunk + 1).to(tl.int64) * TILE

    SLOTS: tl.constexpr = len(DTYPES)
    record = tensors + tensor * (SLOTS + 2)
    slots = load_scalars(record, SLOTS)
    numel = tl.load(record + SLOTS)
    row = tl.load(record + SLOTS + 1)
    scalars = load_scalars(coefficients + row * COEFFICIENTS, COEFFICIENTS)

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
        update_range(slots, begin, rest, scalars, rule, OPTIONS, DTYPES, True)
    while rest < end:
        update_range(slots, rest, end, scalars, rule, OPTIONS, DTYPES, False)
        rest += THREADS


@functools.lru_cache(maxsize=32)
def chunk_table(numels: bytes, device: torch.device) -> torch.Tensor:
    """The tiles of a list of tensors, which is the same step after step and so is kept.

    Args:
        numels: elements of each tensor, as the bytes of int64 numbers.
        device: where the table is to be.

    Returns:
        int32 [tiles, 2]: index of the tensor, index of the tile in it.
    """
    tiles = (
        torch.frombuffer(bytearray(numels), dtype=torch.int64) + (TILE.value - 1)
    ) // TILE.value
    tensor = torch.repeat_interleave(tiles)
    first = tiles.cumsum(0) - tiles
    tile = torch.arange(len(tensor)) - first[tensor]
    # The host waits for this copy, so that any stream may use the table later.
    return torch.stack((tensor, tile), dim=1).to(torch.int32).to(device)


def constants(
    rule: Any,
    options: tuple[bool, ...],
    dtypes: tuple[str, str, str],
    slots: int,
    coefficients: int,
) -> dict[str, Any]:
    """What `update_kernel` is compiled for. Takes `launch`'s arguments and the sizes of its lists.

    Args:
        rule: see `launch`.
        options: see `launch`.
        dtypes: see `launch`.
        slots: arrays of each tensor.
        coefficients: coefficients in a row.
    """
    param, grad, state = (STORAGE_DTYPES[dtype] for dtype in dtypes)
    return {
        "rule": rule,
        "OPTIONS": options,
        "DTYPES": (param, grad, *[state] * (slots - FIRST_STATE.value)),
        "COEFFICIENTS": coefficients,
    }


def launch(
    addresses: torch.Tensor,
    numels: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    *,
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
        coefficients: float32 [rows, coefficients], the columns in the order the rule has them.
        rule: a Triton function of `rules`.
        options: what the rule is compiled for; see its OPTIONS.
        dtypes: storage of param, grad and states: "float32", "bfloat16" or "float16".
        device: where the tensors are: a GPU, or the CPU in Triton's interpreter.
    """
    if not torch.any(numels):
        return  # a grid cannot be empty
    chunks = chunk_table(numels.numpy().tobytes(), device)

    tensors, slots = addresses.shape
    record = slots + 2
    on_gpu = device.type != "cpu"
    words = tensors * record + (coefficients.numel() + 1) // 2  # two float32 in a word
    table = torch.empty(words, dtype=torch.int64, pin_memory=on_gpu)
    records = table[: tensors * record].view(tensors, record)
    records[:, :slots] = addresses
    records[:, slots] = numels
    records[:, slots + 1] = rows
    flat = coefficients.reshape(-1)
    table[tensors * record :].view(torch.float32)[: len(flat)] = flat

    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        table = table.to(device, non_blocking=True)
        if on_gpu:  # they may have been made on another stream, which knows nothing of this launch
            chunks.record_stream(torch.cuda.current_stream())
        update_kernel[(len(chunks),)](
            chunks,
            table,
            table[tensors * record :].view(torch.float32),
            **constants(rule, options, dtypes, slots, coefficients.shape[1]),
            **COMPILE_OPTIONS,
        )
