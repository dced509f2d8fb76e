"""The learning comparison of the formats, run for a few steps; and what the docs say it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import refusal

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "precision.py"
TASKS = ("gpt", "digits")


def committed() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((ROOT / "docs/figures/precision.json").read_text())
    return numbers


def test_trains_in_every_format(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--steps=3", "--seeds=1", "--output=new"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "24/24" in result.stdout
    assert (tmp_path / "new" / "precision.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "new" / "precision.json").read_text())
    assert numbers.keys() == committed().keys()
    for task in TASKS:
        found = numbers["results"][task]
        assert found.keys() == committed()["results"][task].keys()
        assert all(len(format["curve"]) == 3 for format in found.values())
        # A parameter in two parts is the master's in another form: the model is the same.
        assert found["split"]["curve"] == found["master"]["curve"]
        # All start from the same weights, and weights are off by 2^-9 of themselves at most.
        losses = [format["final validation loss"][0] for format in found.values()]
        assert max(losses) - min(losses) < 2**-6 * max(losses)
        # Yet each is a format of its own.
        assert len({format["bytes a parameter, kept"] for format in found.values()}) >= 6
        bf16 = found["bf16, nearest"]
        assert bf16["curve"] not in (found["fp32"]["curve"], found["master"]["curve"])
        assert bf16["fraction of updates lost"] > found["split"]["fraction of updates lost"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "poetry"], "poetry"),
        (["--seeds", "0"], "--seeds must be at least 1, found 0"),
        (["--steps", "0"], "--steps must be at least 1, found 0"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", "short.txt"], "the text is too short: it has 100 bytes"),
        (["--output", "short.txt"], "short.txt"),
    ],
)
def test_refuses_bad_input(
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_text("a" * 100)
    monkeypatch.chdir(tmp_path)
    assert message in refusal(SCRIPT, ["--steps=1", "--seeds=1", *options], monkeypatch, capsys)


@pytest.mark.parametrize("task", TASKS)
def test_docs_show_what_was_found(task: str) -> None:
    text = (ROOT / "docs" / "precision.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for name, found in committed()["results"][task].items():
        mean, deviation = found["mean, standard deviation"]
        shown = f"{mean:.4f} ± {deviation:.4f}"
        assert any(row.startswith(f"| {name} |") and shown in row for row in rows), (name, shown)
