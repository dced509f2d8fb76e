"""Whether a contender computes the rule: before it is timed, on the tensors it is timed on.

A few steps on the whole list are compared with those of the NumPy reference on a sample of its
elements. Rules work element by element, so the reference needs no others; the sample has the first
and the last element of every tensor, where wrong loops stop early or run over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.contenders import Contender, Started, start_ours
from bench.rules import Rule

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
        return self._take([param.detach() for param in self._params])

    def grads(self) -> Tensor:
        """Copies of the gradients there."""
        return self._take([param.grad for param in self._params if param.grad is not None])

    def _take(self, tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(tensors, self._places, strict=True)
        return torch.cat([tensor.view(-1)[places] for tensor, places in pairs]).cpu()


def start_checked(
    contender: Contender, rule: Rule, params: list[Tensor], sample: Sample
) -> tuple[Started, Check]:
    """Starts a contender and compares its first steps with the reference's."""
    expected = sample.params().requires_grad_()
    expected.grad = sample.grads()
    started = contender.start(params)
    for _ in range(STEPS):
        started.step()
    reference = start_ours(rule, "reference", [expected])
    for _ in range(STEPS):
        reference.step()
    found, wanted = sample.params().double(), expected.detach().double()
    error = ((found - wanted).abs() / wanted.abs().clamp(min=1.0)).max().item()
    return started, Check(error, 0.0 if contender.ours else TOLERANCE[params[0].dtype])
