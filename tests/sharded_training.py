"""Training of DTensors beside the same training of whole tensors in one process, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from family import DROP_INS
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, distribute_tensor

import fused_adamw
from fused_adamw.optimizer import FusedOptimizer

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOUD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
# The loudest of each class, and those that torch has no counterpart of.
RULES: list[tuple[type[FusedOptimizer], dict[str, Any]]] = [
    *((drop_in.ours, drop_in.loud) for drop_in in DROP_INS),
    (fused_adamw.FusedAdamW, {**LOUD, "amsgrad": True}),
    (fused_adamw.FusedSGD, {**LOUD, "momentum": 0.9, "dampening": 0.5}),
    (fused_adamw.FusedRMSprop, {**LOUD, "momentum": 0.9, "centered": True}),
    (fused_adamw.FusedAdamProx, LOUD),
    (fused_adamw.FusedLion, LOUD),
    (fused_adamw.FusedNadamW, LOUD),
    (fused_adamw.FusedSGDW, {**LOUD, "momentum": 0.9}),
]


class Format(NamedTuple):
    """Options of an optimizer and the dtype of its parameters."""

    options: dict[str, Any]
    dtype: torch.dtype = BF16


FORMATS = {
    "fp32": Format({}, F32),
    "fp32, bfloat16 states": Format({"state_dtype": BF16}, F32),
    "bf16": Format({"precision": "bf16"}),
    "fp16": Format({}, F16),
    "master": Format({"precision": "master"}),
    "master of fp16": Format({"precision": "master"}, F16),
    "split": Format({"precision": "split"}),
    "split, bfloat16 states": Format({"precision": "split", "state_dtype": BF16}),
    "kahan": Format({"precision": "kahan"}),
    "8bit of float32": Format({"precision": "8bit"}, F32),
    "8bit, 16-bit remainder": Format({"precision": "8bit", "remainder_bits": 16}),
}
DRAWING = {
    "stochastic": Format({"stochastic_rounding": True, "seed": 3}),
    "stochastic, float32 states": Format({"stochastic_rounding": True, "state_dtype": F32}),
    "8bit": Format({"precision": "8bit", "seed": 3}),
}


def drawn(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The same values on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def spread(whole: Tensor, mesh: DeviceMesh | None, placements: Sequence[Placement]) -> Tensor:
    """A DTensor of values that every rank has, without communication; without a mesh those."""
    if mesh is None:
        return whole.clone()
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def differing(found: Tensor, whole: Tensor) -> bool:
    """Whether a DTensor, or plain tensor, has other bits here than a whole tensor has there."""
    if isinstance(found, DTensor):
        expected = spread(whole.detach().reshape(found.shape), found.device_mesh, found.placements)
        return differing(found.to_local(), expected.to_local())  # type: ignore[attr-defined]
    as_bytes = [x.detach().contiguous().view(-1).view(torch.uint8) for x in (found, whole)]
    return found.dtype != whole.dtype or not torch.equal(*as_bytes)


class Pair:
    """An optimizer of sharded parameters and one of the whole.

    Args:
        make: of parameters an optimizer.
        shapes: of the parameters.
        dtype: theirs.
        meshes: of each parameter a mesh and placements; None: plain.
        stored: values as parameters and gradients have them in memory; by default row-major.
    """

    def __init__(
        self,
        make: Any,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        meshes: Sequence[tuple[DeviceMesh | None, Sequence[Placement]]],
        stored: Callable[[Tensor], Tensor] = Tensor.contiguous,
    ) -> None:
        self.shapes, self.dtype, self.meshes, self.stored = shapes, dtype, meshes, stored
        values = [stored(value) for value in drawn(shapes, dtype, 1)]
        self.params = [
            nn.Parameter(spread(value, *mesh)) for value, mesh in zip(values, meshes, strict=True)
        ]
        self.whole = [nn.Parameter(value) for value in values]
        self.optimizer, self.reference = make(self.params), make(self.whole)

    def set_grads(self, step: int, factor: float = 1.0) -> None:
        drawn_grads = drawn(self.shapes, self.dtype, 100 + step)
        grads = [self.stored(grad * factor) for grad in drawn_grads]
        for param, whole, grad, mesh in zip(
            self.params, self.whole, grads, self.meshes, strict=True
        ):
            param.grad, whole.grad = spread(grad, *mesh), grad

    def step(self, step: int) -> None:
        self.set_grads(step)
        self.optimizer.step()
        self.reference.step()

    def differences(self) -> list[str]:
        """What is not bit for bit the same on this rank."""
        found = []
        for i, (param, whole) in enumerate(zip(self.params, self.whole, strict=True)):
            if differing(param, whole):
                found.append(f"parameter {i}")
            state, expected = self.optimizer.state[param], self.reference.state[whole]
            if state.keys() != expected.keys():
                found.append(f"keys {sorted(state)} for {sorted(expected)} of parameter {i}")
                continue
            found += [f"{key} of {i}" for key in state if differing(state[key], expected[key])]
        return found
