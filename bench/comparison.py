"""Ratios between two runs: `python -m bench compare A.json B.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import BadReportError, read
from bench.timing import median, spread
from bench.units import duration

Key = tuple[str, str, str]


def _timed(report: dict[str, Any]) -> dict[Key, tuple[dict[str, Any], dict[str, Any]]]:
    """What was timed: case and contender by rule, case and contender."""
    return {
        (case["rule"], case["case"], contender["name"]): (case, contender)
        for case in report["results"]
        for contender in case["contenders"]
        if contender["samples"] and contender["samples"]["wall"]
    }


def _machine(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return machine["gpu"]["name"] if report["device"] == "cuda" else machine["cpu"]


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else may make a difference."""
    pairs = {
        "machine": (_machine(a), _machine(b)),
        "device": (a["device"], b["device"]),
        "threads": (a["threads"], b["threads"]),
        "torch": (a["versions"]["torch"], b["versions"]["torch"]),
        "quick": (a["settings"]["quick"], b["settings"]["quick"]),
    }
    return [f"{what}: {x} and {y}" for what, (x, y) in pairs.items() if x != y]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def compare(a: dict[str, Any], b: dict[str, Any]) -> Table:
    """A row for each contender of each case that both runs timed, with as many elements."""
    table = Table(title=f"A: commit {_commit(a)}, B: commit {_commit(b)}")
    table.add_column("case")
    table.add_column("contender", no_wrap=True)
    within = ("of limit A", "of limit B", "ours is, A", "ours is, B")
    for name in ("A", "±", "B", "±", "B is", *within):
        table.add_column(name, justify="right")
    timed_a, timed_b = _timed(a), _timed(b)
    last: tuple[str, str] | None = None
    for key in [key for key in timed_a if key in timed_b]:
        (case_a, in_a), (case_b, in_b) = timed_a[key], timed_b[key]
        rule, case, name = key
        label = f"{rule} {case}" if last != (rule, case) else ""
        table.add_section() if label else None
        last = rule, case
        if case_a["elements"] != case_b["elements"]:
            note = f"[dim]{case_a['elements']:,} and {case_b['elements']:,} elements[/]"
            table.add_row(label, name, note)
            continue
        walls = in_a["samples"]["wall"], in_b["samples"]["wall"]
        times = median(walls[0]) / median(walls[1])
        noise = spread(walls[0]) + spread(walls[1])
        color = "dim" if abs(times - 1) <= noise else "green" if times > 1 else "red"
        table.add_row(
            label,
            name,
            *(text for wall in walls for text in (duration(median(wall)), f"{spread(wall):.0%}")),
            f"[{color}]{times:.2f}x[/]",
            _percent(in_a["of_limit"]),
            _percent(in_b["of_limit"]),
            *(
                ""
                if x["ours"] or x["ours_times_as_fast"] is None
                else f"{x['ours_times_as_fast']:.2f}x"
                for x in (in_a, in_b)
            ),
        )
    return table


def _commit(report: dict[str, Any]) -> str:
    commit = (report["commit"] or "unknown")[:9]
    return f"{commit} with changes" if report["uncommitted_changes"] else commit


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads two reports and prints what changed from A to B."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Ratios between two runs: how many times as fast B is as A. Gray ones are "
        "within the two spreads; of those the last four columns, which compare within each run, "
        "are the ones to trust.",
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    options = parser.parse_args(arguments)
    try:
        a, b = read(options.a), read(options.b)
    except BadReportError as error:
        print(f"python -m bench compare: {error}", file=sys.stderr)
        return 2
    table = compare(a, b)
    if not table.row_count:
        print("the two runs have timed nothing in common", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for difference in _differences(a, b):
        console.print(f"[yellow]The runs differ in {difference}[/]")
    return 0
