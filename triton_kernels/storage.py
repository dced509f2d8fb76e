"""How numbers live in memory: widened to float32 exactly, rounded back to nearest, ties to even."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

STORAGE_DTYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on tensors in host memory, instead of on a GPU."""

# [note: bfloat16 in the interpreter]
# A GPU rounds two numbers to bfloat16 by one instruction. Triton's interpreter cuts the lower bits
# off instead, and widens denormals wrongly, so there it is spelled out in integers. On a GPU these
# would add a fifth to the instructions of a bfloat16 update.


@triton.jit
def widen(stored):
    """A block of any storage dtype as float32."""
    if INTERPRETED and stored.dtype.is_bf16():  # [note: bfloat16 in the interpreter]
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint32)
        return (bits << 16).to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """A block of float32 as a block of the storage dtype DTYPE."""
    if INTERPRETED and DTYPE.is_bf16():  # [note: bfloat16 in the interpreter]
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)  # a carry could make an infinity of a NaN
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)
