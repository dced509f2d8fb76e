"""How much memory a case takes, what of it fits, and whether it is more than a cache holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bench.cases import MODEL, SCALING_KINDS, Case
from bench.contenders import Contender
from bench.environment import cache_bytes, free_bytes
from bench.rules import Rule
from bench.stream import MEMORY, MOST_BYTES
from bench.units import size

# Of what is free, so much is taken at most.
SHARE_OF_FREE = 0.9
# Arrays of the parameters' size that one step may allocate besides (torch's foreach: up to two).
TEMPORARIES = 2
# Arrays that are so many times the last-level cache do not profit from it.
CACHES = 4
# A case that must be cut to less than this has nothing to do with its name.
LEAST_SHARE = 1 / 64


def _array_bytes(case: Case, rule: Rule) -> int:
    """What one contender works on: parameters, gradients and states."""
    return case.elements * case.task.array_bytes(rule, case.dtype)


def copies(case: Case, rule: Rule, device: torch.device) -> int:
    """How many lists are stepped in turns, so that none is still in the cache for a cold case."""
    if not case.cold:
        return 1
    return max(2, math.ceil(CACHES * cache_bytes(device) / _array_bytes(case, rule)))


def from_memory(case: Case, rule: Rule, device: torch.device) -> bool:
    """Whether a step has to fetch its arrays from beyond the cache."""
    return case.cold or _array_bytes(case, rule) >= CACHES * cache_bytes(device)


def stream_bytes(case: Case, rule: Rule, device: torch.device) -> int:
    """Bytes that a pass of the streams moves; 0 where the case says nothing of the memory."""
    if not from_memory(case, rule, device):
        return 0
    return min(case.elements * case.task.stream_bytes(rule, case.dtype), MOST_BYTES)


def fitted(
    case: Case, rule: Rule, contenders: Sequence[Contender], device: torch.device
) -> tuple[Case, str]:
    """Fits a case, with everyone's states, into the memory that is free.

    Returns:
        The case, or the part of it that fits; and why none of it does, if so.
    """
    free = free_bytes(device)
    if free is None:
        return case, ""
    item = case.dtype.itemsize
    lists = copies(case, rule, device)
    states = sum(
        rule.states * (contender.state_itemsize or (contender.dtype or case.dtype).itemsize)
        + contender.kept_besides
        for contender in contenders
    )
    dtypes = {contender.dtype or case.dtype for contender in contenders}
    arrays = (1 + case.task.grad_arrays) * sum(dtype.itemsize for dtype in dtypes)
    each = lists * (arrays + states) + TEMPORARIES * item
    streams = (1 if case.task.only_reads else MEMORY) * lists * stream_bytes(case, rule, device)
    needed, room = case.elements * each + streams, SHARE_OF_FREE * free
    if needed <= room:
        return case, ""
    why = f"needs {size(needed)}, {size(free)} are free"
    most = int((room - streams) / each)
    least = max(case.tensors, int(LEAST_SHARE * case.elements))
    if case.kind in SCALING_KINDS or most < least:
        return case, why
    return (case.truncated if case.kind == MODEL else case.scaled)(most, why), ""
