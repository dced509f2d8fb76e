"""Times calls side by side: in turns, in one process, after a warm-up."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]


@dataclass
class Series:
    """Seconds a call, a number for each round.

    Attributes:
        repeats: calls in a row that each number is the mean of.
        wall: from before the first call until the last one's work is done.
        device: the same by the GPU's own clock (CUDA events); on a CPU the wall time.
        host: until the last call has returned; on a CPU the wall time.
    """

    repeats: int
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def add(self, wall: float, device: float, host: float) -> None:
        """Appends one block's times, in seconds for all its calls."""
        self.wall.append(wall / self.repeats)
        self.device.append(device / self.repeats)
        self.host.append(host / self.repeats)


def median(samples: list[float]) -> float:
    """The median."""
    return statistics.median(samples)


def spread(samples: list[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median."""
    if len(samples) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / 2 / middle


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times ours is faster: the median over rounds, whose two times are neighbours."""
    return median([y / x for x, y in zip(ours, theirs, strict=True)])


def time_block(call: Call, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds of wall, device and host time that `repeats` calls take."""
    collected = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cpu":
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            wall = time.perf_counter() - start
            return wall, wall, wall
        events: Any = torch.cuda.Event
        first, last = events(enable_timing=True), events(enable_timing=True)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        first.record()
        for _ in range(repeats):
            call()
        host = time.perf_counter() - start
        last.record()
        last.synchronize()
        wall = time.perf_counter() - start
        return wall, first.elapsed_time(last) / 1e3, host
    finally:
        if collected:
            gc.enable()


def warm_up(call: Call, device: torch.device, block_seconds: float) -> int:
    """Calls until nothing is new any more; returns how many calls make a block."""
    for _ in range(2):  # the first sets up, the second may still compile
        call()
    repeats = 1
    while True:
        wall, _, _ = time_block(call, repeats, device)
        if wall >= block_seconds:
            return repeats
        repeats = max(repeats + 1, min(10 * repeats, int(repeats * 1.2 * block_seconds / wall)))


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    block_seconds: float,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Series]:
    """Times calls in turns, so that what disturbs the machine falls on all of them alike.

    A round gives each of them one block, of at least `block_seconds`. Each round begins with
    another one, so that none always follows the same.

    Args:
        calls: what to time, by name. Each has been called before.
        device: where they work.
        rounds: numbers in each series.
        block_seconds: least length of a block.
        on_round: called after each round.
    """
    found = {name: Series(warm_up(call, device, block_seconds)) for name, call in calls.items()}
    names = list(calls)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            series = found[name]
            series.add(*time_block(calls[name], series.repeats, device))
        on_round()
    return found
