"""The command line: ``python -m fused_adamw``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fused_adamw import info, plan, plot_schedule, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="fused_adamw", description="Fused optimizers for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, engines, and why an engine is absent")
    verifier = commands.add_parser("verify", help="every engine against the reference, bit by bit")
    verifier.add_argument("--seed", type=int, default=0, help="seed of the random problems")
    scheduler = commands.add_parser("schedule", help="a schedule of the multiplier eta, in figures")
    plot_schedule.add_arguments(scheduler)
    planner = commands.add_parser("plan", help="bytes on each GPU and time of a step, by format")
    plan.add_arguments(planner)
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        return info.main()
    if parsed.command == "schedule":
        return plot_schedule.main(parsed)
    if parsed.command == "plan":
        return plan.main(parsed)
    return verify.main(parsed.seed)


if __name__ == "__main__":
    sys.exit(main())
