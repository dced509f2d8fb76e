"""bench/gpu_suite.sh among stand-ins for Python, the GPU and its tools: what it calls, and when."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "bench" / "gpu_suite.sh"

# Answers the question for the GPU, writes down every other call, and does as the test wants.
PYTHON = """\
#!/usr/bin/env bash
if [[ $1 == - ]]; then cat > /dev/null; echo 9.0; exit; fi
echo "$*" >> "$CALLS"
case "$*" in
  "-m pytest "*) echo "1 failed, 2 passed in 3.45s"; exit "${PYTEST_RESULT:-0}" ;;
  "-m bench.sanitize_case"*) exit "${SANITIZED_RESULT:-0}" ;;
  "setup.py "*) exit "${BUILD_RESULT:-0}" ;;
  *"/bad.whl") exit 1 ;;
  "-m pip install "*) mkdir -p "$OUT/peers" ;;
  "-m bench "*)
    echo "path $PYTHONPATH"
    trap 'echo interrupted; exit 130' INT
    for ((i = 0; i < ${BENCH_SECONDS:-0} * 10; i++)); do sleep 0.1; done
    echo "the table"
    echo '{}' > "$OUT/bench.json" ;;
esac
"""
SANITIZER = """\
#!/usr/bin/env bash
echo "$*" >> "$CALLS"
while [[ $1 != python3 ]]; do shift; done
exec "$@"
"""
PARTS = [
    "build",
    "engines",
    "tests",
    "benchmark",
    "distributed",
    "formats",
    "sharded",
    "memcheck",
    "verify",
    "racecheck",
    "initcheck",
    "synccheck",
]


class Suite:
    """The script among stand-ins that are first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.calls = folder, folder / "out", folder / "calls"
        self.tools = folder / "bin"
        self.tools.mkdir()
        self.tool("python3", PYTHON)
        self.tool("nvidia-smi", "#!/bin/sh\n")
        self.tool("compute-sanitizer", SANITIZER)

    def tool(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        paths = {"PATH": f"{self.tools}:/usr/bin:/bin", "OUT": str(self.out)}
        env = os.environ | paths | {"CALLS": str(self.calls)} | environment
        command = [SUITE, self.out, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def results(self) -> dict[str, str]:
        """What the summary's table, its last part, says of each part, in order."""
        lines = (self.out / "summary.txt").read_text().splitlines()
        begin = next(i for i, line in enumerate(lines) if line.split()[:2] == ["part", "time"])
        rows = [line.split(maxsplit=3) for line in lines[begin + 1 : -1]]
        return {row[0]: row[3] for row in rows}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_all_parts_in_order(suite: Suite) -> None:
    done = suite.run()
    assert done.returncode == 0, done.stderr
    results = suite.results()
    assert list(results) == PARTS
    assert all(result.startswith("passed") for result in results.values()), results
    summary = (suite.out / "summary.txt").read_text()
    assert "the table" in summary
    assert "1 failed, 2 passed in 3.45s" in summary
    assert done.stdout.endswith(summary)
    assert (suite.out / "bench.json").exists()
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"--tool {tool} " in suite.calls.read_text()


@pytest.mark.parametrize(
    ("cause", "failed"),
    [
        ("PYTEST_RESULT", {"tests", "distributed"}),
        ("BUILD_RESULT", {"build"}),
        ("SANITIZED_RESULT", {"memcheck", "racecheck", "initcheck", "synccheck"}),
    ],
)
def test_a_part_survives_the_failure_of_another(suite: Suite, cause: str, failed: set[str]) -> None:
    assert suite.run(**{cause: "7"}).returncode == 1
    results = suite.results()
    assert list(results) == PARTS
    for part, result in results.items():
        wanted = "FAILED: exit code 7" if part in failed else "passed"
        assert result.startswith(wanted), part


def test_a_machine_where_the_sanitizer_does_not_work_is_no_failure(suite: Suite) -> None:
    suite.tool("compute-sanitizer", "#!/bin/sh\necho Device not supported\nexit 1\n")
    assert suite.run().returncode == 0
    assert suite.results()["racecheck"].startswith("not possible on this machine")


def test_a_part_that_takes_all_the_time_is_interrupted(suite: Suite) -> None:
    # A part is begun with 15 s at least.
    assert suite.run(GPU_SUITE_SECONDS="20", BENCH_SECONDS="60").returncode == 1
    results = suite.results()
    assert results["benchmark"].startswith("FAILED: over its ")
    assert "interrupted" in (suite.out / "bench.log").read_text()
    for part in PARTS[PARTS.index("benchmark") + 1 :]:
        assert results[part].startswith("not run: no time left"), part


def test_wheels_of_peers(suite: Suite) -> None:
    wheels = suite.folder / "wheels"
    wheels.mkdir()
    for name in ("bad.whl", "good.whl", "notes.txt"):
        (wheels / name).touch()
    assert suite.run(wheels).returncode == 1
    assert list(suite.results()) == [*PARTS[:3], "peers", *PARTS[3:]]
    assert suite.results()["peers"].startswith("FAILED")
    installs = [line for line in suite.calls.read_text().splitlines() if "pip install" in line]
    assert [line.split()[-1] for line in installs] == [
        str(wheels / "bad.whl"),
        f"{wheels}/good.whl",
    ]
    for line in installs:
        assert "--no-index --no-deps" in line
        assert f"--target {suite.out}/peers" in line
    path = (suite.out / "bench.log").read_text().split("path ")[1].splitlines()[0].split(":")
    assert path[:2] == [str(ROOT), f"{suite.out}/peers"]
    assert not (suite.out / "peers").exists()


def test_wrong_calls(suite: Suite) -> None:
    assert subprocess.run([SUITE], capture_output=True, check=False).returncode == 2
    assert suite.run("a", "b").returncode == 2
    empty = suite.run(suite.tools)
    assert empty.returncode == 2
    assert "WHEELS" in empty.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run([SUITE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "no GPU" in done.stderr or "no torch" in done.stderr
