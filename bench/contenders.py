"""Who is measured: our engines and the optimizers they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from fused_adamw import FusedAdamW, available_engines

ENGINES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
TORCH_FUSED, TORCH_FOREACH = "torch fused", "torch foreach"


@dataclass(frozen=True)
class Contender:
    """An optimizer by name; `make` takes parameters that have gradients."""

    name: str
    make: Callable[[list[Tensor]], Optimizer]
    ours: bool = False


def contenders(device: torch.device) -> list[Contender]:
    """Our engines that are present, the best first, then the others."""
    # torch's AdamW has these defaults too; here they stand so that both take the same.
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
    present = available_engines()
    return [
        *(
            Contender(f"ours {engine}", partial(FusedAdamW, engine=engine, **options), ours=True)
            for engine in ENGINES[device.type]
            if engine in present
        ),
        Contender(TORCH_FUSED, partial(AdamW, fused=True, **options)),
        Contender(TORCH_FOREACH, partial(AdamW, foreach=True, **options)),
    ]
