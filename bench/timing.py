"""Times calls side by side: in turns, in one process, after a warm-up."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Block(NamedTuple):
    """Seconds that some calls in a row took.

    Attributes:
        wall: from before the first call until the last one's work is done.
        device: the same by the GPU's own clock (CUDA events); on a CPU the wall time.
        host: until the last call has returned; on a CPU the wall time.
    """

    wall: float
    device: float
    host: float


@dataclass
class Series:
    """Seconds a call, a number for each round: the fields of `Block`, divided by `repeats`.

    Attributes:
        repeats: calls in a row that each number is the mean of.
    """

    repeats: int
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def add(self, block: Block) -> None:
        """Appends a block's times."""
        self.wall.append(block.wall / self.repeats)
        self.device.append(block.device / self.repeats)
        self.host.append(block.host / self.repeats)

    def cut(self, rounds: int) -> None:
        """Forgets all but the first rounds."""
        for samples in (self.wall, self.device, self.host):
            del samples[rounds:]


def median(samples: Sequence[float]) -> float:
    """The median."""
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median."""
    if len(samples) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / 2 / middle


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times ours is faster: the median over rounds, whose two times are neighbours."""
    return median([y / x for x, y in zip(ours, theirs, strict=True)])


def in_turns(calls: Sequence[Call]) -> Call:
    """A call that makes the next of some calls, and begins again after the last."""
    if len(calls) == 1:
        return calls[0]
    following = itertools.cycle(calls).__next__
    return lambda: following()()


def time_block(call: Call, repeats: int, device: torch.device, before: Call | None = None) -> Block:
    """The times that `repeats` calls take, without the garbage collector.

    Several calls come after one that is not timed, which finds the caches as others left them.

    Args:
        call: what to time.
        repeats: how often it is called.
        device: where it works.
        before: called before each call, outside its time; a GPU has nothing to do when it begins.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        if repeats > 1:
            call()
        if before is None:
            return _time(call, repeats, device)
        blocks = []
        for _ in range(repeats):
            before()
            blocks.append(_time(call, 1, device))
        return Block(*map(sum, zip(*blocks, strict=True)))
    finally:
        if collected:
            gc.enable()


def _time(call: Call, repeats: int, device: torch.device) -> Block:
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wall = time.perf_counter() - start
        return Block(wall, wall, wall)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    first.record()
    for _ in range(repeats):
        call()
    host = time.perf_counter() - start
    last.record()
    last.synchronize()
    wall = time.perf_counter() - start
    return Block(wall, first.elapsed_time(last) / 1e3, host)


def warm_up(
    call: Call, device: torch.device, block_seconds: float, before: Call | None = None
) -> int:
    """Calls until nothing is new any more; returns how many calls make a block."""
    for _ in range(2):  # the first sets up, the second may still compile
        call()
    repeats = 1
    while True:
        wall = time_block(call, repeats, device, before).wall
        if wall >= block_seconds:
            return repeats
        repeats = max(repeats + 1, min(10 * repeats, int(repeats * 1.2 * block_seconds / wall)))


def interleave(
    calls: Mapping[str, Call],
    series: Mapping[str, Series],
    device: torch.device,
    rounds: int,
    before: Mapping[str, Call],
    *,
    on_round: Callable[[], object],
    on_error: Callable[[str, Exception], object],
) -> None:
    """Times calls in turns, so that what disturbs the machine falls on all of them alike.

    A round gives each of them one block. Each round begins with another one, so that none always
    follows the same. An interruption leaves the rounds that were complete.

    Args:
        calls: what to time, by name. Each is warmed up.
        series: by the same names, with the number of calls that make a block; samples are added.
        device: where they work.
        rounds: samples to add to each series.
        before: by the same names, what some calls need before each of them; see `time_block`.
        on_round: called after each round.
        on_error: told the name of a call that raised, and what; it has no more turns.
    """
    names = list(calls)
    done = 0
    try:
        for index in range(rounds):
            first = index % max(1, len(names))
            for name in names[first:] + names[:first]:
                try:
                    repeats = series[name].repeats
                    series[name].add(time_block(calls[name], repeats, device, before.get(name)))
                except Exception as error:
                    names.remove(name)
                    on_error(name, error)
            done += 1
            on_round()
    finally:
        for name in names:
            series[name].cut(done)
