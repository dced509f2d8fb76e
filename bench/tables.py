"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from bench.cases import BY_ELEMENTS, BY_TENSORS, SCALING_KINDS
from bench.environment import device_name
from bench.results import DIFFERENT, FAILED, Result, Row
from bench.timing import median, spread
from bench.units import duration, size


def _judged(text: str, aim: str, missed: bool) -> str:
    """A figure that something is aimed at: green where it is reached, else with the aim."""
    return f"[yellow]{text} ({aim})[/]" if missed else f"[green]{text}[/]"


def _row(result: Result, row: Row) -> list[str]:
    """A contender's cells, from its name on."""
    name = f"[bold]{row.name}[/]" if row.ours else row.name
    if row.series is None or not row.timed:
        color = "red" if row.status in (FAILED, DIFFERENT) else "dim"
        return [name, *[""] * 9, f"[{color}]{row.reason or row.status}[/]"]
    aim, first = result.aim, row is result.first
    speed, of_limit, host = result.speed(row), result.of_limit(row), result.host(row)
    cells = {
        "time": duration(median(row.series.wall)),
        "spread": f"{spread(row.series.wall):.0%}",
        "host": duration(host),
        "launches": "" if row.launches is None else str(row.launches),
        "extra": size(row.extra_bytes),
        "bytes": f"{row.bytes_per_param:.3g}" if row.bytes_per_param is not None else "",
        "speed": f"{speed / 1e9:.1f}" if speed is not None else "",
        "limit": f"{of_limit:.0%}" if of_limit is not None else "",
        "ratio": "" if first else f"{result.ratio(row) or math.nan:.2f}x",
    }
    if first and of_limit is not None and aim.of_limit:
        cells["limit"] = _judged(cells["limit"], f"{aim.of_limit:.0%}", of_limit < aim.of_limit)
    if first and host is not None and aim.host_us < math.inf:
        cells["host"] = _judged(cells["host"], f"{aim.host_us:g} µs", host * 1e6 > aim.host_us)
    if first and row.launches is not None and aim.launches < math.inf:
        cells["launches"] = _judged(
            cells["launches"], f"{aim.launches:g}", row.launches > aim.launches
        )
    if row.name in aim.times:
        wanted = aim.times[row.name]
        missed = (result.ratio(row) or 0.0) < wanted
        cells["ratio"] = _judged(cells["ratio"], f"{wanted:g}x", missed)
    overhead = result.overhead(row)
    notes = [] if overhead is None else [f"overhead {overhead:+.1%}"]
    notes += [f"takes {times:.2f}x {label}" for label, times in result.relative(row).items()]
    return [name, *cells.values(), "; ".join(notes)]


def cases_table(results: Sequence[Result]) -> Table:
    """A row for each contender of each case that is no point of a scaling plot."""
    rules = list(dict.fromkeys(result.rule.name for result in results))
    device = device_name(results[0].device) if results else ""
    table = Table(title=f"A step of {', '.join(rules)} on {device}")
    table.add_column("case", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    for name in ("time", "±", "host", "launches", "extra", "B/param", "GB/s", "of limit"):
        table.add_column(name, justify="right")
    table.add_column("ours is", justify="right")
    table.add_column("note")
    for result in results:
        if result.case.kind in SCALING_KINDS:
            continue
        label = result.case.name if len(rules) == 1 else f"{result.rule.name} {result.case.name}"
        rows = [_row(result, row) for row in result.rows]
        found = result.limit()
        if found:
            speed = f"{found[1] / 1e9:.1f}"
            rows.append(["[dim]the limit[/]", *[""] * 6, speed, "", "", f"[dim]{found[0]}[/]"])
        if result.skipped:
            rows.append([*[""] * 10, f"[yellow]skipped: {result.skipped}[/]"])
        if rows and result.case.note:
            rows[0][-1] = f"[yellow]{result.case.note}[/] {rows[0][-1]}"
        for index, row in enumerate(rows):
            table.add_row("" if index else label, *row, end_section=index == len(rows) - 1)
    return table


def scaling_table(results: Sequence[Result], kind: str) -> Table | None:
    """Times by number of elements or of tensors, a column for each contender."""
    points = [result for result in results if result.case.kind == kind and result.rows]
    names = list(dict.fromkeys(row.name for point in points for row in point.rows))
    if not points:
        return None
    what = {BY_ELEMENTS: "elements of one tensor", BY_TENSORS: "tensors of 1000 elements"}[kind]
    table = Table(title=f"Time by number of {what}")
    table.add_column(kind.removeprefix("by "), justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for point in points:
        rows = {row.name: row for row in point.rows}
        count = point.case.elements if kind == BY_ELEMENTS else point.case.tensors
        cells = [
            duration(median(rows[name].series.wall))  # type: ignore[union-attr]
            if name in rows and rows[name].timed
            else ""
            for name in names
        ]
        rule = "" if len({p.rule.name for p in points}) == 1 else f"{point.rule.name} "
        table.add_row(f"{rule}{count:,}", *cells)
    return table


def scaling_tables(results: Sequence[Result]) -> list[Table]:
    """Those that there is something for."""
    tables = [scaling_table(results, kind) for kind in SCALING_KINDS]
    return [table for table in tables if table is not None]
