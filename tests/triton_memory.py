"""Memory that the Triton kernels work on in tests, by themselves: guarded, aligned or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fused_adamw import reference
from fused_adamw.engines import triton as engine
from fused_adamw.triton_kernels import update

Array = np.ndarray[Any, Any]

DEVICE = torch.device("cpu" if engine.interpreted() else "cuda")
F32, BF16, F16 = "float32", "bfloat16", "float16"


class Placed:
    """An array copied to the device, between guard bytes that nobody may touch."""

    GUARD = 4 * update.TILE.value  # bytes: as far as a tile without a mask would reach
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


def assert_same(found: Array, wanted: Array, dtype: str, where: str) -> None:
    x, y = reference.load(found, dtype), reference.load(wanted, dtype)
    same = (x.view(np.uint32) == y.view(np.uint32)) | (np.isnan(x) & np.isnan(y))
    at = np.flatnonzero(~same)
    assert at.size == 0, f"{where}: {at.size} differ, first [{at[0]}]: {x[at[0]]!r}, {y[at[0]]!r}"


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
