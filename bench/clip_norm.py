"""The norm of all gradients alone: what clipping costs beside an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check import Check, Sample
from bench.contenders import Contender, Started, start_ours
from bench.peers import Peer
from bench.rules import Rule
from bench.tasks import Task
from bench.timing import Call

# How far, relative to it, others' norms may be off. They are sums of float32: torch's on a CPU, of
# 64M elements, is short of half a percent. Ours is the exact one's nearest float32.
NORM_ERROR = 0.01


def norm(params: Sequence[Tensor]) -> float:
    """Of their gradients, by sums of float64."""
    norms = [
        torch.linalg.vector_norm(param.grad, dtype=torch.float64).item()
        for param in params
        if param.grad is not None
    ]
    return math.sqrt(math.fsum(x * x for x in norms))


class ClipNorm(Task):
    """The norm of the gradients.

    Ours is timed by a step of which nothing else is left: one gradient is infinite, and the step,
    asked to skip what is not finite, ends when it has the norm. Torch's is given the same.
    """

    name = "norm"
    only_reads = True
    norms, updates = 1, 0

    def contenders(
        self, rule: Rule, dtype: torch.dtype, engines: list[str], peers: Sequence[Peer]
    ) -> list[Contender]:
        found = [
            Contender(f"ours {engine}", partial(_start_ours, rule, engine), ours=True)
            for engine in engines
        ]
        if any(not peer.third_party for peer in peers):
            found.append(Contender("torch get_total_norm", _start_torch))
        return found

    def start_checked(
        self,
        contender: Contender,
        rule: Rule,
        params: list[Tensor],
        sample: Sample,
        before: Call | None,
    ) -> tuple[Started, Check]:
        started = contender.start(params)
        _set_first(params, 1.0)
        wanted = torch.tensor(norm(params), dtype=torch.float32).item()
        _set_first(params, math.inf)
        assert started.grad_norm is not None
        error = abs(started.grad_norm.item() / wanted - 1)
        return started, Check(error, 0.0 if contender.ours else NORM_ERROR)

    def array_bytes(self, rule: Rule, dtype: torch.dtype) -> int:
        return dtype.itemsize

    stream_bytes = array_bytes

    def bytes_per_param(
        self, started: Started, contender: Contender, rule: Rule, params: Sequence[Tensor]
    ) -> float:
        """The gradient is read once."""
        return params[0].element_size()


def _set_first(params: Sequence[Tensor], value: float) -> None:
    assert params[0].grad is not None
    params[0].grad.view(-1)[0] = value


def _start_ours(rule: Rule, engine: str, params: list[Tensor]) -> Started:
    """After one step over finite gradients, which makes the states and has the norm."""
    started = start_ours(rule, engine, params, skip_nonfinite=True)
    optimizer: Any = started.optimizer
    _set_first(params, 1.0)
    started.step()
    grad_norm = optimizer.grad_norm
    _set_first(params, math.inf)
    return started._replace(grad_norm=grad_norm)


def _start_torch(params: list[Tensor]) -> Started:
    """As `torch.nn.utils.clip_grad_norm_` begins: it asks every parameter for its gradient."""

    def step() -> Tensor:
        grads = [param.grad for param in params if param.grad is not None]
        return torch.nn.utils.get_total_norm(grads, foreach=True)

    _set_first(params, 1.0)
    grad_norm = step()
    _set_first(params, math.inf)
    return Started(None, step, grad_norm=grad_norm)


NORM = ClipNorm()
