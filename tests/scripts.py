"""Scripts of examples/, run in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


def refusal(
    script: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What a script says to arguments that it refuses, with argparse's exit status 2."""
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_info.value.code == 2
    return capsys.readouterr().err
