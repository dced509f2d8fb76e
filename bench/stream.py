"""The limit that memory sets, measured in the same run: plain passes over memory.

On a GPU the limit is a copy. On a CPU a copy would be no limit: it stores to lines that it has not
read, which the processor therefore reads first, only to have them overwritten; an optimizer stores
where it has read. The limit there reads, modifies and writes in place with next to no arithmetic.
torch has no such operation that reads four arrays and writes three. So several are measured, with
fewer reads to a write than a step has (4/3) and with more, and the fastest, in bytes a second, is
the limit: a step is held against the best that any of them gets out of the memory.

What only reads, as the norm of the gradients does, is held against the fastest of passes that only
read, on either device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.timing import Call, in_turns

COPY = "copy_"
# A pass over more than this says nothing new, and takes memory from the case.
MOST_BYTES = 1 << 30
# Of memory for each byte that a pass reads or writes, at most: three arrays, four accesses; one,
# where it only reads.
MEMORY = 3 / 4
_TINY = 1e-9  # values stay as they are; nothing is skipped


def _passes(scratch: Tensor, total_bytes: int) -> dict[str, Call]:
    """Operations by name, each of which reads and writes `total_bytes` in all."""

    def arrays(count: int, accesses: int) -> tuple[Tensor, ...]:
        numel = total_bytes // (4 * accesses)
        return tuple(scratch[i * numel : (i + 1) * numel] for i in range(count))

    (negated,) = arrays(1, accesses=2)
    added_to, added = arrays(2, accesses=3)
    target, x, y = arrays(3, accesses=4)
    to, source = arrays(2, accesses=2)
    return {
        "neg_ (1 read, 1 write)": negated.neg_,
        "add_ (2 reads, 1 write)": lambda: added_to.add_(added, alpha=_TINY),
        "addcmul_ (3 reads, 1 write)": lambda: target.addcmul_(x, y, value=_TINY),
        COPY: lambda: to.copy_(source),
    }


def _reading_passes(scratch: Tensor, total_bytes: int) -> dict[str, Call]:
    """Operations by name, each of which reads `total_bytes` in all."""
    numel = total_bytes // 4
    whole = scratch[:numel]
    x, y = scratch[: numel // 2], scratch[numel // 2 : numel // 2 * 2]
    return {
        "sum (1 read)": whole.sum,
        "amax (1 read)": whole.amax,
        "dot (2 reads)": lambda: torch.dot(x, y),
    }


def streams(
    total_bytes: int, device: torch.device, copies: int = 1, *, only_reads: bool = False
) -> dict[str, Call]:
    """Operations by name, each of which reads and writes `total_bytes` in all.

    They are float32 whatever the dtype of the case: only bytes count here.

    Args:
        total_bytes: at most `MOST_BYTES`.
        device: where.
        copies: how many pieces of memory the calls take in turns.
        only_reads: whether they do nothing but read.
    """
    make = _reading_passes if only_reads else _passes
    numel = int(total_bytes * (1 if only_reads else MEMORY) / 4) + 4
    each = [make(torch.rand(numel, device=device), total_bytes) for _ in range(copies)]
    names = [name for name in each[0] if name != COPY or device.type == "cuda"]
    return {name: in_turns([passes[name] for passes in each]) for name in names}


def limit(seconds: Mapping[str, float]) -> tuple[str, float]:
    """Which stream is the limit, and its seconds, given those of each of `streams`."""
    name = COPY if COPY in seconds else min(seconds, key=lambda key: seconds[key])
    return name, seconds[name]
