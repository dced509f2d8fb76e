"""What a step moves and what memory it takes, as found out from the optimizer itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.contenders import Started
from bench.rules import Rule


def bytes_per_param(started: Started, rule: Rule, params: Sequence[Tensor]) -> float:
    """Bytes that a step must move for each parameter, with the states that the optimizer keeps.

    The parameter and every state of its shape are read and written once, the gradient is read.
    Where an optimizer keeps states as something else than tensors, those of the rule are counted.
    """
    assert started.optimizer is not None
    total = elements = 0
    for param in params:
        state = started.optimizer.state[param]
        kept = [
            value.nbytes
            for key, value in state.items()
            if key != "step" and isinstance(value, Tensor) and value.shape == param.shape
        ]
        states = sum(kept) if len(kept) >= rule.states else rule.states * param.nbytes
        grad = param.grad.nbytes if param.grad is not None else 0
        total += 2 * param.nbytes + grad + 2 * states
        elements += param.numel()
    return total / elements


@contextmanager
def silence() -> Iterator[None]:
    """Hides what C++ writes to the standard error: torch's profiler announces itself there."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def extra_bytes(started: Started, device: torch.device) -> int:
    """The most memory that torch's allocator holds during a step beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        started.step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silence(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        started.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is given back
        most = max(most, held)
    return most
