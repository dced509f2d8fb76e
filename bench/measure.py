"""Measures a case: starts and checks everyone, and times them in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench.cases import CUDA, SCALING_KINDS, Case, draw, make_params
from bench.check import Sample
from bench.contenders import Contender, Started
from bench.footprint import bytes_per_param, extra_bytes
from bench.launches import count_launches
from bench.memory import copies, fitted, stream_bytes
from bench.results import DIFFERENT, FAILED, LEFT_OUT, TIMED, Result, Row
from bench.rules import Rule
from bench.stream import streams
from bench.timing import Call, Series, in_turns, interleave, median, time_block, warm_up

# A case whose rounds are slow gets fewer of them, to end within so many seconds.
CASE_SECONDS, LEAST_ROUNDS = 60.0, 3


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: samples of each contender; a third for a point of a scaling plot.
        block_seconds: least length of a sample.
        most_elements: larger cases are cut to this, scaling plots end there.
    """

    rounds: int = 15
    block_seconds: float = 0.05
    most_elements: float = math.inf


@dataclass
class Lineup:
    """Who takes part.

    Attributes:
        contenders: our first engine first.
        graphs: those whose step is replayed as a CUDA graph, too; under names of their own.
        crashed: how contenders ended a process when they were tried; they are not started here.
    """

    contenders: Sequence[Contender]
    graphs: Sequence[Contender] = ()
    crashed: Mapping[str, str] = field(default_factory=dict)


class HostTimes:
    """Host time on a CPU: that of a step over as many tensors, of one element each.

    What is left when there is next to nothing to compute. Of a task, it depends on the number of
    tensors alone and is measured once for each.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str, int, torch.dtype], float] = {}

    def seconds(self, contender: Contender, rule: Rule, case: Case) -> float:
        """Of a step; the median of a few blocks."""
        key = case.task.name, contender.name, rule.name, case.tensors, case.dtype
        if key not in self._known:
            cpu = torch.device("cpu")
            ones = Case(case.name, ((1,),) * case.tensors, contender.dtype or case.dtype)
            params = make_params(ones, cpu)
            step, before = contender.start(params).step, case.task.before(params)
            for _ in range(3):
                step()
            first = time_block(step, 1, cpu, before).wall
            blocks, repeats = (1, 1) if first > 0.1 else (5, max(1, int(5e-3 / first)))
            samples = [time_block(step, repeats, cpu, before).wall / repeats for _ in range(blocks)]
            self._known[key] = median(samples)
        return self._known[key]


@dataclass
class _Calls:
    """What is to be timed.

    Attributes:
        before: called before each, if anything is.
        calls: by the names of the contenders.
        keep: what they need alive.
    """

    before: Call | None
    calls: dict[str, Call] = field(default_factory=dict)
    keep: list[Started] = field(default_factory=list)


@dataclass
class Measurement:
    """Measures cases one after another.

    Attributes:
        settings: how.
        on_status: told what is going on while nothing is timed.
        on_round: called after every round.
    """

    settings: Settings
    on_status: Callable[[str], object] = lambda text: None
    on_round: Callable[[], object] = lambda: None
    _hosts: HostTimes = field(default_factory=HostTimes)

    def run(self, result: Result, lineup: Lineup) -> None:
        """Measures a case. What is known when it is interrupted is in the result.

        Args:
            result: where the rule, the case and the device are, and where everything is put.
            lineup: who takes part.
        """
        result.skipped = self._fit(result, [*lineup.contenders, *lineup.graphs])
        if result.skipped:
            return
        try:
            started = self._start_all(result, lineup)
            if started.calls:
                self._time(result, started)
        finally:
            torch.compiler.reset()
            gc.collect()
            if result.device.type == CUDA:
                torch.cuda.empty_cache()

    def _fit(self, result: Result, everyone: Sequence[Contender]) -> str:
        """Cuts the case to what is wanted and what fits; returns why it is skipped, if so."""
        case, most = result.case, self.settings.most_elements
        if case.elements > most:
            if case.kind in SCALING_KINDS:
                return f"more than {most:,} elements"
            case = case.scaled(int(most), "quick")
        result.case, why = fitted(case, result.rule, everyone, result.device)
        return why

    # --- Starting --------------------------------------------------------------------------------

    def _start_all(self, result: Result, lineup: Lineup) -> _Calls:
        """Rows for everyone, and the calls of those to time."""
        rule, case, device = result.rule, result.case, result.device
        self.on_status("drawing numbers")
        number = copies(case, rule, device)
        lists_of = {
            dtype: [make_params(replace(case, dtype=dtype), device, seed) for seed in range(number)]
            for dtype in dict.fromkeys(one.dtype or case.dtype for one in lineup.contenders)
        }
        samples = {dtype: Sample(lists[0]) for dtype, lists in lists_of.items()}
        before = case.task.before(next(iter(lists_of.values()))[0])
        found = _Calls(before)
        for contender in lineup.contenders:
            lists = lists_of[contender.dtype or case.dtype]
            sample = samples[contender.dtype or case.dtype]
            self.on_status(f"starting {contender.name}")
            row = Row(contender.name, contender.ours, against=contender.against)
            result.rows.append(row)
            if contender.name in lineup.crashed:
                row.give_up(FAILED, lineup.crashed[contender.name])
                continue
            try:
                call = self._start(result, contender, row, lists, sample, found.before)
                if call is not None:
                    self._warm_up(row, call, device, found.before)
                    found.calls[row.name] = call
            except Exception as error:
                row.give_up(FAILED, error)
            if row.status in (DIFFERENT, FAILED):  # and may have left anything in the tensors
                for seed, params in enumerate(lists):
                    draw(params, seed)
        for contender in lineup.graphs:
            self.on_status(f"capturing {contender.name}")
            row = Row(contender.name, contender.ours)
            result.rows.append(row)
            try:
                params = lists_of[contender.dtype or case.dtype][0]
                started, replay = _captured(contender, params)
                row.bytes_per_param = bytes_per_param(started, rule, params)
                self._warm_up(row, replay, device, found.before)
            except Exception as error:
                row.give_up(LEFT_OUT, error)
            else:
                found.calls[row.name] = replay
                found.keep.append(started)
        return found

    def _start(
        self,
        result: Result,
        contender: Contender,
        row: Row,
        lists: Sequence[list[Tensor]],
        sample: Sample,
        before: Call | None,
    ) -> Call | None:
        """Starts a contender on every copy of the list; its step, or None if it is not timed."""
        rule, device, task = result.rule, result.device, result.case.task
        if contender.most_tensors is not None and len(lists[0]) > contender.most_tensors:
            row.give_up(
                LEFT_OUT, f"{contender.why_most}; tried for at most {contender.most_tensors}"
            )
            return None
        if min(param.numel() for param in lists[0]) < contender.least_elements:
            row.give_up(
                LEFT_OUT, f"{contender.why_least}; tried from {contender.least_elements:,} elements"
            )
            return None
        started, row.check = task.start_checked(contender, rule, lists[0], sample, before)
        if not row.check.passed:
            row.give_up(DIFFERENT, row.check)
            return None
        others = [contender.start(params) for params in lists[1:]]
        for other in others:
            other.step()
        row.bytes_per_param = task.bytes_per_param(started, contender, rule, lists[0])
        row.launches = count_launches(
            started, contender.ours, device, norms=task.norms, updates=task.updates
        )
        row.extra_bytes = extra_bytes(started, device)
        if device.type != CUDA and contender.most_tensors is None:
            row.host_seconds = self._hosts.seconds(contender, rule, result.case)
        return in_turns([one.step for one in (started, *others)])

    def _warm_up(self, row: Row, call: Call, device: torch.device, before: Call | None) -> None:
        row.series = Series(warm_up(call, device, self.settings.block_seconds, before))

    # --- Timing ----------------------------------------------------------------------------------

    def _time(self, result: Result, started: _Calls) -> None:
        """Times the contenders, and the streams between them."""
        rule, case, device, calls = result.rule, result.case, result.device, started.calls
        before = dict.fromkeys(calls, started.before) if started.before is not None else {}
        series = {row.name: row.series for row in result.rows if row.series is not None}
        result.stream_bytes = stream_bytes(case, rule, device)
        if result.stream_bytes:
            self.on_status("starting the streams")
            passes = streams(
                result.stream_bytes,
                device,
                copies(case, rule, device),
                only_reads=case.task.only_reads,
            )
            for name, call in passes.items():
                repeats = warm_up(call, device, self.settings.block_seconds)
                result.streams[name] = Series(repeats)
            calls, series = {**calls, **passes}, {**series, **result.streams}
        wanted = self.settings.rounds
        if case.kind in SCALING_KINDS:
            wanted = max(LEAST_ROUNDS, wanted // 3)
        seconds = sum(
            time_block(call, series[name].repeats, device, before.get(name)).wall
            for name, call in calls.items()
        )
        result.rounds = min(wanted, max(LEAST_ROUNDS, int(CASE_SECONDS / seconds)))
        self.on_status("")
        rows = {row.name: row for row in result.rows}
        try:
            interleave(
                calls,
                series,
                device,
                result.rounds,
                before,
                on_round=self.on_round,
                on_error=lambda name, error: rows[name].give_up(FAILED, error),
            )
        finally:
            for row in result.rows:
                if row.timed:
                    row.status = TIMED


def _captured(contender: Contender, params: list[Tensor]) -> tuple[Started, Call]:
    """A step as a CUDA graph, and the call that replays it.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    started = contender.start(params)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated or compiled at first is not to be captured
        for _ in range(3):
            started.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        started.step()
    return started, graph.replay
