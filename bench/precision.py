"""The formats in which parameters and states are stored: a step in each, beside one in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check import SAMPLE, STEPS, TOLERANCE, Check, Sample, start_checked
from bench.contenders import Contender, Started, start_ours
from bench.peers import Peer
from bench.rules import Rule
from bench.tasks import Task
from bench.timing import Call
from fused_adamw import MemoryReport
from fused_adamw.precision import LEAST_CODED

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Format:
    """A format of ours.

    Attributes:
        name: what tables call it.
        dtype: of the parameters and gradients.
        options: of the optimizer.
        nearest: the name of the format that differs in how it rounds alone, if one does.
    """

    name: str
    dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)
    nearest: str = ""


BASE = "fp32"
FORMATS = {
    format.name: format
    for format in (
        Format(BASE, F32),
        Format("bf16", BF16),
        Format("bf16 stochastic", BF16, {"stochastic_rounding": True}, nearest="bf16"),
        Format("bf16, float32 states", BF16, {"state_dtype": F32}),
        Format("master", BF16, {"precision": "master"}),
        Format("split", BF16, {"precision": "split"}),
        Format("split, bfloat16 states", BF16, {"precision": "split", "state_dtype": BF16}),
        Format("kahan", BF16, {"precision": "kahan"}),
        Format("8bit", BF16, {"precision": "8bit"}),
        Format("8bit, 16-bit remainder", BF16, {"precision": "8bit", "remainder_bits": 16}),
        Format("8bit float32", F32, {"precision": "8bit"}),
    )
}

# What any format may be off by from a step in float32: it keeps the parameter or the states in as
# little as bfloat16 or a code of 8 bits, whose steps are of that size (1/32 of a number, and of the
# largest of its block 1/512). Without its decay AdamW errs by 0.27 |parameter|.
NEAR = TOLERANCE[BF16]


class Precision(Task):
    """A step in every format, and in those of peers that are like one of ours.

    The case's parameters are in float32; those that a format has in bfloat16 are a list of as many,
    with gradients in bfloat16.
    """

    name = "precision"

    def contenders(
        self, rule: Rule, dtype: torch.dtype, engines: list[str], peers: Sequence[Peer]
    ) -> list[Contender]:
        rule = rule.sensitive()
        found = []
        for engine in engines:
            named = {name: f"ours {engine}, {name}" for name in FORMATS}
            for format in FORMATS.values():
                start = partial(start_ours, rule, engine, **format.options)
                base = BASE if format.name != BASE else ""
                against = {name: named[name] for name in (base, format.nearest) if name}
                plain = Contender(named[format.name], start, ours=True, against=against)
                found.append(_in_format(plain, rule, format))
        for peer in peers:
            if peer.format:
                ours = {peer.format: f"ours {engines[0]}, {peer.format}"} if engines else {}
                plain = replace(peer.contender(rule), against=ours)
                found.append(_in_format(plain, rule, FORMATS[peer.format]))
        return found

    def start_checked(
        self,
        contender: Contender,
        rule: Rule,
        params: list[Tensor],
        sample: Sample,
        before: Call | None,
    ) -> tuple[Started, Check]:
        """Compares everyone with float32 on a sample, ours with its format's exact bits as well.

        Exact are the first tensors, from their first element on: a code depends on the other
        elements of its block, random bits on where an element is.
        """
        rule = rule.sensitive()
        beginnings = _beginnings(params) if contender.ours else []
        exactly = {"precision": "split"} if params[0].dtype == BF16 else {}
        started, check = start_checked(
            contender,
            params,
            sample,
            partial(start_ours, rule, "reference", **exactly),
            tolerance=NEAR,
        )
        if not contender.ours or not check.passed:
            return started, check
        assert contender.like is not None
        reference = contender.like(beginnings)
        for _ in range(STEPS):
            reference.step()
        errors = [
            (param.detach().view(-1)[: wanted.numel()].cpu().double() - wanted.double()).abs().max()
            for param, wanted in zip(params, (w.detach() for w in beginnings), strict=False)
        ]
        return started, Check(torch.stack(errors).max().item(), 0.0)

    def bytes_per_param(
        self, started: Started, contender: Contender, rule: Rule, params: Sequence[Tensor]
    ) -> float:
        """Those of the format, as the optimizer reports them."""
        assert contender.like is not None
        report = _report(contender.like(list(params)))
        return report.per_parameter(report.moved)


def _report(started: Started) -> MemoryReport:
    optimizer: Any = started.optimizer
    report: MemoryReport = optimizer.memory_report()
    return report


def _in_format(contender: Contender, rule: Rule, format: Format) -> Contender:
    """Itself, with what it takes part with: its dtype, its memory, the smallest tensor for it."""
    like = partial(start_ours, rule, "reference", **format.options)
    planned = torch.empty(1 << 20, dtype=format.dtype, device="meta").requires_grad_()
    report = _report(like([planned]))
    rest = report.total - sum(report.held[kind] for kind in ("parameters", "gradients", "states"))
    coded = report.held["scales"] > 0
    return replace(
        contender,
        dtype=format.dtype,
        like=like,
        state_itemsize=report.held["states"] // (report.numel * rule.states),
        kept_besides=math.ceil(report.per_parameter(rest)),
        least_elements=LEAST_CODED if coded else 0,
        why_least="states of smaller tensors are not coded" if coded else "",
    )


def _beginnings(params: Sequence[Tensor]) -> list[Tensor]:
    """Copies, with gradients, of the first elements of the first tensors, in host memory."""
    found: list[Tensor] = []
    left = SAMPLE
    for param in params:
        if left <= 0:
            break
        assert param.grad is not None
        copy = param.detach().view(-1)[:SAMPLE].cpu().clone().requires_grad_()
        copy.grad = param.grad.view(-1)[:SAMPLE].cpu().clone()
        found.append(copy)
        left -= copy.numel()
    return found


PRECISION = Precision()
