"""What an optimizer holds, brought to the host and compared."""

from __future__ import annotations

import torch
from problems import same_bits
from torch import Tensor, nn

from fused_adamw.optimizer import FusedOptimizer

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def everything(optimizer: FusedOptimizer, params: list[nn.Parameter]) -> dict[str, Tensor]:
    found = {f"param {i}": param.detach().cpu() for i, param in enumerate(params)}
    for i, param in enumerate(params):
        found |= {f"{name} {i}": value.cpu() for name, value in optimizer.state[param].items()}
    return found


def assert_same(want: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert value.dtype == got[name].dtype, name
        if value.dtype in FLOATS:
            assert same_bits(value, got[name]), name
        else:
            assert torch.equal(value, got[name]), name
