"""The benchmark's programs start, measure, and say what is wrong with a call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_case_from_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "result.json"
    options = ["--quick", "--rounds", "2", "--block-ms", "1", "--device", "cpu"]
    cases = ["--case", "1000x1-float32", "--case", "64M-bfloat16"]
    done = run(sys.executable, "-m", "bench", *options, *cases, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "ours cpu" in done.stdout

    report = json.loads(file.read_text())
    assert {"commit", "machine", "versions", "threads", "settings"} <= report.keys()
    cut, lists = report["results"]  # in the order of the table of cases
    assert (cut["numel"], cut["bytes_per_param"]) == (1 << 20, 14)
    assert (lists["tensors"], lists["numel"], lists["bytes_per_param"]) == (1000, 1, 28)
    for result in report["results"]:
        assert result["steps"].keys() == {"ours cpu", "torch fused", "torch foreach"}
        assert not result["failures"]
        for series in result["steps"].values():
            assert len(series["wall"]) == 2
            assert min(series["wall"]) > 0


def test_an_unknown_case_is_answered_with_the_known_ones() -> None:
    done = run(sys.executable, "-m", "bench", "--case", "64M")
    assert done.returncode == 2
    assert "64M-float32" in done.stderr
