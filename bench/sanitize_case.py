"""Runs every kernel once on a small list, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize_case

Each array is an allocation of its own that ends where the array ends, so that an access beyond it
is one beyond the allocation; without torch's cache the allocations are the device's own. All memory
comes filled from the host, so that a read of anything else is one of uninitialised memory.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from torch import Tensor

from fused_adamw import FORMATS, available_engines, functional

# What a kernel of the Adam family is compiled for: "l2" decay or another one, AMSGrad, dtypes.
VARIANTS = tuple(itertools.product(("lr", "l2"), (False, True), FORMATS))
STATES = 3
# (elements, elements off an alignment of 16 bytes): empty, less than an access, more than a chunk
# with a ragged end, unaligned.
TENSORS = ((0, 0), (1, 0), (7, 0), (4096, 0), (16384 + 2048 + 5, 0), (300, 1), (16384 + 3, 2))


def make(values: Tensor, dtype: torch.dtype, offset: int, device: torch.device) -> Tensor:
    """A copy that ends with its allocation and starts `offset` elements after the beginning."""
    stored = torch.cat([values[:offset], values]).to(dtype).to(device, copy=True)
    return stored[offset:]


def run(engine: str, decay: str, amsgrad: bool, dtypes: tuple[str, str, str]) -> None:
    """One step over all of TENSORS."""
    device = torch.device("cpu" if engine == "cpu" else "cuda")
    param_dtype, grad_dtype, state_dtype = (getattr(torch, name) for name in dtypes)
    slots = (param_dtype, grad_dtype, *[state_dtype] * STATES)
    lists: list[list[Tensor]] = [[] for _ in slots]
    for numel, offset in TENSORS:
        values = torch.linspace(0.1, 2.0, numel)
        for tensors, dtype in zip(lists, slots, strict=True):
            tensors.append(make(values, dtype, offset, device))
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = lists
    functional.adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs if amsgrad else [],
        [torch.tensor(float(i % 2)) for i in range(len(TENSORS))],
        amsgrad=amsgrad,
        beta1=0.9,
        beta2=0.99,
        lr=0.1,
        weight_decay=0.1,
        eps=1e-3,
        maximize=False,
        decay=decay,
        engine=engine,
    )


def main() -> int:
    """Runs the engines that are named, or all that work on a GPU here."""
    present = available_engines()
    here = [engine for engine in ("cuda", "triton") if engine in present]
    if not torch.cuda.is_available():
        here = []  # Triton may be there to interpret
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", action="append", choices=("cpu", "cuda", "triton"))
    engines = parser.parse_args().engine or here
    if not engines:
        print("no engine works on a GPU here", file=sys.stderr)
        return 1
    for engine in engines:
        for decay, amsgrad, dtypes in VARIANTS:
            run(engine, decay, amsgrad, dtypes)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(f"{engine}: {len(VARIANTS)} kernels over {len(TENSORS)} tensors each", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
