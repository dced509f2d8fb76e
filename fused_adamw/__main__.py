"""The command line: ``python -m fused_adamw``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fused_adamw import info, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="fused_adamw", description="Fused optimizers for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, engines, and why an engine is absent")
    verifier = commands.add_parser("verify", help="every engine against the reference, bit by bit")
    verifier.add_argument("--seed", type=int, default=0, help="seed of the random problems")
    parsed = parser.parse_args(arguments)
    return info.main() if parsed.command == "info" else verify.main(parsed.seed)


if __name__ == "__main__":
    sys.exit(main())
