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

from .beside import join, split
from .codes import BLOCK as CODE_BLOCK
from .codes import decode, encode
from .formats import Format, Layout, layout
from .random import draw_shared, draw_shared_at, narrow_randomly, word_of_state
from .storage import narrow, widen
from .tables import TensorList, chunk_table, load_scalars, resident, table_memory

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

# The arrays of a tensor, in the order of its record. After the states come what is beside the param
# and its moving average, where there are any.
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
def positions(BLOCK: tl.constexpr, CODED: tl.constexpr):
    """The numbers from 0 to BLOCK: [BLOCK], or with codes [blocks of them, CODE_BLOCK]."""
    if CODED:
        first = tl.arange(0, BLOCK // CODE_BLOCK) * CODE_BLOCK
        return first[:, None] + tl.arange(0, CODE_BLOCK)[None, :]
    else:  # noqa: RET505 (Triton compiles what follows a return)
        return tl.arange(0, BLOCK)


@triton.jit
def update_range(
    addresses,
    source,
    begin,
    end,
    coefficients,
    rule: tl.constexpr,
    OPTIONS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates elements [begin, end): at most TILE that are ALIGNED, or THREADS that are not.

    Args:
        addresses: of the arrays, then of the scales of coded states.
        source: of random bits, where there are any: key, index of the first element in the whole
            tensor; with runs what `TensorList` has of them.
        begin: int64; with codes a multiple of CODE_BLOCK.
        end: int64; with codes and ALIGNED too.
        coefficients: see `update_kernel`.
        rule: see `update_kernel`.
        OPTIONS: see `update_kernel`.
        LAYOUT: see `update_kernel`.
        ALIGNED: whether all arrays begin at multiples of 16 bytes.
    """
    BLOCK: tl.constexpr = TILE if ALIGNED else THREADS
    CODED: tl.constexpr = len(LAYOUT.KINDS) > 0
    ARRAYS: tl.constexpr = len(LAYOUT.DTYPES)
    EMA: tl.constexpr = ARRAYS - LAYOUT.EMA
    BESIDE: tl.constexpr = EMA - (LAYOUT.BESIDE != "")
    STATES: tl.constexpr = BESIDE - FIRST_STATE
    RULE_END: tl.constexpr = len(coefficients) - PASS_COEFFICIENTS

    position = positions(BLOCK, CODED)
    index = begin + position
    inside = index < end
    pointers = ()
    stored = ()
    for k in tl.static_range(ARRAYS):
        pointer = addresses[k].to(tl.pointer_type(LAYOUT.DTYPES[k]))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)  # which nothing read from a table can tell Triton
        pointers = pointers + (pointer + index,)
        stored = stored + (tl.load(pointers[k], inside),)

    kept = stored[BESIDE] if LAYOUT.BESIDE != "" else None
    param = join(stored[PARAM], kept, LAYOUT.BESIDE)
    grad = widen(stored[GRAD]) * coefficients[RULE_END]
    scales = ()
    states = ()
    if CODED:
        block = begin // CODE_BLOCK + tl.arange(0, BLOCK // CODE_BLOCK)
        is_block = block * CODE_BLOCK < end
    for k in tl.static_range(STATES):
        if CODED:
            scales = scales + (addresses[ARRAYS + k].to(tl.pointer_type(tl.float32)) + block,)
            scale = tl.load(scales[k], is_block)
            states = states + (decode(stored[FIRST_STATE + k], scale, LAYOUT.KINDS[k]),)
        else:
            states = states + (widen(stored[FIRST_STATE + k]),)

    param, states = rule(param, grad, states, coefficients[:RULE_END], OPTIONS)

    random = None
    if LAYOUT.DRAWS:
        BITS: tl.constexpr = 16 if LAYOUT.STOCHASTIC else 8
        step = coefficients[RULE_END + 2].to(tl.uint32, bitcast=True)
        if LAYOUT.RUNS:
            number = source[1] + index + index // source[2] * (source[3] - source[2])
            word, place = draw_shared_at(source[0], step, number, BITS)
        else:
            word, place = draw_shared(source[0], step, source[1] + begin, position, BITS)
        random = word >> place & ((1 << BITS) - 1)

    if LAYOUT.STOCHASTIC:
        stored_param = narrow_randomly(param, random)
    elif LAYOUT.BESIDE == "":
        stored_param = narrow(param, LAYOUT.DTYPES[PARAM])
    else:
        stored_param, kept = split(param, random, LAYOUT.DTYPES[PARAM], LAYOUT.BESIDE)
        tl.store(pointers[BESIDE], kept, inside)
    tl.store(pointers[PARAM], stored_param, inside)
    for k in tl.static_range(STATES):
        if CODED:
            state, scale = encode(states[k], inside, LAYOUT.KINDS[k])
            tl.store(scales[k], scale, is_block)
        elif LAYOUT.STOCHASTIC and LAYOUT.DTYPES[FIRST_STATE + k] == tl.bfloat16:
            random = word_of_state(word, k) >> place & 0xFFFF
            state = narrow_randomly(states[k], random)
        else:
            state = narrow(states[k], LAYOUT.DTYPES[FIRST_STATE + k])
        tl.store(pointers[FIRST_STATE + k], state, inside)
    if LAYOUT.EMA:
        param = join(stored_param, kept, LAYOUT.BESIDE)
        tl.store(pointers[EMA], averaged(stored[EMA], param, coefficients[RULE_END + 1]), inside)
    if LAYOUT.ZERO_GRADS:
        tl.store(pointers[GRAD], tl.zeros(index.shape, LAYOUT.DTYPES[GRAD]), inside)


# The alignment of a table says nothing about that of the tensors it lists.
@triton.jit(do_not_specialize_on_alignment=["chunks", "tensors", "coefficients"])
def update_kernel(
    chunks,
    tensors,
    coefficients,
    rule: tl.constexpr,
    OPTIONS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Updates one tile of one tensor.

    Args:
        chunks: int32 [programs, 2]: index of the tensor, index of the tile in it.
        tensors: int64 [tensors, words]: addresses of the arrays and of the scales of coded states,
            number of elements, row; where there are random bits, key and index of the first
            element in the whole tensor; with runs their length and distance.
        coefficients: float32 [rows, COEFFICIENTS + PASS_COEFFICIENTS]: those of the rule, then
            those of the pass.
        rule: see `rules`.
        OPTIONS: passed on to the rule.
        COEFFICIENTS: how many the rule takes.
        LAYOUT: a `Layout`.
    """
    chunk = chunks + 2 * tl.program_id(0)
    tensor = tl.load(chunk).to(tl.int64)
    begin = tl.load(chunk + 1).to(tl.int64) * TILE

    ARRAYS: tl.constexpr = len(LAYOUT.DTYPES)
    ADDRESSES: tl.constexpr = ARRAYS + len(LAYOUT.KINDS)
    SOURCE: tl.constexpr = 2 * LAYOUT.DRAWS + 2 * LAYOUT.RUNS
    record = tensors + tensor * (ADDRESSES + 2 + SOURCE)
    addresses = load_scalars(record, ADDRESSES)
    numel = tl.load(record + ADDRESSES)
    row = tl.load(record + ADDRESSES + 1)
    source = load_scalars(record + ADDRESSES + 2, SOURCE)
    COLUMNS: tl.constexpr = COEFFICIENTS + PASS_COEFFICIENTS
    scalars = load_scalars(coefficients + row * COLUMNS, COLUMNS)

    address_bits = addresses[0]
    for k in tl.static_range(1, ARRAYS):
        address_bits = address_bits | addresses[k]

    # Aligned memory goes by 16-byte accesses, which a mask keeps whole when it ends at a multiple
    # of 16 elements, or of a block of codes. What is left, fewer elements than that at the end of a
    # tensor or all of an unaligned one, goes an element a thread. The branch is the same for all
    # threads of a program, and costs less than a launch for each kind would.
    WHOLE: tl.constexpr = CODE_BLOCK if len(LAYOUT.KINDS) > 0 else 16
    end = tl.minimum(begin + TILE, numel)
    rest = begin
    if address_bits % 16 == 0:
        rest = tl.multiple_of(end // WHOLE * WHOLE, WHOLE)
        update_range(addresses, source, begin, rest, scalars, rule, OPTIONS, LAYOUT, True)
    while rest < end:
        update_range(addresses, source, rest, end, scalars, rule, OPTIONS, LAYOUT, False)
        rest += THREADS


def constants(
    rule: Any,
    options: tuple[bool, ...],
    coefficients: int,
    compiled_for: Layout,
) -> dict[str, Any]:
    """What `update_kernel` is compiled for.

    Args:
        rule: see `launch`.
        options: see `launch`.
        coefficients: how many the rule takes.
        compiled_for: the layout of the format.
    """
    return {
        "rule": rule,
        "OPTIONS": options,
        "COEFFICIENTS": coefficients,
        "LAYOUT": compiled_for,
    }


def launch(
    tensors: TensorList,
    coefficients: torch.Tensor,
    *,
    zero_grads: bool,
    rule: Any,
    options: tuple[bool, ...],
    format: Format,
    device: torch.device,
) -> None:
    """Applies a rule to every tensor of a list, in place and in one launch.

    It goes to torch's current stream of the device and leaves the current device as it was. The
    tables are given in host memory; one copy, which the host does not wait for, takes them to the
    device.

    Args:
        tensors: the list.
        coefficients: float32 [rows, coefficients + 3], the columns in the order the rule has them,
            then what the gradient is multiplied by, the weight of the param in its average, and the
            bits of the number of steps taken before this one.
        zero_grads: whether the gradients are overwritten with zeros.
        rule: a Triton function of `rules`.
        options: what the rule is compiled for; see its OPTIONS.
        format: how the tensors live in memory.
        device: where they are: a GPU, or the CPU in Triton's interpreter.
    """
    if not torch.any(tensors.numels):
        return  # a grid cannot be empty
    chunks = chunk_table(tensors.numels.numpy().tobytes(), TILE.value, device)

    columns = tensors.columns()
    record = sum(column.shape[1] for column in columns)
    words = len(tensors.numels) * record
    table = table_memory(words + (coefficients.numel() + 1) // 2, device)  # two float32 in a word
    torch.cat(columns, dim=1, out=table[:words].view(-1, record))
    flat = coefficients.reshape(-1)
    table[words:].view(torch.float32)[: len(flat)] = flat

    states = tensors.addresses.shape[1] - FIRST_STATE.value
    rule_coefficients = coefficients.shape[1] - PASS_COEFFICIENTS.value
    runs, emas = tensors.runs is not None, tensors.emas is not None
    compiled_for = layout(format, states, runs, emas, zero_grads)
    with resident(chunks, table, device) as table:
        update_kernel[(len(chunks),)](
            chunks,
            table,
            table[words:].view(torch.float32),
            **constants(rule, options, rule_coefficients, compiled_for),
            **COMPILE_OPTIONS,
        )
