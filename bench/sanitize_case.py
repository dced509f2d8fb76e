"""Runs every kernel once on a small list, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize_case

Each array is an allocation of its own that ends where the array ends, so that an access beyond it
is one beyond the allocation; without torch's cache the allocations are the device's own. All memory
is filled, so that a read of anything else is one of uninitialised memory.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw import (
    FORMATS,
    FusedAdadelta,
    FusedAdagrad,
    FusedAdam,
    FusedAdamax,
    FusedAdamW,
    FusedLion,
    FusedNadam,
    FusedNadamW,
    FusedRMSprop,
    FusedSGD,
    available_engines,
)

FLAGS = (False, True)
# One for each functor that kernels are compiled for.
OPTIMIZERS: tuple[Callable[..., torch.optim.Optimizer], ...] = (
    *[partial(FusedAdamW, amsgrad=amsgrad) for amsgrad in FLAGS],
    *[partial(FusedAdam, amsgrad=amsgrad) for amsgrad in FLAGS],
    FusedNadamW,
    FusedNadam,
    FusedSGD,
    *[partial(FusedSGD, momentum=0.9, nesterov=nesterov) for nesterov in FLAGS],
    *[
        partial(FusedRMSprop, centered=centered, momentum=momentum)
        for centered, momentum in itertools.product(FLAGS, (0.0, 0.9))
    ],
    FusedAdagrad,
    FusedAdadelta,
    FusedAdamax,
    FusedLion,
)
# CUDA has kernels of their own for these; another one takes all mixed formats, which go round, as
# do those with something beside the parameter and those with codes.
UNIFORM = tuple((dtype,) * 3 for dtype in ("float32", "bfloat16"))
MIXED = tuple(dtypes for dtypes in FORMATS if dtypes not in UNIFORM)


class Case(NamedTuple):
    """A step: of which optimizer, on which dtypes of param, grad and states, and how."""

    optimizer: Callable[..., torch.optim.Optimizer]
    dtypes: tuple[str, str, str | None]
    options: dict[str, Any]


_BF16, _F16, _F32 = "bfloat16", "float16", "float32"
_STOCHASTIC = {"precision": "bf16", "stochastic_rounding": True}
JOINED: tuple[tuple[tuple[str, str, str], dict[str, Any]], ...] = (
    ((_BF16, _BF16, _BF16), _STOCHASTIC),
    ((_BF16, _F32, _F32), {"precision": "master"}),
    ((_BF16, _BF16, _F32), {"precision": "split"}),
    ((_BF16, _BF16, _BF16), {"precision": "kahan"}),
    ((_BF16, _F32, _F32), _STOCHASTIC),
    ((_F16, _F16, _F32), {"precision": "master"}),
    ((_BF16, _F32, _BF16), {"precision": "split"}),
)
CODED: tuple[tuple[tuple[str, str, None], dict[str, Any]], ...] = (
    ((_BF16, _BF16, None), {"precision": "8bit"}),
    ((_BF16, _F32, None), {"precision": "8bit", "remainder_bits": 16}),
    ((_F32, _BF16, None), {"precision": "8bit"}),
)
WHOLE = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True}


def _cases() -> Iterator[Case]:
    """Every functor with every storage, by itself and as a whole step."""
    for i, optimizer in enumerate(OPTIMIZERS):
        mixed = MIXED[i % len(MIXED)]
        for dtypes in (*UNIFORM, mixed):
            yield Case(optimizer, dtypes, {})
        for dtypes in (UNIFORM[0], mixed):
            yield Case(optimizer, dtypes, WHOLE)
        joined, options = JOINED[i % len(JOINED)]
        yield Case(optimizer, joined, options)
        for dtypes, options in (JOINED[(i + 1) % len(JOINED)], CODED[i % len(CODED)]):
            yield Case(optimizer, dtypes, {**options, **WHOLE})


CASES = tuple(_cases())


def cases_of(engine: str) -> tuple[Case, ...]:
    """All; of Triton, which compiles each for seconds, beside plain steps only AdamW's."""
    if engine != "triton":
        return CASES
    return tuple(case for case in CASES if not case.options or case.optimizer is OPTIMIZERS[0])


# (elements, elements off an alignment of 16 bytes): empty, less than an access, more than a chunk
# with a ragged end, unaligned.
TENSORS = ((0, 0), (1, 0), (7, 0), (4096, 0), (16384 + 2048 + 5, 0), (300, 1), (16384 + 3, 2))


def make(numel: int, dtype: str, offset: int, device: torch.device) -> Tensor:
    """An array that ends with its allocation and starts `offset` elements after the beginning."""
    values = torch.linspace(0.1, 2.0, offset + numel)
    return values.to(getattr(torch, dtype)).to(device, copy=True)[offset:]


def run(engine: str, case: Case) -> None:
    """One step over all of TENSORS, observed where the engine does that."""
    device = torch.device("cpu" if engine == "cpu" else "cuda")
    param_dtype, grad_dtype, state_dtype = case.dtypes
    params = []
    for numel, offset in TENSORS:
        param = make(numel, param_dtype, offset, device).requires_grad_()
        param.grad_dtype = getattr(torch, grad_dtype)
        param.grad = make(numel, grad_dtype, offset, device)
        params.append(param)
    options = {"lr": 0.1, "weight_decay": 0.1, "engine": engine, **case.options}
    if state_dtype is not None:
        options["state_dtype"] = getattr(torch, state_dtype)
    if case.options.keys() >= WHOLE.keys():
        options["telemetry"] = engine != "triton"
    # States are allocations of their own, which end where they end.
    case.optimizer(params, **options).step()


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
        cases = cases_of(engine)
        for case in cases:
            run(engine, case)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(f"{engine}: {len(cases)} cases over {len(TENSORS)} tensors each", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
