"""The benchmark of steps over DTensors runs, and reports what is asked of it."""

from __future__ import annotations

import json
from pathlib import Path

import on_ranks
import pytest

from bench import sharded

pytestmark = on_ranks.needs_gloo


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "samples.json"
    arguments = ["--tensors", "20", "--numel", "64", "--rounds", "2", "--device", "cpu"]
    sharded.main([*arguments, "--json", str(file)])
    found = json.loads(file.read_text())
    assert set(found["host_seconds"]) == {
        sharded.OURS,
        sharded.OURS_PLAIN,
        sharded.CLIPPED,
        sharded.CLIPPED_PLAIN,
        sharded.TORCH,
        sharded.TORCH_PLAIN,
    }
    assert all(len(times) == 2 and min(times) > 0 for times in found["host_seconds"].values())
    printed = capsys.readouterr().out
    for words, value in found["ratios"].items():
        assert f"{words}: {value:.2f} (at" in printed
