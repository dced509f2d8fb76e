"""The JSON file of a run: the machine, versions, commit, settings and every sample."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.check import Check
from bench.results import Result, Row

SCHEMA = 2


class BadReportError(Exception):
    """A file that is no report of this version, with what is wrong with it."""


def _check(check: Check) -> dict[str, Any]:
    """An error that is infinite or NaN, which JSON does not know, is null."""
    error = check.error if math.isfinite(check.error) else None
    return {"error": error, "tolerance": check.tolerance}


def _row(row: Row, result: Result) -> dict[str, Any]:
    return {
        "name": row.name,
        "ours": row.ours,
        "status": row.status,
        "reason": row.reason,
        "check": _check(row.check) if row.check else None,
        "bytes_per_param": row.bytes_per_param,
        "launches": row.launches,
        "extra_bytes": row.extra_bytes,
        "host_seconds": result.host(row),
        "of_limit": result.of_limit(row),
        "ours_times_as_fast": result.ratio(row),
        "overhead": result.overhead(row),
        "times_as_long_as": result.relative(row),
        "samples": asdict(row.series) if row.series else None,
    }


def as_json(result: Result) -> dict[str, Any]:
    """A case with all samples; times in seconds."""
    case, limit = result.case, result.limit()
    return {
        "rule": result.rule.name,
        "case": case.name,
        "task": case.task.name,
        "kind": case.kind,
        "note": case.note,
        "cold": case.cold,
        "tensors": case.tensors,
        "elements": case.elements,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rounds": result.rounds,
        "skipped": result.skipped,
        "limit": {"stream": limit[0], "bytes_per_second": limit[1]} if limit else None,
        "stream_bytes": result.stream_bytes,
        "streams": {name: asdict(series) for name, series in result.streams.items()},
        "contenders": [_row(row, result) for row in result.rows],
    }


def write(path: Path, head: dict[str, Any], results: Sequence[Result], complete: bool) -> None:
    """Writes a report, whole or not at all.

    Args:
        path: the file; folders that are missing are made.
        head: what it says before the results.
        results: so far.
        complete: whether these are all that were wanted.
    """
    report = {
        "schema": SCHEMA,
        "complete": complete,
        **head,
        "results": [as_json(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Reads a report.

    Raises:
        BadReportError: it cannot be read, or is something else.
    """
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise BadReportError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadReportError(f"{path}: not JSON ({error})") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA or not isinstance(report.get("results"), list):
        raise BadReportError(
            f"{path}: found schema {schema}, accepted: {SCHEMA}, a file that `python -m bench` of "
            "this version wrote"
        )
    return report
