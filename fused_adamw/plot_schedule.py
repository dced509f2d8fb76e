"""A schedule as a table or a picture: ``python -m fused_adamw schedule KIND``."""

from __future__ import annotations

import argparse
import inspect
import shlex
from pathlib import Path
from typing import Any, NoReturn

from fused_adamw import checks
from fused_adamw.schedules import KINDS, Schedule, field_defaults, field_types

TABLE_ROWS = 100  # at most, and the last step
POINTS = 5000  # at most, in a picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each kind of schedule, its options the fields of the dataclass."""
    for command in _add_kinds(parser):
        command.add_argument("--steps", type=int, default=100, metavar="N", help="default: 100")
        command.add_argument("--plot", type=Path, metavar="FILE", help="picture to write")
        command.set_defaults(parser=command)


def main(parsed: argparse.Namespace) -> int:
    """Prints the table, or writes the picture; bad options end in argparse's exit status 2."""
    try:
        schedule = _schedule(parsed)
        steps = checks.count("--steps", parsed.steps)
        if parsed.plot is None:
            print_table(schedule, steps)
        else:
            plot(schedule, steps, parsed.plot)
            print(f"Picture: {parsed.plot}")
    except (ValueError, OSError, ImportError) as error:
        parsed.parser.error(str(error))
    return 0


def print_table(schedule: Schedule, steps: int) -> None:
    """Prints multipliers at round steps from 0 on, and the last one."""
    strides = (digit * 10**power for power in range(17) for digit in (1, 2, 5))
    stride = next(stride for stride in strides if steps <= TABLE_ROWS * stride)
    print(f"{'step':>12s}  multiplier")
    for t in sorted({*range(0, steps, stride), steps - 1}):
        print(f"{t:12d}  {schedule(t):.6g}")


def plot(schedule: Schedule, steps: int, path: Path) -> None:
    """Draws the multiplier, which holds from one step to the next, over the steps.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `path` ends in no format that matplotlib writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib; "
            "without --plot a table is printed"
        ) from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise ValueError(f"--plot: {path} must end in one of {', '.join(sorted(formats))}")
    axes = figure.add_subplot()
    ts = range(0, steps, -(-steps // POINTS))
    axes.plot(ts, [schedule(t) for t in ts], drawstyle="steps-post")
    axes.set(title=schedule.kind, xlabel="steps taken, $t$", ylabel=r"multiplier, $\eta_t$")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


class _Nested(argparse.ArgumentParser):
    """Reads a schedule inside an option: its errors are those of the option."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentTypeError(message)


def _nested_schedule(text: str) -> Schedule:
    parser = _Nested(add_help=False)
    _add_kinds(parser, add_help=False)
    try:
        return _schedule(parser.parse_args(shlex.split(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# For each type of a field what argparse is told.
_OPTIONS: dict[Any, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    tuple[int, ...]: {"type": int, "metavar": "N", "nargs": "*"},
    tuple[Schedule, ...]: {"type": _nested_schedule, "metavar": "'KIND ...'", "nargs": "+"},
}


def _add_kinds(parser: argparse.ArgumentParser, **settings: Any) -> list[argparse.ArgumentParser]:
    commands = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    added = []
    for kind, schedule in KINDS.items():
        text = inspect.getdoc(schedule) or ""
        command = commands.add_parser(
            kind,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
        defaults = field_defaults(schedule)
        for name, kind_of_value in field_types(schedule).items():
            option: dict[str, Any] = {"required": True}
            if name in defaults:
                option = {"default": defaults[name], "help": f"default: {defaults[name]}"}
            command.add_argument(f"--{name}", **option, **_OPTIONS[kind_of_value])
        added.append(command)
    return added


def _schedule(parsed: argparse.Namespace) -> Schedule:
    schedule = KINDS[parsed.kind]
    return schedule(**{name: getattr(parsed, name) for name in field_types(schedule)})
