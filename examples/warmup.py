"""The warm-up with which the example scripts' schedules begin."""

from __future__ import annotations

from collections.abc import Callable

from fused_adamw.schedules import LinearWarmup, Schedule, Sequential


def warmup_then(then: Callable[[int], Schedule], steps: int) -> Schedule:
    """Up over the first 5% of the steps, then as `then` makes it for the number of steps left."""
    warmup = max(1, steps // 20)
    up = LinearWarmup(total_iters=warmup - 1, eta_min=1 / warmup)
    return Sequential((up, then(max(1, steps - warmup))), (warmup,))
