"""Memory of a training step whose optimizer steps after, or in, the backward pass.

`python -m bench.gradient_release` trains a stack of equal layers on the CPU. Each way runs in a
process of its own, since memory that an allocator has once taken stays in the resident set.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.units import size
from fused_adamw import FusedAdamW, step_in_backward


class GradientBytes:
    """Counts the gradients of a model's parameters; enter it before hooks that free them.

    Attributes:
        alive: bytes of gradients that parameters have.
        peak: the most that there were within.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.alive = self.peak = 0

    def __enter__(self) -> GradientBytes:
        self._hooks = [p.register_post_accumulate_grad_hook(self._count) for p in self.params]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, _: Tensor) -> None:
        self.alive = sum(p.grad.nbytes for p in self.params if p.grad is not None)
        self.peak = max(self.peak, self.alive)


class Way(NamedTuple):
    """How a step is taken."""

    in_backward: bool
    set_to_none: bool = True


WAYS = {
    "step, zero_grad(set_to_none=False)": Way(False, False),
    "step, zero_grad()": Way(False),
    "step_in_backward": Way(True),
}


class Peaks(NamedTuple):
    """Bytes: of the parameters, of gradients alive, of the process beyond what it had before."""

    params: int
    grads: int
    resident: int


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(way: Way, layers: int, width: int, steps: int) -> Peaks:
    """Peaks over training steps, the first of which creates the states."""
    if layers > 1:
        measure(way, 1, 64, 2)  # the libraries take memory when they are first used
    torch.manual_seed(0)
    before = resident("VmRSS")
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = FusedAdamW(model.parameters(), lr=1e-4)
    x = torch.randn(8, width)
    with GradientBytes(model) as grads:
        if way.in_backward:
            step_in_backward(model, optimizer)
        reset_peak()
        for _ in range(steps):
            model(x).square().mean().backward()
            if not way.in_backward:
                optimizer.step()
                optimizer.zero_grad(set_to_none=way.set_to_none)
    params = sum(param.nbytes for param in model.parameters())
    return Peaks(params, grads.peak, resident("VmHWM") - before)


def table(rows: dict[str, Peaks]) -> str:
    """The peaks of each way, in Markdown."""
    lines = [
        "| training step | parameters | gradients alive | process |",
        "|---|---|---|---|",
        *(f"| {name} | {' | '.join(map(size, peaks))} |" for name, peaks in rows.items()),
    ]
    return "\n".join(lines)


def in_process(run: Callable[..., Peaks], *arguments: object) -> Peaks:
    """What a function returns, called in a new process.

    There glibc gives a freed tensor back to the system at once. By default it comes to keep tensors
    of up to 32 MB, in a heap whose gaps count as resident.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, arguments)


def main() -> None:
    """Measures every way and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gradient_release", description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    print(
        table(
            {
                name: in_process(measure, way, options.layers, options.width, options.steps)
                for name, way in WAYS.items()
            }
        )
    )


if __name__ == "__main__":
    main()
