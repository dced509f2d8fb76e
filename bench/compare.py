"""Times optimizer steps side by side, against each other and against what memory allows.

python -m bench --quick
python -m bench --case 64M-float32 --case 1000x64-float32 --rounds 30 --json result.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench import timing
from bench.cases import CASES, Aim, Case, cases_for, make_params
from bench.contenders import TORCH_FOREACH, TORCH_FUSED, Contender, contenders
from bench.environment import describe, device_name, free_bytes
from bench.stream import limit, streams
from bench.timing import Series, interleave, median, ratio, spread

QUICK_ROUNDS, QUICK_ELEMENTS = 3, 1 << 20
# Below this the arrays stay in a cache, of which the stream over memory says nothing.
LEAST_STREAM_BYTES = 256 << 20


@dataclass
class Result:
    """What was measured of one case.

    Attributes:
        case: the case.
        steps: a series for each contender.
        streams: a series for each stream; empty for cases that fit into a cache.
        failures: what those contenders raised that could not step.
        skipped: why nothing was measured, if so.
    """

    case: Case
    steps: dict[str, Series] = field(default_factory=dict)
    streams: dict[str, Series] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None

    def limit(self, device: torch.device) -> tuple[str, float] | None:
        """The stream that is the limit, and its seconds over the bytes of a step."""
        if not self.streams:
            return None
        return limit({name: median(s.device) for name, s in self.streams.items()}, device)

    def as_json(self, device: torch.device) -> dict[str, Any]:
        """Everything, with all samples, in seconds."""
        found = self.limit(device)
        return {
            "case": self.case.name,
            "tensors": self.case.tensors,
            "numel": self.case.numel,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "bytes_per_param": self.case.bytes_per_param,
            "step_bytes": self.case.step_bytes,
            "limit": {"stream": found[0], "seconds": found[1]} if found else None,
            "steps": {name: asdict(series) for name, series in self.steps.items()},
            "streams": {name: asdict(series) for name, series in self.streams.items()},
            "failures": self.failures,
            "skipped": self.skipped,
        }


def measure(
    case: Case,
    device: torch.device,
    who: Sequence[Contender],
    rounds: int,
    block_seconds: float,
    on_round: Any = lambda: None,
) -> Result:
    """Times every contender over one list of parameters, and the streams between them."""
    result = Result(case)
    streamed = case.step_bytes >= LEAST_STREAM_BYTES
    # Parameters and gradients; states of each contender; what foreach allocates; the streams.
    arrays = 2 + 2 * len(who) + 4 + (6 if streamed else 0)
    needed, free = arrays * case.elements * case.dtype.itemsize, free_bytes(device)
    if free is not None and needed > free:
        result.skipped = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        return result

    params = make_params(case, device)
    calls: dict[str, timing.Call] = {}
    for contender in who:
        try:
            optimizer = contender.make(params)
            optimizer.step()
        except Exception as error:
            result.failures[contender.name] = f"{type(error).__name__}: {error}"
        else:
            calls[contender.name] = optimizer.step
    passes = streams(case.step_bytes, device) if streamed else {}
    found = interleave({**calls, **passes}, device, rounds, block_seconds, on_round)
    result.steps = {name: found[name] for name in calls}
    result.streams = {name: found[name] for name in passes}
    return result


# --- The table -----------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """In a unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} µs"


def reached(aim: Aim, result: Result, series: Series, of_limit: float | None) -> bool:
    """Whether a contender reaches what is aimed at."""
    fused = result.steps.get(TORCH_FUSED)
    times = ratio(fused.wall, series.wall) if fused else 0.0
    return (
        times >= aim.times_torch_fused
        and (of_limit or 0.0) >= aim.of_limit
        and median(series.host) * 1e6 <= aim.host_us
    )


def make_table(device: torch.device) -> Table:
    """The columns."""
    table = Table(title=f"A step of AdamW on {device_name(device)}")
    table.add_column("case")
    table.add_column("contender")
    right = [
        "time",
        "spread",
        "host",
        "B/param",
        "GB/s",
        "of limit",
        "torch fused",
        "torch foreach",
    ]
    for name in right:
        table.add_column(name, justify="right")
    table.add_column("aim")
    return table


def add_rows(table: Table, result: Result, device: torch.device, ours: Sequence[str]) -> None:
    """A row for each contender, the limit, and what could not be measured."""
    case, aim = result.case, result.case.aims[device.type]
    found = result.limit(device)
    rows: list[list[str]] = []
    if result.skipped:
        rows.append([f"skipped: {result.skipped}"])
    for who, series in result.steps.items():
        seconds = median(series.device)
        of_limit = found[1] / seconds if found else None
        ratios = [
            f"{ratio(peer.wall, series.wall):.2f}x" if peer is not None else ""
            for peer in map(result.steps.get, (TORCH_FUSED, TORCH_FOREACH))
        ]
        verdict = ""
        if who == ours[0] and str(aim):
            good = reached(aim, result, series, of_limit)
            verdict = f"[green]{aim} reached" if good else f"[yellow]{aim} missed"
        rows.append(
            [
                f"[bold]{who}" if who in ours else who,
                duration(median(series.wall)),
                f"±{spread(series.wall):.1%}",
                duration(median(series.host)) if device.type == "cuda" else "",
                str(case.bytes_per_param),
                f"{case.step_bytes / seconds / 1e9:.1f}",
                f"{of_limit:.0%}" if of_limit is not None else "",
                *ratios,
                verdict,
            ]
        )
    rows += [[who, f"[red]{message}"] for who, message in result.failures.items()]
    if found:
        name, seconds = found
        samples = result.streams[name].device
        speed = f"{case.step_bytes / seconds / 1e9:.1f}"
        limit_row = [name, duration(seconds), f"±{spread(samples):.1%}", "", "", speed, "100%"]
        rows.append([f"[dim]{cell}" if cell else "" for cell in limit_row])
    for index, row in enumerate(rows):
        table.add_row("" if index else case.name, *row)
    table.add_section()


# --- The command line ----------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here, help=f"default: {here}")
    parser.add_argument(
        "--case",
        action="append",
        choices=[case.name for case in CASES],
        metavar="NAME",
        help=f"any of {', '.join(case.name for case in CASES)}; default: those of the device",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds and at most 1M elements")
    parser.add_argument("--rounds", type=int, help="samples of each contender (default: 15)")
    parser.add_argument(
        "--block-ms", type=float, default=50.0, help="least length of a sample (default: 50)"
    )
    parser.add_argument("--threads", type=int, help="for torch and us (default: torch's)")
    parser.add_argument(
        "--json", type=Path, default=Path("build/bench.json"), help="default: build/bench.json"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: found {getattr(options, name)}, accepted: 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON file; 1 if a contender of ours failed."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else 15)
    cases = cases_for(device)
    if options.case:
        cases = [case for case in CASES if case.name in options.case]
        for case in cases:
            if device.type not in case.aims:
                print(f"{case.name} is not a case for {device.type}", file=sys.stderr)
                return 2
    if options.quick:
        cases = [case.shrunk(QUICK_ELEMENTS) for case in cases]
    who = contenders(device)
    ours = [contender.name for contender in who if contender.ours]
    if not ours:
        print(f"no engine of ours works on {device.type} here", file=sys.stderr)
        return 1

    # Not in a terminal, the width is unknown, and a narrow table would be cut.
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = make_table(device)
    results: list[Result] = []
    settings = {"rounds": rounds, "block_seconds": options.block_ms / 1e3, "quick": options.quick}
    environment = describe(device)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * rounds)
        for index, case in enumerate(cases):
            progress.update(task, description=case.name, completed=index * rounds)
            results.append(
                measure(
                    case,
                    device,
                    who,
                    rounds,
                    options.block_ms / 1e3,
                    on_round=lambda: progress.advance(task),
                )
            )
            add_rows(table, results[-1], device, ours)
            # After every case, so that an interruption leaves what was measured.
            report = {
                "schema": 1,
                **environment,
                "device": device.type,
                "settings": settings,
                "results": [result.as_json(device) for result in results],
            }
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)
    console.print(f"medians of {rounds} rounds; all samples in {options.json}")
    return int(any(name in result.failures for result in results for name in ours))


if __name__ == "__main__":
    sys.exit(main())
