"""Host time of a step over DTensors, beside plain tensors and beside torch's fused AdamW.

A process group of one rank is enough for that: the parameters are DTensors, and what a step does
with them on the host is the same. On a CPU the host computes too: little over so small shards::

    python -m bench.sharded --tensors 1000 --numel 16 --json FILE
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed, nn, optim

from bench.environment import describe
from bench.timing import Call, Series, interleave, median, ratio, spread, warm_up
from fused_adamw import FusedAdamW

OURS, OURS_PLAIN, TORCH = "ours, DTensors", "ours, plain tensors", "torch-fused, DTensors"
CLIPPED, CLIPPED_PLAIN = "ours, clipped, DTensors", "ours, clipped, plain tensors"
TORCH_PLAIN = "torch-fused, plain tensors"
# What is held against what: at most so many times as slow, at least so many times as fast.
BOUNDS = [(OURS, OURS_PLAIN, "at most", 2.0), (CLIPPED, CLIPPED_PLAIN, "at most", 2.0)]
GAINS = [(OURS, TORCH, "at least", 10.0)]


def contenders(tensors: int, numel: int, device: torch.device) -> dict[str, Call]:
    """The steps by name, each over parameters of its own."""
    made: dict[str, tuple[Callable[[Sequence[Tensor]], Any], bool]] = {
        OURS: (FusedAdamW, True),
        OURS_PLAIN: (FusedAdamW, False),
        CLIPPED: (partial(FusedAdamW, max_grad_norm=1.0), True),
        CLIPPED_PLAIN: (partial(FusedAdamW, max_grad_norm=1.0), False),
        TORCH: (partial(optim.AdamW, fused=True), True),
        TORCH_PLAIN: (partial(optim.AdamW, fused=True), False),
    }
    return {
        name: make(_params(tensors, numel, device, is_sharded=is_sharded)).step
        for name, (make, is_sharded) in made.items()
    }


def _params(tensors: int, numel: int, device: torch.device, *, is_sharded: bool) -> list[Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh(device.type, (1,)) if is_sharded else None
    params: list[Tensor] = []
    for _ in range(tensors):
        value, grad = torch.randn(2, numel, device=device)
        if mesh is not None:
            value, grad = (distribute_tensor(x.clone(), mesh, [Shard(0)]) for x in (value, grad))
        params.append(nn.Parameter(value))
        params[-1].grad = grad
    return params


def measure(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, Series]:
    """Seconds of each step, in turns."""
    series = {name: Series(warm_up(call, device, 0.02)) for name, call in calls.items()}

    def stop(name: str, error: Exception) -> None:
        raise RuntimeError(f"{name} failed") from error

    interleave(calls, series, device, rounds, {}, on_round=lambda: None, on_error=stop)
    return series


def ratios(series: dict[str, Series]) -> list[tuple[str, float, str, float]]:
    """What is asked of the times: a sentence, the ratio found, and the bound."""
    found = []
    for ours, theirs, bound, number in BOUNDS:
        value = ratio(series[ours].host, series[theirs].host)
        found.append((f"{ours}: times the host time of {theirs}", value, bound, number))
    for ours, theirs, bound, number in GAINS:
        value = ratio(series[theirs].host, series[ours].host)
        found.append((f"{theirs}: times the host time of {ours}", value, bound, number))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes the samples to a file where one is named."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharded", description=__doc__)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--numel", type=int, default=16, help="elements of each tensor")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the samples go")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    with TemporaryDirectory() as folder:
        store = distributed.FileStore(f"{folder}/store", 1)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            calls = contenders(given.tensors, given.numel, device)
            series = measure(calls, device, given.rounds)
        finally:
            distributed.destroy_process_group()
    print(f"{given.tensors} tensors of {given.numel} float32 on {device}: host time of a step")
    for name, samples in series.items():
        print(f"  {name:30} {median(samples.host) * 1e6:10.0f} µs ± {spread(samples.host):.0%}")
    found = ratios(series)
    for words, value, bound, number in found:
        is_met = value <= number if bound == "at most" else value >= number
        print(f"  {words}: {value:.2f} ({bound} {number:g}{'' if is_met else ': missed'})")
    if given.json is not None:
        content = {
            "tensors": given.tensors,
            "numel": given.numel,
            "device": str(device),
            "environment": describe(device),
            "host_seconds": {name: samples.host for name, samples in series.items()},
            "ratios": {words: value for words, value, _, _ in found},
        }
        given.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
