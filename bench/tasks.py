"""What is timed of an optimizer: its step, or its step with one thing changed.

The whole step is in `whole_step`, the norm of the gradients in `clip_norm`, the formats in
`precision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.check import Check, Sample, start_checked
from bench.contenders import Contender, Started, ours, start_ours
from bench.footprint import bytes_per_param
from bench.peers import Peer
from bench.rules import Rule
from bench.timing import Call


class Task:
    """A step of the rule and nothing else, against every peer.

    Attributes:
        name: what the command line calls it; empty for the step.
        only_reads: whether it is held against passes that only read.
        shows_overhead: whether ours are forms of one step, and what they cost beyond the first is
            the result.
        grad_arrays: arrays of the gradients' size that exist once, whoever takes part.
        norms, updates: how often a step of ours goes through its lists for either.
    """

    name = ""
    only_reads = False
    shows_overhead = False
    grad_arrays = 1
    norms, updates = 0, 1

    def contenders(
        self, rule: Rule, dtype: torch.dtype, engines: list[str], peers: Sequence[Peer]
    ) -> list[Contender]:
        """Who takes part, our first engine first.

        Args:
            rule: of the update.
            dtype: of the case's parameters.
            engines: of ours.
            peers: that have the rule, in every format.
        """
        plain = [peer.contender(rule) for peer in peers if not peer.format]
        return [*ours(rule, engines), *plain]

    def before(self, params: Sequence[Tensor]) -> Call | None:
        """What is done, untimed, before each step; None where steps follow each other."""
        return None

    def start_checked(
        self,
        contender: Contender,
        rule: Rule,
        params: list[Tensor],
        sample: Sample,
        before: Call | None,
    ) -> tuple[Started, Check]:
        """Starts a contender, and finds out whether it computes what it should.

        Args:
            contender: whom to start.
            rule: of the update.
            params: on what.
            sample: of them.
            before: what this task's `before` returned for them.
        """
        return start_checked(contender, params, sample, partial(start_ours, rule, "reference"))

    def array_bytes(self, rule: Rule, dtype: torch.dtype) -> int:
        """Of all that a step works on, for each parameter: parameter, gradient and states."""
        return (2 + rule.states) * dtype.itemsize

    def stream_bytes(self, rule: Rule, dtype: torch.dtype) -> int:
        """For each parameter, what the streams move to be of the size of a step."""
        return rule.bytes_per_param(dtype)

    def bytes_per_param(
        self, started: Started, contender: Contender, rule: Rule, params: Sequence[Tensor]
    ) -> float:
        """Bytes that the contender must move for each parameter, in all its passes."""
        return bytes_per_param(started, rule, params) + contender.moved_besides


class Telemetry(Task):
    """A step that is observed, against the same step that is not."""

    name = "telemetry"
    shows_overhead = True

    def contenders(
        self, rule: Rule, dtype: torch.dtype, engines: list[str], peers: Sequence[Peer]
    ) -> list[Contender]:
        observed = [
            Contender(
                f"ours {engine}, telemetry",
                partial(start_ours, rule, engine, telemetry=True),
                ours=True,
            )
            for engine in engines
        ]
        pairs = zip(ours(rule, engines), observed, strict=True)
        return [contender for pair in pairs for contender in pair]


class ParamGroups(Task):
    """A step over a list that is divided into more and more param groups, all alike."""

    name = "groups"
    shows_overhead = True
    counts = (1, 2, 465)

    def contenders(
        self, rule: Rule, dtype: torch.dtype, engines: list[str], peers: Sequence[Peer]
    ) -> list[Contender]:
        fused = [peer for peer in peers if peer.kind == "fused"]
        return [
            replace(
                contender,
                name=f"{contender.name}, {count} group{'s' * (count > 1)}",
                start=partial(_start_divided, contender, count),
            )
            for contender in super().contenders(rule, dtype, engines, fused)
            for count in self.counts
        ]


def _start_divided(contender: Contender, count: int, params: list[Tensor]) -> Started:
    """Starts a contender over as many param groups, as nearly of one size as can be."""
    bounds = [len(params) * i // count for i in range(count + 1)]
    groups: list[Any] = [{"params": params[a:b]} for a, b in pairwise(bounds)]
    return contender.start(groups)


STEP = Task()
TELEMETRY = Telemetry()
GROUPS = ParamGroups()
