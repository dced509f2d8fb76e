"""`python -m bench`: times optimizer steps against each other and against what memory allows."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fused_adamw
from bench import picture, report
from bench.cases import CASES, CUDA, DTYPES, TASKS, Case, select
from bench.contenders import Contender, our_engines
from bench.environment import describe
from bench.measure import Lineup, Measurement, Settings
from bench.models import MODELS
from bench.peers import PEERS, Peer, start_torch
from bench.probe import crash
from bench.results import DIFFERENT, FAILED, Result
from bench.rules import RULES, Rule
from bench.screen import Screen
from bench.tables import cases_table, scaling_tables
from bench.tasks import STEP

QUICK = Settings(rounds=3, block_seconds=0.01, most_elements=10**6)
ENGINES = ("cpu", "cuda", "triton", "reference")
WORK_ON = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton")}
INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; leaves it with code 2 for what it cannot use."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times optimizer steps side by side, against each other and against what "
        "memory allows. `python -m bench compare A.json B.json` compares two runs.",
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    several: dict[str, Any] = {"action": "extend", "nargs": "+", "metavar": "NAME"}
    add("--device", choices=("cpu", "cuda"), default=here, help=f"default: {here}")
    for option, known, default in (
        ("--rule", RULES, "adamw"),
        ("--engine", ENGINES, "those that are fast on the device"),
        ("--peer", ("none", *PEERS), "those that are installed"),
        ("--dtype", DTYPES, "all"),
        ("--case", CASES, "those for the device, models that are not large, scaling plots"),
        ("--task", TASKS, "all, where no case is named; with a name, its cases"),
    ):
        add(option, **several, choices=known, help=f"{', '.join(known)}; default: {default}")
    add(
        "--models",
        nargs="*",
        choices=MODELS,
        metavar="NAME",
        help=f"{', '.join(MODELS)}; without a name all of them, large ones too",
    )
    add(
        "--quick",
        action="store_true",
        help="does it run: 3 rounds, at most 1,000,000 elements, and unless they are named no "
        "peers that compile for every case",
    )
    add("--rounds", type=int, help=f"samples of each contender; default: {Settings.rounds}")
    block_ms = f"{Settings.block_seconds * 1e3:g}"
    add("--block-ms", type=float, help=f"least length of a sample; default: {block_ms}")
    add("--threads", type=int, help="for torch and us; default: torch's")
    add(
        "--json",
        type=Path,
        default=Path("build/bench.json"),
        help="default: build/bench.json; the picture is beside it, as .png",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    for name in ("rounds", "block_ms", "threads"):
        value = getattr(options, name)
        least = 0 if name == "block_ms" else 1
        if value is not None and not value >= least:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: found {value}, accepted: {least} or more")
    accepted = WORK_ON[options.device]
    for engine in options.engine or ():
        reason = fused_adamw.engine_status()[engine]
        if engine not in accepted:
            parser.error(
                f"--engine {engine}: does not work on {options.device}; "
                f"accepted: {', '.join(accepted)}"
            )
        if reason is not None:
            parser.error(f"--engine {engine}: {reason}")
    if options.json.is_dir():
        parser.error(f"--json {options.json}: is a folder; accepted: a file to write")
    return options


def _settings(options: argparse.Namespace) -> Settings:
    settings = QUICK if options.quick else Settings()
    if options.rounds is not None:
        settings = replace(settings, rounds=options.rounds)
    if options.block_ms is not None:
        settings = replace(settings, block_seconds=options.block_ms / 1e3)
    return settings


def _graphs(rule: Rule, contenders: Sequence[Contender]) -> list[Contender]:
    """Whose step may be captured by a CUDA graph: ours, and torch's fused one."""
    capturable = replace(rule, options={**rule.options, "capturable": True})
    graphs = []
    for contender in contenders:
        name = f"{contender.name}, graph"
        if contender.ours:
            graphs.append(replace(contender, name=name))
        elif contender.name == "torch-fused":
            graphs.append(Contender(name, partial(start_torch, capturable, fused=True)))
    return graphs


class Bench:
    """A run: who takes part in what, and what has come of it.

    Args:
        options: as `parse` returns them.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.settings = _settings(options)
        self.engines = list(options.engine or our_engines(self.device))
        self.rules = [RULES[name] for name in dict.fromkeys(options.rule or ["adamw"])]
        self.cases = select(
            self.device,
            options.case or (),
            options.models,
            options.dtype or (),
            options.task or (),
        )
        asked = dict.fromkeys(options.peer or PEERS)
        self.left_out = [
            name for name in asked if options.quick and not options.peer and PEERS[name].compiles
        ]
        self.versions = {
            name: PEERS[name].version()
            for name in asked
            if name != "none" and name not in self.left_out
        }
        self.peers = [PEERS[name] for name, version in self.versions.items() if version]
        self.missing = [name for name, version in self.versions.items() if not version]
        self.results: list[Result] = []
        self._crashes: dict[tuple[str, str, str], str | None] = {}

    def head(self, options: argparse.Namespace) -> dict[str, Any]:
        """What the JSON file says before the results."""
        return {
            **describe(self.device),
            "device": self.device.type,
            "peers": self.versions,
            "settings": {
                "rounds": self.settings.rounds,
                "block_seconds": self.settings.block_seconds,
                "quick": options.quick,
            },
        }

    def lineup(self, rule: Rule, case: Case, on_status: Callable[[str], object]) -> Lineup:
        """Who takes part in a case; third-party peers are tried in another process before."""
        peers = [peer for peer in self.peers if peer.has(rule)]
        everyone = case.task.contenders(rule, case.dtype, self.engines, peers)
        contenders = [one for one in everyone if self.device.type in one.devices]
        dtypes = {contender.name: contender.dtype or case.dtype for contender in contenders}
        crashed = {}
        for peer in peers:
            dtype = dtypes.get(peer.name)
            how = self._crash(peer, rule, dtype, on_status) if dtype is not None else None
            if how is not None:
                crashed[peer.name] = how
        of_step = self.device.type == CUDA and case.task is STEP
        graphs = _graphs(rule, contenders) if of_step else []
        return Lineup(contenders, graphs, crashed)

    def _crash(
        self, peer: Peer, rule: Rule, dtype: torch.dtype, on_status: Callable[[str], object]
    ) -> str | None:
        if not peer.third_party:
            return None
        name = str(dtype).removeprefix("torch.")
        key = peer.name, rule.name, name
        if key not in self._crashes:
            on_status(f"trying {peer.name} in a process of its own")
            self._crashes[key] = crash(peer.name, rule.name, self.device, name)
        return self._crashes[key]

    def run(self, screen: Screen, save: Callable[[bool], None]) -> None:
        """Measures every case with every rule; saves after each."""
        measurement = Measurement(
            self.settings, on_status=screen.status, on_round=lambda: screen.show(self.results)
        )
        for rule in self.rules:
            for case in self.cases:
                result = Result(rule, case, self.device)
                self.results.append(result)
                screen.show(self.results)
                measurement.run(result, self.lineup(rule, case, screen.status))
                screen.finish_case()
                save(False)

    def ours_failed(self) -> bool:
        """Whether one of our engines raised or returned other bits than the reference."""
        rows = [row for result in self.results for row in result.rows if row.ours]
        return any(row.status in (FAILED, DIFFERENT) for row in rows)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM, which `timeout` sends, do what Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; prints the table; writes the JSON file and the picture.

    Returns:
        0; 1 if an engine of ours failed or nothing could be measured; 130 if it was interrupted.
    """
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options)
    if not bench.engines:
        print(f"no engine of ours works on {options.device} here", file=sys.stderr)
        return 1
    if not bench.cases:
        print(f"no case chosen has dtype {', '.join(options.dtype)}", file=sys.stderr)
        return 1
    head = bench.head(options)

    def save(complete: bool) -> None:
        report.write(options.json, head, bench.results, complete)

    # Not in a terminal, the width is unknown, and a narrow table would be cut.
    console = Console(width=None if sys.stdout.isatty() else 160)
    complete = False
    with _termination_as_interrupt():
        try:
            with Screen(console, len(bench.rules) * len(bench.cases)) as screen:
                bench.run(screen, save)
            complete = True
        except KeyboardInterrupt:
            console.print("[yellow]Interrupted: this is what was measured[/]")
    save(complete)
    console.print(cases_table(bench.results))
    for table in scaling_tables(bench.results):
        console.print(table)
    if bench.missing:
        console.print(f"Not installed: {', '.join(bench.missing)} (see `make bench-peers`)")
    if bench.left_out:
        console.print(f"Left out by --quick: {', '.join(bench.left_out)} (--peer takes them in)")
    image = options.json.with_suffix(".png")
    no_picture = picture.draw(image, bench.results)
    console.print(f"All samples are in {options.json}")
    console.print(f"No picture: {no_picture}" if no_picture else f"The picture is {image}")
    if not complete:
        return INTERRUPTED
    return int(bench.ours_failed())
