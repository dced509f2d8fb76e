"""A folder of sources in which the extension was not built says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fused_adamw


def test_not_built(tmp_path: Path) -> None:
    sources = Path(fused_adamw.__file__).parent
    shutil.copytree(
        sources,
        tmp_path / "fused_adamw",
        ignore=shutil.ignore_patterns("_C.*.so", "__pycache__", "triton_kernels"),
    )
    without_editable_installs = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if f.__module__.startswith('_froz')]"
    )
    command = [sys.executable, "-c", f"{without_editable_installs}; import fused_adamw"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: fused_adamw: found no extension for this Python in ")
    assert str(tmp_path / "fused_adamw") in error
    assert "pip install -e ." in error
    assert "circular" not in result.stderr
