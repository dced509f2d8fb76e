"""The limit that memory sets, measured in the same run: plain passes over the bytes of a step.

On a GPU the limit is a copy. On a CPU a copy would be no limit: it stores to lines that it has not
read, which the processor therefore reads first, only to have them overwritten; an optimizer stores
where it has read. The limit there reads, modifies and writes in place with next to no arithmetic.
torch has no such operation that reads four arrays and writes three. So several are measured, with
fewer reads to a write than a step has (4/3) and with more, and the fastest, in bytes a second, is
the limit: a step is held against the best that any of them gets out of the memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

COPY = "copy_"


def streams(total_bytes: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Operations by name, each of which reads and writes `total_bytes` in all.

    They are float32 whatever the dtype of the case: only bytes count here.
    """
    scratch = torch.rand(3 * (total_bytes // 16) + 4, device=device)

    def arrays(count: int, accesses: int) -> tuple[torch.Tensor, ...]:
        numel = total_bytes // (4 * accesses)
        return tuple(scratch[i * numel : (i + 1) * numel] for i in range(count))

    (negated,) = arrays(1, accesses=2)
    added_to, added = arrays(2, accesses=3)
    target, x, y = arrays(3, accesses=4)
    tiny = 1e-9  # values stay as they are; nothing is skipped
    found: dict[str, Callable[[], object]] = {
        "neg_ (1 read, 1 write)": negated.neg_,
        "add_ (2 reads, 1 write)": lambda: added_to.add_(added, alpha=tiny),
        "addcmul_ (3 reads, 1 write)": lambda: target.addcmul_(x, y, value=tiny),
    }
    if device.type == "cuda":
        to, source = arrays(2, accesses=2)
        found[COPY] = lambda: to.copy_(source)
    return found


def limit(seconds: dict[str, float], device: torch.device) -> tuple[str, float]:
    """Which stream is the limit, and its seconds.

    Args:
        seconds: of each of `streams`.
        device: where they ran.
    """
    name = COPY if device.type == "cuda" else min(seconds, key=lambda key: seconds[key])
    return name, seconds[name]
