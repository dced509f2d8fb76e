"""A kernel as it was compiled for one architecture, and what follows from its machine code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bench.kernels.gpus import WARP, WARPS, Gpu
from bench.kernels.names import Kernel
from bench.kernels.sass import Code, MainPath


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        engine: "cuda" or "triton".
        kernel: which one.
        gpu: what it is compiled for.
        ptx: the code before ptxas, of this kernel alone.
        code: the machine code.
        threads: of a block, as the kernel declares; None where it does not.
        registers: of a thread.
        stack: bytes of a thread.
        shared: bytes of a block, without what the system takes.
    """

    engine: str
    kernel: Kernel
    gpu: Gpu
    ptx: str
    code: Code
    threads: int | None
    registers: int
    stack: int
    shared: int

    def __str__(self) -> str:
        return f"{self.engine}-{self.kernel}-sm{self.gpu.arch}"

    @property
    def path(self) -> MainPath | None:
        """The main path; None for a kernel without wide accesses, or that tells dtypes apart.

        The ways of arrays of different dtypes through such a kernel are not told apart here.
        """
        return self.code.main_path if self.kernel.dtypes else None

    @property
    def resident_blocks(self) -> int | None:
        """Blocks on a multiprocessor at a time."""
        if self.threads is None:
            return None
        return self.gpu.resident_blocks(self.threads, self.registers, self.shared)

    @property
    def occupancy(self) -> float | None:
        """The part of a multiprocessor's warps that can be resident."""
        if self.threads is None or self.resident_blocks is None:
            return None
        return self.resident_blocks * -(-self.threads // WARP) / WARPS

    @cached_property
    def elements(self) -> int | None:
        """Elements that a thread updates in one pass of the main path.

        What is loaded is stored again, but for the gradient: so the difference is the gradient.
        """
        if self.path is None:
            return None
        grad = self.kernel.widths[1]
        elements, rest = divmod(self.path.bytes("load") - self.path.bytes("store"), grad)
        return elements if elements > 0 and rest == 0 else None

    @property
    def states(self) -> int | None:
        """Arrays of states; None unless the wide accesses move every array, whole and once."""
        if self.elements is None or self.path is None:
            return None
        param, grad, state = self.kernel.widths
        moved = self.path.bytes("load") - self.elements * (param + grad)
        states, rest = divmod(moved, self.elements * state)
        return states if states >= 0 and rest == 0 else None

    @property
    def bytes_per_param(self) -> float | None:
        """Bytes loaded and stored an element."""
        if self.elements is None or self.path is None:
            return None
        return (self.path.bytes("load") + self.path.bytes("store")) / self.elements

    @property
    def instructions_per_param(self) -> float | None:
        """Instructions of the main path an element."""
        if self.elements is None or self.path is None:
            return None
        return self.path.operations.total() / self.elements

    @property
    def bytes_in_flight(self) -> int | None:
        """Bytes that the resident threads of a multiprocessor wait for at a time."""
        if self.threads is None or self.resident_blocks is None or self.path is None:
            return None
        return self.resident_blocks * self.threads * self.path.under_way

    @property
    def memory_bound_to(self) -> float | None:
        """The bandwidth at which issuing the instructions takes as long as moving the bytes.

        Bytes a second. An upper estimate: it takes every scheduler to issue in every clock.
        """
        if self.bytes_per_param is None or self.instructions_per_param is None:
            return None
        return self.bytes_per_param * self.gpu.issue_rate / self.instructions_per_param
