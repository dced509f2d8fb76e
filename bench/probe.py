"""Tries a peer in a process of its own, so that one that crashes does not take the run with it.

A peer's compiled part may end the process: by an instruction that the processor does not have, or
a wrong access. Whatever it compiles when it is first used is kept for the run that follows.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.cases import DTYPES, Case, make_params
from bench.peers import PEERS
from bench.rules import RULES

ROOT = Path(__file__).parents[1]
SECONDS = 300  # DeepSpeed compiles for a minute on two cores
_SHAPES = ((1024,), (3, 5), (1,))


def crash(peer: str, rule: str, device: torch.device, dtype: str) -> str | None:
    """How the peer ends a process that steps it over a few small tensors; None if it does not.

    An exception is none: it is met again, and reported, where the peer is measured.
    """
    command = [sys.executable, "-m", "bench.probe", peer, rule, device.type, dtype]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {SECONDS} s"
    if done.returncode < 0:
        return f"crashed: {signal.Signals(-done.returncode).name}"
    if done.returncode > 0:
        return f"crashed: exit code {done.returncode}"
    return None


def main(arguments: Sequence[str]) -> None:
    """Steps a peer; the arguments are those of `crash`."""
    peer, rule, device, dtype = arguments
    params = make_params(Case("probe", _SHAPES, DTYPES[dtype]), torch.device(device))
    try:
        started = PEERS[peer].start(RULES[rule], params)
        for _ in range(2):
            started.step()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
