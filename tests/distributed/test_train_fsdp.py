"""examples/train_fsdp.py under torchrun: it trains, resumes, and survives a rank that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import on_ranks
import pytest

pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_fsdp.py"
SMALL = ["--layers=2", "--width=32", "--heads=2", "--context=32", "--batch-size=4"]
SECONDS = 120
ON_THE_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

pytestmark = [on_ranks.needs_gloo, pytest.mark.xdist_group("torchrun")]


@contextmanager
def started(folder: Path, *options: str, ranks: int = 2, restarts: int = 0) -> Iterator[Any]:
    """torchrun, which has ended, with its ranks, when this has."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", str(SCRIPT)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, *SMALL, "--output", str(folder / "found.json"), *options],
        cwd=folder,
        env={**ON_THE_CPU, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # it ends its ranks, which have sessions of their own
        process.wait(10)


def finished(process: Any, folder: Path) -> tuple[dict[str, Any], str]:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail(f"not done after {SECONDS} s:\n{process.communicate()[0]}")
    assert process.returncode == 0, output
    return json.loads((folder / "found.json").read_text()), output


def rank_of(process: Any, rank: int) -> int:
    """The process that is a rank of a run."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "status").read_text().splitlines()
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if f"PPid:\t{process.pid}" in status and b"RANK=%d" % rank in environment:
            return int(path.name)
    raise AssertionError(f"no process is rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_rank_that_is_killed_leaves_no_trace(tmp_path: Path) -> None:
    """After kill -9, torchrun restarts it; it ends with the bits of a run that was never hurt."""
    options = ["--steps=60", "--precision=8bit", "--checkpoint-every=10"]
    folders = tmp_path / "whole", tmp_path / "hurt"
    for folder in folders:
        folder.mkdir()
    with started(folders[0], *options) as process:
        whole, _ = finished(process, folders[0])

    run = folders[1] / "run"
    unfinished = run / "step-59.writing"  # as if rank 0 had died while it was written
    deadline = time.monotonic() + SECONDS
    with started(folders[1], *options, "--checkpoints=run", restarts=1) as hurt:
        while not (run / "step-20").exists():
            assert hurt.poll() is None, hurt.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        unfinished.mkdir()
        os.kill(rank_of(hurt, 1), signal.SIGKILL)
        found, output = finished(hurt, folders[1])

    assert 20 <= found["resumed_from"] < 60, output
    assert found["resumed_from"] % 10 == 0
    assert f"Resumed from run/step-{found['resumed_from']}" in output
    assert not list(run.glob("*.writing"))
    assert (run / "step-60").exists()
    assert found["sha256"] == whole["sha256"]
    assert found["validation_loss"] == whole["validation_loss"]


def test_checkpoints_of_another_run_are_refused_after_a_restart_too(tmp_path: Path) -> None:
    (tmp_path / "run" / "step-20").mkdir(parents=True)
    with started(tmp_path, "--checkpoints=run", ranks=1, restarts=1) as process:
        output, _ = process.communicate(timeout=SECONDS)
    assert "without any, or be given with --resume; found run/step-20" in output
    assert "exitcode  : 2 " in output, output  # of the last attempt
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-20"]


def test_goes_on_with_other_ranks_and_another_precision(tmp_path: Path) -> None:
    options = ["--checkpoints=run", "--resume", "--schedule=warm-restarts"]
    with started(tmp_path, "--steps=20", "--precision=master", *options) as process:
        first, _ = finished(process, tmp_path)
    assert first["resumed_from"] == 0
    with started(tmp_path, "--steps=40", "--precision=split", *options, ranks=1) as process:
        then, output = finished(process, tmp_path)
    assert then["resumed_from"] == 20, output
    assert then["validation_loss"] < first["validation_loss"]
    still = ["--steps=41", "--precision=split", "--lr=0"]  # counts, not that of the checkpoint
    with started(tmp_path, *still, *options, ranks=1) as process:
        last, _ = finished(process, tmp_path)
    assert last["resumed_from"] == 40
    assert last["sha256"] == then["sha256"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps=0"], "--steps must be at least 1"),
        (["--resume"], "--resume needs --checkpoints"),
        (["--heads=3"], "heads must divide width"),
        (["--precision=int4"], "int4"),
        (["--checkpoints=run"], "without any, or be given with --resume; found run/step-20"),
        (
            ["--checkpoints=run", "--resume", "--steps=10"],
            "--steps must reach those of run/step-20, found 10",
        ),
    ],
)
def test_bad_options(options: list[str], words: str, tmp_path: Path) -> None:
    for name in ("step-3", "step-20", "step-30.writing"):
        (tmp_path / "run" / name).mkdir(parents=True)
    alone = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, *options],
        cwd=tmp_path,
        env={**ON_THE_CPU, "PYTHONPATH": str(ROOT), **alone, **store},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert process.returncode == 2
    assert words in process.stderr
