"""The architectures that are compiled for: their limits, and one GPU of each."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
# Of every architecture below. CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; allocation units: CUDA Occupancy Calculator.
REGISTERS = 65536  # of a multiprocessor
WARPS = 64
BLOCKS = 32
REGISTER_UNIT = 256  # registers are allocated a warp at a time, so many at least
WARP_UNIT = 4  # one for each scheduler
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # bytes of each block that the system takes
# Instructions that a multiprocessor issues in a clock: one a scheduler, for a warp.
ISSUED = 4 * WARP


@dataclass(frozen=True)
class Gpu:
    """An architecture, and the GPU that estimates are for.

    The clock is that at which the vendor's rate of float32 arithmetic holds.

    Attributes:
        arch: compute capability times ten.
        shared: bytes of shared memory of a multiprocessor (same guide).
        name: of the GPU.
        multiprocessors: how many it has.
        clock: in Hz.
        bandwidth: of its memory, bytes a second, by the vendor's datasheet.
    """

    arch: int
    shared: int
    name: str
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def capability(self) -> str:
        """The compute capability: 9.0."""
        return f"{self.arch // 10}.{self.arch % 10}"

    @property
    def issue_rate(self) -> float:
        """Instructions of single threads that the GPU can issue in a second."""
        return self.multiprocessors * ISSUED * self.clock

    def resident_blocks(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that one multiprocessor holds at a time, if a grid is large enough.

        Args:
            threads: of a block.
            registers: of a thread.
            shared: bytes of shared memory of a block.
        """
        warps = -(-threads // WARP)
        registers_of_warp = max(_up(registers * WARP, REGISTER_UNIT), REGISTER_UNIT)
        warps_with_registers = REGISTERS // registers_of_warp // WARP_UNIT * WARP_UNIT
        shared_of_block = _up(shared + SHARED_RESERVED, SHARED_UNIT)
        return min(
            BLOCKS, WARPS // warps, warps_with_registers // warps, self.shared // shared_of_block
        )


# NVIDIA A100 whitepaper (108 SMs, 1410 MHz; 80 GB model: 2.04 TB/s). H100 whitepaper and H200
# datasheet (132 SMs, 1980 MHz, 67 TFLOP/s; 4.8 TB/s). HGX B200 datasheet (75 TFLOP/s of float32,
# which 148 SMs with 128 lanes give at 1980 MHz; 7.7 TB/s).
GPUS = (
    Gpu(80, 164 * 1024, "A100 SXM 80 GB", 108, 1.41e9, 2.04e12),
    Gpu(90, 228 * 1024, "H200 SXM", 132, 1.98e9, 4.8e12),
    Gpu(100, 228 * 1024, "HGX B200", 148, 1.98e9, 7.7e12),
)


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit
