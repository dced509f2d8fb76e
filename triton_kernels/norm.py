"""The squared norm of gradients, chunk by chunk: every sum in a fixed order, in binary64.

How a chunk is summed depends on nothing but the positions of its elements, so that every engine
gets the same bits. The square of a float32 is exact in float64.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from typing import Any

import torch
import triton
import triton.language as tl

from .storage import STORAGE_DTYPES, widen
from .tables import chunk_table, load_scalars, resident, table_memory

CHUNK = tl.constexpr(16384)
SEGMENTS = tl.constexpr(8)
LANES = tl.constexpr(32)
SEGMENT = tl.constexpr(CHUNK.value // SEGMENTS.value)
ROWS = tl.constexpr(SEGMENT.value // LANES.value)

# A program sums one chunk, and a thread two lanes of it, an element at a time: the loads of all
# rows are independent of one another, and a warp's are of neighbours.
NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
COMPILE_OPTIONS: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


@triton.jit
def square(stored):
    """The squares of a block of any storage dtype."""
    x = widen(stored).to(tl.float64)
    return x * x


@triton.jit
def add_aligned_rows(lanes, grad, index, end):
    """Adds the squares of a chunk's elements before `end`; that and the address divide by 16."""
    grad = tl.multiple_of(grad, 16)  # which nothing read from a table can tell Triton
    for k in tl.static_range(ROWS):
        offset = index + k * LANES
        lanes += square(tl.load(grad + offset, offset < end, other=0))
    return lanes


@triton.jit
def segment_sums(lanes):
    """[SEGMENTS]: sums of [SEGMENTS, LANES], always the upper half on the lower.

    Only ever two numbers are added at a time, which leaves no choice of an order.
    """
    sums = tl.reshape(lanes, [SEGMENTS, 2, 2, 2, 2, 2])
    for _ in tl.static_range(5):
        sums = tl.sum(sums, 1)
    return sums


@triton.jit
def sum_in_order(segments):
    """((s0 + s1) + s2) + ... of [8]."""
    even, odd = tl.split(tl.reshape(segments, [4, 2]))
    s04, s26 = even_and_odd(even)
    s15, s37 = even_and_odd(odd)
    s0, s4 = tl.split(s04)
    s1, s5 = tl.split(s15)
    s2, s6 = tl.split(s26)
    s3, s7 = tl.split(s37)
    return ((((((s0 + s1) + s2) + s3) + s4) + s5) + s6) + s7


@triton.jit
def even_and_odd(x):
    """The two halves of [4]: what has even indices, what has odd ones."""
    return tl.split(tl.reshape(x, [2, 2]))


# The alignment of a table says nothing about that of the tensors it lists.
@triton.jit(do_not_specialize_on_alignment=["chunks", "tensors", "partials"])
def norm_kernel(chunks, tensors, partials, DTYPE: tl.constexpr):
    """Sums the squares of one chunk of one gradient.

    Args:
        chunks: int32 [programs, 2]: index of the tensor, index of the chunk in it.
        tensors: int64 [tensors, 3]: address, number of elements, where its partials begin.
        partials: float64: the sum of each chunk.
        DTYPE: storage dtype of the gradients.
    """
    entry = chunks + 2 * tl.program_id(0)
    tensor = tl.load(entry).to(tl.int64)
    chunk = tl.load(entry + 1).to(tl.int64)
    address, numel, first = load_scalars(tensors + 3 * tensor, 3)

    begin = chunk * CHUNK
    grad = address.to(tl.pointer_type(DTYPE)) + begin
    end = tl.minimum(numel - begin, CHUNK).to(tl.int32)
    index = tl.arange(0, SEGMENTS)[:, None] * SEGMENT + tl.arange(0, LANES)[None, :]
    lanes = tl.zeros([SEGMENTS, LANES], tl.float64)

    # Aligned memory goes by 16-byte accesses, which a mask keeps whole when it ends at a multiple
    # of 16 elements. What is left, up to 15 elements in one row at the end of a tensor or all rows
    # of an unaligned one, goes by narrower ones. An element that is not there counts as zero, which
    # changes no sum of squares.
    rest = end * 0
    row = end * 0
    row_end = row + ROWS
    if address % 16 == 0:
        rest = tl.multiple_of(end // 16 * 16, 16)
        row = rest % SEGMENT // LANES
        row_end = row + (rest < end).to(tl.int32)
        lanes = add_aligned_rows(lanes, grad, index, rest)
    while row < row_end:
        offset = index + row * LANES
        lanes += square(tl.load(grad + offset, (offset >= rest) & (offset < end), other=0))
        row += 1
    tl.store(partials + first + chunk, sum_in_order(segment_sums(lanes)))


def constants(dtype: str) -> dict[str, Any]:
    """What `norm_kernel` is compiled for. Takes `launch_norm`'s argument."""
    return {"DTYPE": STORAGE_DTYPES[dtype]}


def launch_norm(
    addresses: torch.Tensor,
    numels: torch.Tensor,
    offsets: torch.Tensor,
    partials: torch.Tensor,
    *,
    dtype: str,
    device: torch.device,
) -> None:
    """Writes the sums of squares of all chunks of a list of gradients, in one launch.

    Stream, current device and tables are as in `launch` of `update`.

    Args:
        addresses: int64 [tensors]: where each gradient begins. Its elements are in one dense order.
            The address of an empty one is not used.
        numels: int64 [tensors]: elements of each gradient.
        offsets: int64 [tensors]: which of the partials is the first of each gradient, which has
            one for each CHUNK elements or part of them.
        partials: float64 on the device, to be filled; what belongs to no gradient is left alone.
        dtype: storage of all the gradients: "float32", "bfloat16" or "float16".
        device: where the tensors are: a GPU, or the CPU in Triton's interpreter.
    """
    if not torch.any(numels):
        return  # a grid cannot be empty
    chunks = chunk_table(numels.numpy().tobytes(), CHUNK.value, device)

    table = table_memory(3 * len(numels), device)
    torch.stack((addresses, numels, offsets), dim=1, out=table.view(-1, 3))
    with resident(chunks, table, device) as table:
        norm_kernel[(len(chunks),)](chunks, table, partials, **constants(dtype), **COMPILE_OPTIONS)
