"""How many launches a step takes.

The one module that looks behind the public interface of fused_adamw: how many launches its lists
take is no business of those who use them.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.contenders import Started
from bench.footprint import silence
from fused_adamw import _C


def count_launches(
    started: Started, ours: bool, device: torch.device, *, norms: int = 0, updates: int = 1
) -> int | None:
    """Kernels on a GPU, parallel regions of ours on a CPU; None where that cannot be known.

    Args:
        started: an optimizer that has stepped; it makes one step more.
        ours: whether it is one of our engines.
        device: where its tensors are.
        norms, updates: how often a step of ours goes through its lists for either.
    """
    optimizer: Any = started.optimizer
    if ours and getattr(optimizer, "engine", None) in ("cpu", "cuda"):
        started.step()  # registers the list, if someone has read the state since
        buckets = optimizer._registered.native.buckets()
        if device.type == "cpu":
            return (norms + updates) * len(buckets)
        if not norms:
            return updates * sum(map(_C.count_cuda_launches, buckets))
    return _kernels(started) if device.type == "cuda" else None


def _kernels(started: Started) -> int:
    """Kernels of a step, as the profiler sees them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with silence(), torch.profiler.profile(activities=activities) as profiler:
        started.step()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)
