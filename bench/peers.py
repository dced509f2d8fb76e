"""The optimizers that ours are compared with: how each is driven, as its documentation says.

Every peer is asked for the same computation, with the states in the parameters' dtype where it has
the choice; what it does beyond that by default (Kahan summation, stochastic rounding, 8-bit states)
is turned off, but for entries of their own that are like a format of ours. What it computes is
checked all the same, see `check`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contenders import ENGINES, Contender, Started
from bench.rules import Rule


@dataclass(frozen=True)
class Peer:
    """A library's optimizer, or one form of torch's.

    Attributes:
        name: what the command line and tables call it.
        package: the distribution that it is in.
        start: starts it over parameters that have gradients.
        kind: for torch's, which of its forms; see `Rule.torch_kinds`.
        format: the format of ours that it is like, one of `precision.FORMATS`; empty for the plain
            ones.
        compiles: whether it compiles for every list or shape, which takes seconds each time.
        most_tensors, why_most, devices, state_itemsize: see `Contender`.
    """

    name: str
    package: str
    start: Callable[[Rule, list[Tensor]], Started]
    kind: str = ""
    format: str = ""
    compiles: bool = False
    most_tensors: int | None = None
    why_most: str = ""
    devices: tuple[str, ...] = tuple(ENGINES)
    state_itemsize: int | None = None

    @property
    def third_party(self) -> bool:
        """Whether it is none of torch's own."""
        return self.package != "torch"

    def version(self) -> str | None:
        """Of its package; None if that is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def has(self, rule: Rule) -> bool:
        """Whether it has the rule."""
        return self.name in rule.peers if self.third_party else self.kind in rule.torch_kinds

    def contender(self, rule: Rule) -> Contender:
        """The peer with a rule."""
        return Contender(
            self.name,
            partial(self.start, rule),
            most_tensors=self.most_tensors,
            why_most=self.why_most,
            devices=self.devices,
            state_itemsize=self.state_itemsize,
        )


def _plain(optimizer: Any) -> Started:
    return Started(optimizer, optimizer.step)


def start_torch(rule: Rule, params: list[Tensor], **kind: bool) -> Started:
    """`torch.optim`, with fused=True or foreach=True."""
    return _plain(getattr(torch.optim, rule.torch)(params, **kind, **rule.options))


def _compiled(rule: Rule, params: list[Tensor]) -> Started:
    """docs.pytorch.org, "Compiling the optimizer": the step under torch.compile."""
    # Past its limit of versions of one function torch would fall back to eager mode silently.
    torch._dynamo.config.recompile_limit = 1 << 10
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    optimizer: Any = start_torch(rule, params, foreach=True).optimizer

    @torch.compile
    def step() -> None:
        optimizer.step()

    return Started(optimizer, step)


def _optimi(rule: Rule, params: list[Tensor]) -> Started:
    """optimi.benjaminwarner.dev: chooses Triton or foreach itself; Kahan summation off."""
    import optimi

    return _plain(getattr(optimi, rule.peers["optimi"])(params, kahan_sum=False, **rule.options))


def _flashoptim(rule: Rule, params: list[Tensor]) -> Started:
    """Its README: without quantized states and extra weight bits; fused where there is a GPU."""
    import flashoptim

    make = getattr(flashoptim, rule.peers["flashoptim"])
    return _plain(
        make(
            params,
            quantize=False,
            master_weight_bits=None,
            fused=params[0].is_cuda,
            **rule.options,
        )
    )


def _flashoptim_8bit(rule: Rule, params: list[Tensor]) -> Started:
    """Its defaults, which need a GPU: 8-bit states, 8 bits beside a bfloat16 parameter, fused."""
    import flashoptim

    return _plain(getattr(flashoptim, rule.peers["flashoptim-8bit"])(params, **rule.options))


def _bitsandbytes(name: str, rule: Rule, params: list[Tensor]) -> Started:
    """huggingface.co/docs/bitsandbytes: with 32-bit states, always float32, or with 8-bit ones."""
    import bitsandbytes

    return _plain(getattr(bitsandbytes.optim, rule.peers[name])(params, **rule.options))


def _torchao(name: str, rule: Rule, params: list[Tensor], **options: Any) -> Started:
    """torchao/optim/README.md: states of the parameters' dtype or 8 bits, compiled for a shape."""
    import torchao.optim

    make = getattr(torchao.optim, rule.peers[name])
    return _plain(make(params, **rule.options, **options))


def _deepspeed(rule: Rule, params: list[Tensor]) -> Started:
    """deepspeed.readthedocs.io, "Optimizers": CPUAdam in host memory, FusedAdam on a GPU.

    Both are compiled by ninja when they are first used, and kept in torch's cache of extensions.
    """
    scripts = str(Path(sys.executable).parent)  # where an environment has ninja
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]
    family = rule.peers["deepspeed"]
    module: Any = importlib.import_module(f"deepspeed.ops.{family.lower()}")
    decoupled = rule.name == "adamw"
    if params[0].is_cuda:
        return _plain(
            getattr(module, f"Fused{family}")(params, adam_w_mode=decoupled, **rule.options)
        )
    return _plain(
        getattr(module, f"DeepSpeedCPU{family}")(
            params, adamw_mode=decoupled, fp32_optimizer_states=False, **rule.options
        )
    )


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch-fused", "torch", partial(start_torch, fused=True), kind="fused"),
        Peer("torch-foreach", "torch", partial(start_torch, foreach=True), kind="foreach"),
        Peer(
            "torch-compiled",
            "torch",
            _compiled,
            kind="compiled",
            compiles=True,
            most_tensors=200,
            why_most="compiling takes about 0.3 s a tensor",
        ),
        Peer("optimi", "torch-optimi", _optimi),
        Peer("flashoptim", "flashoptim", _flashoptim),
        Peer("flashoptim-8bit", "flashoptim", _flashoptim_8bit, format="8bit", devices=("cuda",)),
        Peer(
            "bitsandbytes",
            "bitsandbytes",
            partial(_bitsandbytes, "bitsandbytes"),
            state_itemsize=4,
        ),
        Peer(
            "bitsandbytes-8bit",
            "bitsandbytes",
            partial(_bitsandbytes, "bitsandbytes-8bit"),
            format="8bit float32",
        ),
        Peer("torchao", "torchao", partial(_torchao, "torchao"), compiles=True),
        Peer(  # in blocks of 256, its default, 1M elements are not a multiple and stay uncoded
            "torchao-8bit",
            "torchao",
            partial(_torchao, "torchao-8bit", block_size=64),
            format="8bit float32",
            compiles=True,
        ),
        Peer(
            "torchao-stochastic",
            "torchao",
            partial(_torchao, "torchao-stochastic", bf16_stochastic_round=True),
            format="bf16 stochastic",
            compiles=True,
        ),
        Peer("deepspeed", "deepspeed", _deepspeed),
    )
}
