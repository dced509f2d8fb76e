"""Whether a contender computes the rule: before it is timed, on the tensors it is timed on.

A few steps on the whole list are compared with those of the NumPy reference on a sample of its
elements. Rules work element by element, so the reference needs no others; the sample has the first
and the last element of every tensor, where wrong loops stop early or run over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.contenders import Contender, Started
from bench.timing import Call

STEPS = 3
SAMPLE = 1 << 16  # elements in all, as far as the list has them
LEAST = 4  # elements of each tensor, as far as it has them

# The largest error that is taken for rounding, relative to max(1, |parameter|). In float32 each of
# the steps rounds some ten times by half an epsilon, for 15 in all. In bfloat16 parameter, moments
# and, in peers that work by many small operations, intermediate results are rounded, and the
# parameter is of the size of an update: 5 roundings a step by half an epsilon, for 7.5 in all.
# Without its decay, or with it on the other side of the update, AdamW at a learning rate of 0.1 and
# a decay of 1 errs by 0.27 |parameter| or by 0.02, which in bfloat16 is 35 or 2.5 epsilon.
TOLERANCE = {
    torch.float32: 32 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
}


@dataclass(frozen=True)
class Check:
    """What came of it.

    Attributes:
        error: the largest of the sample, relative to max(1, |parameter|).
        tolerance: the largest that is allowed: 0 for ours, which return the reference's bits.
    """

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the contender computes the rule; not so if a NaN is in one result only."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        found = f"computes something else: off by {self.error:.2g}"
        return f"{found}, {self.tolerance:.2g} allowed"


class Sample:
    """Places in a list of parameters.

    Args:
        params: the list; each tensor contiguous.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        share = max(LEAST, SAMPLE // max(1, len(params)))
        generator = torch.Generator().manual_seed(0)
        self._places = []
        for param in params:
            numel = param.numel()
            if numel <= share:
                places = torch.arange(numel)
            else:
                places = torch.randint(numel, (share,), generator=generator)
                places[0], places[1] = 0, numel - 1
            self._places.append(places.to(param.device))

    def params(self) -> Tensor:
        """Copies of the parameters there, one after another, in host memory."""
        return self.of([param.detach() for param in self._params])

    def grads(self) -> Tensor:
        """Copies of the gradients there."""
        return self.of([param.grad for param in self._params if param.grad is not None])

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copies of other tensors there, each of the shape of its parameter."""
        pairs = zip(tensors, self._places, strict=True)
        return torch.cat([tensor.view(-1)[places] for tensor, places in pairs]).cpu()


def start_checked(
    contender: Contender,
    params: list[Tensor],
    sample: Sample,
    start_reference: Callable[[list[Tensor]], Started],
    *,
    before: Call | None = None,
    slack: float = 0.0,
    tolerance: float | None = None,
) -> tuple[Started, Check]:
    """Starts a contender and compares its first steps with the reference's.

    Compared are the parameters, their averages where they are kept, and the gradients.

    Args:
        contender: whom to start.
        params: on what.
        sample: of them.
        start_reference: starts the reference on a sample of them.
        before: makes the gradients anew before each step.
        slack: what the contender may be off by beyond its rounding.
        tolerance: what it may be off by in all, ours too; None: as `Check` and `TOLERANCE` say.
    """
    if before is not None:
        before()
    expected, grads = sample.params().requires_grad_(), sample.grads()
    started = contender.start(params)
    for _ in range(STEPS):
        if before is not None:
            before()
        started.step()
    expected.grad = torch.empty_like(grads)
    reference = start_reference([expected])
    for _ in range(STEPS):
        expected.grad.copy_(grads)
        reference.step()
    pairs = [
        (sample.params(), expected.detach()),
        (sample.grads(), expected.grad),
        *((sample.of(started.averages()), average) for average in reference.averages()),
    ]
    # Of tensors: a NaN is the largest.
    errors = [
        ((found.double() - wanted).abs() / wanted.double().abs().clamp(min=1.0)).max()
        for found, wanted in pairs
    ]
    if tolerance is None:
        tolerance = 0.0 if contender.ours else TOLERANCE[params[0].dtype] + slack
    return started, Check(torch.stack(errors).max().item(), tolerance)
