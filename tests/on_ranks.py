"""Runs a function in several processes that make up a process group, with gloo unless told.

Processes are forked from a server that has imported torch once, so that each costs milliseconds.
They meet by way of a file: there is no port to be taken by somebody else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import distributed

SECONDS = 180.0
_GRACE = 3.0  # for the other ranks to fail too, once one has
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.tensor", "fused_adamw"])

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="gloo is missing"
)


def run(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    seconds: float = SECONDS,
    backend: str = "gloo",
) -> list[Any]:
    """Calls ``function(rank, *args)`` in a process for each rank.

    Args:
        function: of the top level of a module, so that a process finds it.
        world_size: how many.
        *args: picklable.
        seconds: after which all are killed.
        backend: of the process group.

    Returns:
        What each rank returned: tensors and plain values.

    Fails the test with the output and the traceback of every rank that failed or hung.
    """
    with TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(world_size):
            mine, theirs = _context.Pipe(duplex=False)
            arguments = (function, rank, world_size, args, backend, folder, seconds, theirs)
            process = _context.Process(target=_on_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        try:
            results, failures = _collect(ends, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if failures:
            said = [
                f"--- rank {rank} of {world_size}: {why}\n{_output(folder, rank)}"
                for rank, why in sorted(failures.items())
            ]
            pytest.fail("\n".join(said), pytrace=False)
    return [results[rank] for rank in range(world_size)]


def _collect(ends: list[Connection], seconds: float) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    end = time.monotonic() + seconds
    pending = {connection: rank for rank, connection in enumerate(ends)}
    while pending:
        ready = wait(list(pending), max(0.0, end - time.monotonic()))
        if not ready:
            for rank in pending.values():
                why = "waited for a rank that failed" if failures else f"took over {seconds:.0f} s"
                failures[rank] = why
            break
        for connection in ready:
            rank = pending.pop(connection)  # type: ignore[call-overload]
            try:
                is_good, value = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                is_good, value = False, "ended without a word"
            if is_good:
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
            else:
                failures[rank] = value
                end = min(end, time.monotonic() + _GRACE)
    return results, failures


def _output(folder: str, rank: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (Path(folder) / f"output{rank}").read_text(errors="replace")
    return ""


def _on_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    backend: str,
    folder: str,
    seconds: float,
    connection: Connection,
) -> None:
    with (Path(folder) / f"output{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        faulthandler.dump_traceback_later(max(1.0, seconds - 2.0), file=output)
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            store = distributed.FileStore(str(Path(folder) / "store"), world_size)
            distributed.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=seconds),
            )
            result = function(rank, *args)
            file = io.BytesIO()
            torch.save(result, file)
            message: tuple[bool, Any] = True, file.getvalue()
        except BaseException:
            message = False, traceback.format_exc()
        output.flush()
        connection.send(message)
        connection.close()
    os._exit(0)  # without the destruction of a group that others may have left
