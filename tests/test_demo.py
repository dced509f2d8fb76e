"""The demo, run as a user runs it, on a model small enough to take a few seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import refusal

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[1] / "examples" / "train_gpt.py"
TINY = ["--device=cpu", "--steps=4", "--batch-size=2"]
TINY += ["--context=16", "--layers=1", "--heads=2", "--width=16"]


def run_demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in `folder`; options given here override the tiny ones."""
    command = [sys.executable, str(SCRIPT), *TINY, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def validation_losses(output: str) -> list[float]:
    """The losses of both optimizers, from the table."""
    rows = [line.split() for line in output.splitlines() if " │ " in line]
    return [float(row[row.index("AdamW") + 2 if "AdamW" in row else 3]) for row in rows]


def test_trains_both_and_writes_table_and_picture(tmp_path: Path) -> None:
    result = run_demo(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "4/4" in result.stdout
    ours, theirs = validation_losses(result.stdout)
    # Rounding (6e-8) grows little over four steps; the table shows four digits of the loss.
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_learns_another_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 200)
    options = ["--text", text.name, "--steps", "60", "--lr", "0.01", "--output", "new/picture.svg"]
    result = run_demo(tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert "1,600 bytes" in result.stdout
    # Each byte follows from the one before: a model that learns at all gets far below
    # ln(256) = 5.5, where it starts, and one that only counts bytes stays above ln(8) = 2.08.
    assert max(validation_losses(result.stdout)) < 1.5
    assert "<svg" in (tmp_path / "new" / "picture.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", "short.txt"], "the text is too short: it has 100 bytes"),
        (["--text", "empty.txt"], "the text is too short: it has 0 bytes"),
        (["--heads", "3"], "heads must divide width, found 3 and 16"),
        (["--layers", "0"], "layers must be at least 1, found 0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--output", "picture.docx"], "picture.docx must end in one of"),
        (["--lr", "-1"], "lr"),
        (["--engine", "abacus"], "abacus"),
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
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert message in refusal(SCRIPT, [*TINY, *options], monkeypatch, capsys)
