"""What tells a kernel over a list of tensors what to do: tables, and the way to the device."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton does not unpack tuples)

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def load_scalars(pointer, COUNT: tl.constexpr):
    """COUNT neighbouring scalars as a tuple."""
    scalars = ()
    for k in tl.static_range(COUNT):
        scalars = scalars + (tl.load(pointer + k),)
    return scalars


class TensorList(NamedTuple):
    """The tensors that a kernel works on, in host memory. The address of an empty one is not used.

    Attributes:
        addresses: int64 [tensors, slots]: where the arrays of each tensor begin: param, grad, then
            the states that the rule has under its options. All arrays of a tensor that have an
            element for each of its own have them in one dense order.
        numels: int64 [tensors]: elements of each tensor.
        rows: int32 [tensors]: which row of the coefficients each tensor takes.
        besides: int64 [tensors]: what is beside each param; None: nothing is.
        emas: int64 [tensors]: float32 moving averages of the params; None: there are none.
        scales: int64 [tensors, states]: float32 scales of coded states, one for each block in the
            order of memory; None: they are not coded.
        sources: int64 [tensors, 2]: key of the random bits, index of the first element in the
            whole tensor, which a shard is a part of; None: nothing is drawn.
        runs: int64 [tensors, 2]: how many elements follow each other in the whole tensor, how far
            apart there the first ones of two such runs are; None: all follow each other.
    """

    addresses: torch.Tensor
    numels: torch.Tensor
    rows: torch.Tensor
    besides: torch.Tensor | None = None
    emas: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    runs: torch.Tensor | None = None

    def columns(self) -> list[torch.Tensor]:
        """int64 [tensors, any]: side by side they are the records of `update_kernel`."""
        columns = (
            *(self.addresses, self.besides, self.emas, self.scales),
            *(self.numels, self.rows, self.sources, self.runs),
        )
        rows = len(self.numels)
        return [column.view(rows, -1).long() for column in columns if column is not None]


@functools.lru_cache(maxsize=32)
def chunk_table(numels: bytes, elements: int, device: torch.device) -> torch.Tensor:
    """The chunks of a list of tensors, which are the same step after step and so are kept.

    Args:
        numels: elements of each tensor, as the bytes of int64 numbers.
        elements: those of a chunk; the last one of a tensor may have fewer.
        device: where the table is to be.

    Returns:
        int32 [chunks, 2]: index of the tensor, index of the chunk in it.
    """
    chunks = (torch.frombuffer(bytearray(numels), dtype=torch.int64) + (elements - 1)) // elements
    tensor = torch.repeat_interleave(chunks)
    first = chunks.cumsum(0) - chunks
    chunk = torch.arange(len(tensor)) - first[tensor]
    # The host waits for this copy, so that any stream may use the table later.
    return torch.stack((tensor, chunk), dim=1).to(torch.int32).to(device)


def table_memory(words: int, device: torch.device) -> torch.Tensor:
    """Host memory for a table of int64, from where it can be copied without waiting."""
    return torch.empty(words, dtype=torch.int64, pin_memory=device.type != "cpu")


@contextlib.contextmanager
def resident(
    chunks: torch.Tensor, table: torch.Tensor, device: torch.device
) -> Iterator[torch.Tensor]:
    """Copies a table to the device, which is the current one meanwhile, and yields the copy.

    Args:
        chunks: a `chunk_table` on the device.
        table: one in `table_memory`.
        device: where the launch is to be.
    """
    if device.type == "cpu":
        yield table
        return
    with torch.cuda.device(device):
        # They may have been made on another stream, which knows nothing of this launch.
        chunks.record_stream(torch.cuda.current_stream())
        yield table.to(device, non_blocking=True)
