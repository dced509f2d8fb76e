"""`python -m bench.kernels`: compiles every GPU kernel, prints the report and writes it.

The exit code is 1 where something does not compile, or where `--check` finds another report than
the one that would be written.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from bench.kernels.build import ROOT, BuildError, compile_all, versions
from bench.kernels.report import render

REPORT = ROOT / "bench" / "results" / "kernels.md"


def main() -> int:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--output", type=Path, default=REPORT, metavar="FILE", help="where to")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with FILE")
    options = parser.parse_args()
    try:
        report = render(compile_all(), versions())
    except BuildError as error:
        print(f"bench.kernels: {error}", file=sys.stderr)
        return 1
    if options.check:
        found = options.output.read_text() if options.output.exists() else ""
        lines = found.splitlines(), report.splitlines()
        print(*difflib.unified_diff(*lines, str(options.output), "now", lineterm="", n=0), sep="\n")
        return int(found != report)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report)
    print(report, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
