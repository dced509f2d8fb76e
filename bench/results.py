"""What was measured of a case, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from bench import timing
from bench.cases import Aim, Case
from bench.check import Check
from bench.rules import Rule
from bench.stream import limit
from bench.timing import Series, median

# What may become of a contender.
TIMED = "timed"
UNFINISHED = "unfinished"  # the run was interrupted
DIFFERENT = "different"  # it computes something else
FAILED = "failed"  # it raised or crashed
LEFT_OUT = "left out"  # it was not tried


@dataclass
class Row:
    """What was found out about one contender.

    Attributes:
        name: of the contender.
        ours: whether it is one of our engines.
        status: one of the above.
        reason: why it was not timed.
        check: its first steps against the reference.
        bytes_per_param: that a step must move, with the states that it keeps.
        launches: of a step, where that can be known.
        extra_bytes: that a step allocates for itself.
        host_seconds: on a CPU, of a step over as many tensors of one element.
        series: its samples.
        against: the rows that its time is given relative to, by what tables call them.
    """

    name: str
    ours: bool
    status: str = UNFINISHED
    reason: str = ""
    check: Check | None = None
    bytes_per_param: float | None = None
    launches: int | None = None
    extra_bytes: int | None = None
    host_seconds: float | None = None
    series: Series | None = None
    against: Mapping[str, str] = field(default_factory=dict)

    def give_up(self, status: str, reason: object) -> None:
        """Notes why it is not timed."""
        self.status, self.series = status, None
        if isinstance(reason, BaseException):
            lines = str(reason).strip().splitlines()
            reason = f"{type(reason).__name__}: {lines[0] if lines else ''}"
        self.reason = str(reason)

    @property
    def timed(self) -> bool:
        """Whether there are samples."""
        return self.series is not None and bool(self.series.wall)


@dataclass
class Result:
    """What was measured of one case with one rule; filled while it is measured.

    Attributes:
        rule, case: what; the case as it was fitted into memory.
        device: where.
        rows: a row for each contender, our first engine first.
        streams: a series for each stream; empty for cases that run from a cache.
        stream_bytes: that each stream moves.
        rounds: samples of each, if the case was not interrupted.
        skipped: why nothing was measured, if so.
    """

    rule: Rule
    case: Case
    device: torch.device
    rows: list[Row] = field(default_factory=list)
    streams: dict[str, Series] = field(default_factory=dict)
    stream_bytes: int = 0
    rounds: int = 0
    skipped: str = ""

    @property
    def aim(self) -> Aim:
        """What is aimed at; AdamW's aims say nothing of another rule."""
        return self.case.aims.get(self.device.type, Aim()) if self.rule.name == "adamw" else Aim()

    @property
    def first(self) -> Row | None:
        """Our engine that the others are compared with."""
        return next((row for row in self.rows if row.ours and row.timed), None)

    def ratio(self, row: Row) -> float | None:
        """How many times our first engine is faster than a contender."""
        first = self.first
        if first is None or first.series is None or row.series is None or not row.timed:
            return None
        return timing.ratio(row.series.wall, first.series.wall)

    def overhead(self, row: Row) -> float | None:
        """What a form of our step costs beyond the first, relative to it, where that is asked."""
        if not self.case.task.shows_overhead or not row.ours or row is self.first:
            return None
        times_as_slow = self.ratio(row)
        return None if times_as_slow is None else times_as_slow - 1

    def relative(self, row: Row) -> dict[str, float]:
        """How many times as long a contender takes as those it is held against, as timed."""
        rows = {other.name: other for other in self.rows if other.timed}
        found = {}
        for label, name in row.against.items():
            other = rows.get(name)
            if row.timed and row.series and other is not None and other.series:
                found[label] = timing.ratio(row.series.wall, other.series.wall)
        return found

    def host(self, row: Row) -> float | None:
        """Seconds of host time a step, where known."""
        if self.device.type == "cpu" or row.series is None or not row.timed:
            return row.host_seconds
        return median(row.series.host)

    def speed(self, row: Row) -> float | None:
        """Bytes a second: those that the step must move, whatever the contender moves."""
        if row.series is None or not row.timed or row.bytes_per_param is None:
            return None
        return self.case.elements * row.bytes_per_param / median(row.series.device)

    def limit(self) -> tuple[str, float] | None:
        """The stream that is the limit, and its bytes a second."""
        seconds = {name: median(s.device) for name, s in self.streams.items() if s.device}
        if not seconds:
            return None
        name, least = limit(seconds)
        return name, self.stream_bytes / least

    def of_limit(self, row: Row) -> float | None:
        """Which fraction of the limit a contender reaches."""
        speed, found = self.speed(row), self.limit()
        return speed / found[1] if speed is not None and found is not None else None
