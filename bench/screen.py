"""The terminal while a run is under way: the table so far and a progress bar.

It is drawn between the rounds only: a thread that redraws would take time from those measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.results import Result
from bench.tables import cases_table, scaling_tables

# Lines of a result besides its rows, and of the screen besides the table.
_AROUND_RESULT, _AROUND_TABLE = 3, 8


class Screen:
    """A context in which results are shown as they come; without a terminal, nothing until the end.

    Args:
        console: where.
        cases: how many there will be.
    """

    def __init__(self, console: Console, cases: int) -> None:
        self._console = console
        self._results: Sequence[Result] = ()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=cases)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def status(self, text: str) -> None:
        """Shows what is going on with the case under way."""
        name = self._results[-1].case.name if self._results else ""
        self._progress.update(self._task, description=f"{name}: {text}" if text else name)
        self.draw()

    def show(self, results: Sequence[Result]) -> None:
        """Shows results, of which the last is under way."""
        self._results = results
        self._progress.update(self._task, completed=max(0, len(results) - 1))
        self.draw()

    def finish_case(self) -> None:
        """Counts the case under way as done."""
        self._progress.update(self._task, completed=len(self._results))
        self.draw()

    def draw(self) -> None:
        """Draws as many of the last results as fit."""
        if not self._live.is_started:
            return
        room = self._console.height - _AROUND_TABLE
        shown: list[Result] = []
        for result in reversed(self._results):
            room -= len(result.rows) + _AROUND_RESULT
            if room < 0 and shown:
                break
            shown.insert(0, result)
        tables = [cases_table(shown), *scaling_tables(self._results)[-1:]]
        self._live.update(Group(*tables[: 1 if room < 0 else 2], self._progress), refresh=True)
