"""What is measured: lists of tensors, the bytes a step moves over them, and what is aimed at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# What a step of AdamW reads (param, grad, exp_avg, exp_avg_sq) and writes (all but the gradient).
READ, WRITTEN = 4, 3

CPU, CUDA = "cpu", "cuda"
K, M = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Aim:
    """What a step should reach.

    Attributes:
        times_torch_fused: at least so many times as fast as torch's fused AdamW.
        of_limit: at least this fraction of the speed that memory allows.
        host_us: at most so many microseconds of host time.
    """

    times_torch_fused: float = 0.0
    of_limit: float = 0.0
    host_us: float = math.inf

    def __str__(self) -> str:
        times = f"{self.times_torch_fused:g}x" if self.times_torch_fused else ""
        share = f"{self.of_limit:.0%}" if self.of_limit else ""
        host = f"<{self.host_us:g} µs" if self.host_us < math.inf else ""
        return " ".join(filter(None, (times, share, host)))


@dataclass(frozen=True)
class Case:
    """A list of equal tensors, with gradients and states of the parameters' dtype.

    Attributes:
        name: what the command line calls it.
        tensors: how many there are.
        numel: elements of each.
        dtype: of parameters, gradients and states.
        aims: by type of device. A case is for the devices that are here.
    """

    name: str
    tensors: int
    numel: int
    dtype: torch.dtype = torch.float32
    aims: Mapping[str, Aim] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Parameters in the sense of a model's size."""
        return self.tensors * self.numel

    @property
    def bytes_per_param(self) -> int:
        """Bytes that a step must move for each, through memory: every array once each way."""
        return (READ + WRITTEN) * self.dtype.itemsize

    @property
    def step_bytes(self) -> int:
        """Bytes that a step must move."""
        return self.elements * self.bytes_per_param

    def shrunk(self, elements: int) -> Case:
        """Itself, or with smaller tensors, of `elements` in all; nothing is aimed at then."""
        if self.elements <= elements:
            return self
        numel = elements // self.tensors
        name = f"{self.name} cut to {self.tensors}x{numel}"
        return replace(self, numel=numel, name=name, aims=dict.fromkeys(self.aims, Aim()))


CASES = (
    Case("64M-float32", 1, 64 * M, aims={CPU: Aim(1.0, of_limit=0.95)}),
    Case("1M-float32", 1, M, aims={CPU: Aim(1.9)}),
    Case("64K-float32", 1, 64 * K, aims={CPU: Aim(4.0)}),
    Case("64M-bfloat16", 1, 64 * M, torch.bfloat16, {CPU: Aim(1.8)}),
    Case("128M-float32", 1, 128 * M, aims={CUDA: Aim(1.15, of_limit=0.94)}),
    Case("128M-bfloat16", 1, 128 * M, torch.bfloat16, {CUDA: Aim(1.25, of_limit=0.90)}),
    Case("1000x1024-float32", 1000, 1024, aims={CPU: Aim(15.0), CUDA: Aim(10.0)}),
    Case("1000x1024-bfloat16", 1000, 1024, torch.bfloat16, {CPU: Aim(15.0), CUDA: Aim()}),
    Case("1000x64-float32", 1000, 64, aims={CPU: Aim(30.0)}),
    Case("10000x64-float32", 10000, 64, aims={CUDA: Aim(12.0)}),
    # So little arithmetic that what is left is the host time of a step.
    Case("1000x1-float32", 1000, 1, aims={CPU: Aim(host_us=150), CUDA: Aim()}),
)


def cases_for(device: torch.device) -> list[Case]:
    """The cases of a type of device."""
    return [case for case in CASES if device.type in case.aims]


def make_params(case: Case, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Parameters with gradients: nonzero random numbers, each tensor an allocation of its own."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(case.numel, dtype=case.dtype, device=device, generator=generator)

    params = [draw().requires_grad_() for _ in range(case.tensors)]
    for param in params:
        param.grad = draw()
    return params
