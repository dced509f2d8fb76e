"""All that a training loop does between two backward passes: ours in one call, torch's in several.

The gradients are unscaled, where a loss was scaled, and clipped to a norm over all of them; the
rule updates the parameters; their exponential moving average follows, in float32; the gradients are
zeroed. Torch's part is what its documentation puts together for that, in the fastest form it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check import STEPS, Check, Sample, start_checked
from bench.clip_norm import NORM_ERROR, norm
from bench.contenders import Contender, Started, start_ours
from bench.peers import Peer, start_torch
from bench.rules import Rule
from bench.tasks import Task
from bench.timing import Call

EMA_DECAY = 0.6  # so small that an average that stands still is seen in bfloat16 too
GRAD_SCALE = 1024.0
F32_BYTES = 4

# Accesses to gradients beside the one of an update. Ours: the norm, zeroing.
_OURS = 2
_CLIPPED = 4  # the norm, shrinking (read, write), zeroing
_UNSCALED = 2
_FOLDED = 3  # the norm, the gradient that torch's fused step writes back, zeroing


class WholeStep(Task):
    """The whole step of a rule.

    A step leaves gradients of zero behind, which would not do for the next; so they are made anew,
    untimed, before each.

    Args:
        unscales: whether the loss was scaled, as `torch.amp.GradScaler` does.
    """

    grad_arrays = 2  # they are made anew from a copy
    norms = 1

    def __init__(self, *, unscales: bool) -> None:
        self.name = "whole-unscale" if unscales else "whole"
        self.unscales = unscales
        self._scale = GRAD_SCALE if unscales else 1.0

    def contenders(
        self, rule: Rule, dtype: torch.dtype, engines: list[str], peers: Sequence[Peer]
    ) -> list[Contender]:
        rule = rule.sensitive()
        found = [
            Contender(
                f"ours {engine}",
                partial(self._start_ours, rule, engine),
                ours=True,
                moved_besides=_OURS * dtype.itemsize,
                kept_besides=F32_BYTES,
            )
            for engine in engines
        ]
        widened = 0 if dtype == torch.float32 else F32_BYTES
        kept = F32_BYTES + widened
        average = 3 * F32_BYTES + (dtype.itemsize + widened if widened else 0)
        clipped = (_CLIPPED + _UNSCALED * self.unscales) * dtype.itemsize + average
        for peer in peers:
            if peer.kind not in ("fused", "foreach"):
                continue
            start = partial(self._start_torch, rule, peer.kind, _clip)
            found.append(Contender(peer.name, start, moved_besides=clipped, kept_besides=kept))
            if peer.kind == "fused":
                start = partial(self._start_torch, rule, peer.kind, _fold)
                moved = _FOLDED * dtype.itemsize + average
                name = f"{peer.name}, folded"
                found.append(Contender(name, start, moved_besides=moved, kept_besides=kept))
        return found

    def before(self, params: Sequence[Tensor]) -> Call:
        grads = _grads(params)
        kept = [grad * self._scale for grad in grads]
        return lambda: torch._foreach_copy_(grads, kept)

    def start_checked(
        self,
        contender: Contender,
        rule: Rule,
        params: list[Tensor],
        sample: Sample,
        before: Call | None,
    ) -> tuple[Started, Check]:
        """The reference, which has a sample of the gradients only, is told their norm's factor."""
        assert before is not None
        before()
        unscaled = norm(params) / self._scale
        coefficient = min(1.0, self._max_grad_norm(params) / (unscaled + 1e-6))
        rule = rule.sensitive()

        def start_reference(expected: list[Tensor]) -> Started:
            return _with_averages(
                start_ours(rule, "reference", expected, ema_decay=EMA_DECAY, zero_grads=True),
                expected,
                torch.tensor(self._scale / coefficient, dtype=torch.float64),
            )

        return start_checked(
            contender,
            params,
            sample,
            start_reference,
            before=before,
            slack=0.0 if self.unscales else NORM_ERROR * STEPS * rule.options["lr"],
        )

    def array_bytes(self, rule: Rule, dtype: torch.dtype) -> int:
        return super().array_bytes(rule, dtype) + F32_BYTES

    def _max_grad_norm(self, params: Sequence[Tensor]) -> float:
        """A tenth of the norm that the gradients are expected to have, or ten times that norm.

        Clipping hides what scaling does. So that neither may be missing unseen, gradients that have
        a scale exceed the limit, and then by a hundred times, only where they are not unscaled.
        """
        usual = math.sqrt(sum(param.numel() for param in params))
        return 10 * usual if self.unscales else usual / 10

    def _scale_tensor(self, device: torch.device) -> Tensor | None:
        """As GradScaler keeps it."""
        return torch.tensor(self._scale, device=device) if self.unscales else None

    def _start_ours(self, rule: Rule, engine: str, params: list[Tensor]) -> Started:
        started = start_ours(
            rule,
            engine,
            params,
            max_grad_norm=self._max_grad_norm(params),
            skip_nonfinite=self.unscales,
            ema_decay=EMA_DECAY,
            zero_grads=True,
        )
        scale = self._scale_tensor(params[0].device)
        return _with_averages(started, params, scale)

    def _start_torch(self, rule: Rule, kind: str, clip: _Clip, params: list[Tensor]) -> Started:
        """Several passes; the gradients' list is made once, as they stay where they are."""
        optimizer: Any = start_torch(rule, params, **{kind: True}).optimizer
        grads = _grads(params)
        limit = self._max_grad_norm(params)
        scale = self._scale_tensor(params[0].device)
        update_averages, averages = _averaging(params)
        zero = _zeroing(grads)

        @torch.no_grad()
        def step() -> None:
            found_inf = clip(optimizer, params, grads, limit, scale)
            if kind == "fused":
                optimizer.found_inf = found_inf
                optimizer.step()
            elif found_inf is None or not found_inf.item():  # as GradScaler does
                optimizer.step()
            update_averages()
            zero()

        return Started(optimizer, step, lambda: averages)


# Scales gradients, or sees to it; returns whether the step is to be skipped, where it may be.
_Clip = Callable[[Any, list[Tensor], list[Tensor], float, Tensor | None], Tensor | None]


def _clip(
    optimizer: Any, params: list[Tensor], grads: list[Tensor], limit: float, scale: Tensor | None
) -> Tensor | None:
    """As documented: what `GradScaler.unscale_` calls, then `clip_grad_norm_`."""
    found_inf = None
    if scale is not None:
        found_inf = torch.zeros((), device=scale.device)
        torch._amp_foreach_non_finite_check_and_unscale_(
            grads, found_inf, scale.double().reciprocal().float()
        )
    torch.nn.utils.clip_grad_norm_(params, limit, foreach=True)
    return found_inf


def _fold(
    optimizer: Any, params: list[Tensor], grads: list[Tensor], limit: float, scale: Tensor | None
) -> Tensor | None:
    """One factor for both, handed to the fused step as the scale that it divides by."""
    total = torch.nn.utils.get_total_norm(grads, foreach=True)
    if scale is None:
        scale = torch.ones((), device=total.device)
    coefficient = (limit / (total / scale + 1e-6)).clamp(max=1.0)
    optimizer.grad_scale = (scale / coefficient).float()
    return (~total.isfinite()).float()


def _zeroing(grads: list[Tensor]) -> Call:
    return partial(torch._foreach_zero_, grads)


def _averaging(params: Sequence[Tensor]) -> tuple[Call, list[Tensor]]:
    """As `torch.optim.swa_utils.AveragedModel` and `get_ema_multi_avg_fn`; and the averages.

    `torch._foreach_lerp_` takes one dtype only, so others are widened before, to memory kept.
    """
    current = [param.detach() for param in params]
    averages = [torch.empty_like(param, dtype=torch.float32) for param in current]
    widens = params[0].dtype != torch.float32
    wide = [torch.empty_like(average) for average in averages] if widens else current
    update = partial(torch._foreach_lerp_, averages, wide, 1 - EMA_DECAY)
    begun = False

    def call() -> None:
        nonlocal begun
        if widens:
            torch._foreach_copy_(wide, current)
        if begun:
            update()
        else:
            torch._foreach_copy_(averages, wide)
            begun = True

    return call, averages


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _with_averages(started: Started, params: list[Tensor], scale: Tensor | None) -> Started:
    """One of ours whose gradients have a scale, and where its averages are."""
    optimizer: Any = started.optimizer
    if scale is not None:
        optimizer.grad_scale = scale
    averages = lambda: [optimizer.state[param]["param_ema"] for param in params]  # noqa: E731
    return started._replace(averages=averages)


WHOLE, WHOLE_UNSCALE = WholeStep(unscales=False), WholeStep(unscales=True)
