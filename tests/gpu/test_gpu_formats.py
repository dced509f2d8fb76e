"""Storage formats on a GPU: the bits of the CPU, in steps, whole steps, replays and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from held_state import assert_same, everything
from torch import nn

import fused_adamw as fa
from fused_adamw import engine_status
from fused_adamw.optimizer import FusedOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WHOLE = {"max_grad_norm": 1.5, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True}
CHUNK = 16384
# Those below 4096 elements are not coded; the last ones lie off a 16-byte boundary.
ALIGNED = (1, 37, 2310, 4096, 64 * 100 + 13, CHUNK + 70, 3 * CHUNK + 1)
MISALIGNED = (300, 4096 + 37, CHUNK + 70)
RULES: dict[str, Any] = {
    "adamw": fa.FusedAdamW,
    "adamw amsgrad": partial(fa.FusedAdamW, amsgrad=True),
    "nadamw": fa.FusedNadamW,
    "sgd": fa.FusedSGD,
    "sgdw momentum": partial(fa.FusedSGDW, momentum=0.9),
    "rmsprop centered": partial(fa.FusedRMSprop, centered=True),
    "adagrad": fa.FusedAdagrad,
    "adadelta": fa.FusedAdadelta,
    "adamax": fa.FusedAdamax,
    "lion": fa.FusedLion,
}


@dataclass(frozen=True)
class Format:
    """What an optimizer is told, and the dtypes of parameters and gradients."""

    name: str
    param: torch.dtype
    grad: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


FORMATS = (
    Format("stochastic", BF16, BF16, {"precision": "bf16", "stochastic_rounding": True}),
    Format(
        "stochastic f32",
        BF16,
        F32,
        {"precision": "bf16", "stochastic_rounding": True, "state_dtype": F32},
    ),
    Format("master", BF16, BF16, {"precision": "master"}),
    Format("master f16", F16, F32, {"precision": "master"}),
    Format("split", BF16, BF16, {"precision": "split"}),
    Format("split bf16", BF16, F32, {"precision": "split", "state_dtype": BF16}),
    Format("kahan", BF16, BF16, {"precision": "kahan"}),
    Format("8bit", BF16, BF16, {"precision": "8bit"}),
    Format("8bit 16", BF16, F32, {"precision": "8bit", "remainder_bits": 16}),
    Format("8bit f32", F32, BF16, {"precision": "8bit"}),
)

all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)
both_engines = pytest.mark.parametrize("engine", ["cuda", "triton"])
# Triton compiles a kernel for each, in seconds; its interpreter runs the other rules elsewhere.
rules_of_engines = pytest.mark.parametrize(
    ("engine", "rule"), [*(("cuda", rule) for rule in RULES), ("triton", "adamw")]
)


def present(engine: str) -> str:
    reason = engine_status()[engine]
    if reason is not None:
        pytest.skip(f"engine {engine!r}: {reason}")
    return engine


def make(device: str, fmt: Format) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for off, numels in ((0, ALIGNED), (3, MISALIGNED)):
        for numel in numels:
            memory = torch.zeros(off + numel, dtype=fmt.param, device=device)
            memory[off:].copy_(torch.randn(numel, generator=generator))
            params.append(nn.Parameter(memory[off:]))
    return params


def set_grads(params: list[nn.Parameter], fmt: Format, t: int) -> None:
    """In place, as static buffers have it; every fifth element is zero, some are outliers."""
    generator = torch.Generator().manual_seed(t)
    for param in params:
        values = torch.randn(param.shape, generator=generator)
        values[::5] = 0
        values[3::97] *= 300
        grad = values.to(param.device, fmt.grad)
        if param.grad is None:
            param.grad_dtype = fmt.grad
            param.grad = grad
        else:
            param.grad.copy_(grad)


def start(rule: str, params: list[nn.Parameter], fmt: Format, **options: Any) -> FusedOptimizer:
    groups = [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:]}]
    made: FusedOptimizer = RULES[rule](
        groups, **{"lr": 0.05, "weight_decay": 0.1, **fmt.options, **options}
    )
    return made


@all_formats
@rules_of_engines
def test_the_bits_of_the_cpu(engine: str, rule: str, fmt: Format) -> None:
    """An infinite and a NaN gradient in the last step make blocks of codes NaN."""
    results = []
    for device, name in (("cpu", "cpu"), ("cuda", present(engine))):
        params = make(device, fmt)
        optimizer = start(rule, params, fmt, engine=name)
        for t in range(4):
            set_grads(params, fmt, t)
            if t == 3:
                assert params[4].grad is not None
                params[4].grad[[100, 4000]] = torch.tensor(
                    [torch.inf, torch.nan], dtype=fmt.grad, device=device
                )
            optimizer.step()
        results.append(everything(optimizer, params))
    assert_same(*results)


@all_formats
@pytest.mark.parametrize("rule", ["adamw", "adamw amsgrad", "sgdw momentum", "adamax"])
def test_whole_steps(rule: str, fmt: Format) -> None:
    """Clipped, averaged, observed, zeroed, with an overflow in between."""
    engine, results, observed = present("cuda"), [], []
    for device in ("cpu", "cuda"):
        params = make(device, fmt)
        name = engine if device == "cuda" else "cpu"
        optimizer = start(rule, params, fmt, engine=name, telemetry=True, **WHOLE)
        for t in range(6):
            set_grads(params, fmt, t)
            if t == 2:
                assert params[3].grad is not None
                params[3].grad[7] = torch.inf
            optimizer.step()
        assert all(not param.grad.any() for param in params if param.grad is not None)
        results.append(everything(optimizer, params))
        observed.append(optimizer.telemetry())
    assert_same(*results)
    assert observed[0] == observed[1]


@all_formats
def test_graph_replays_with_new_random_bits(fmt: Format) -> None:
    """Each replay counts its step on the device, which the bits follow."""
    engine = present("cuda")
    on_cpu, params = make("cpu", fmt), make("cuda", fmt)
    host = start("adamw", on_cpu, fmt, engine="cpu", **WHOLE)
    optimizer = start("adamw", params, fmt, engine=engine, capturable=True, **WHOLE)
    set_grads(on_cpu, fmt, 0)
    host.step()
    set_grads(params, fmt, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(1, 6):
        set_grads(on_cpu, fmt, t)
        set_grads(params, fmt, t)
        host.step()
        graph.replay()
    assert_same(everything(host, on_cpu), everything(optimizer, params))


@all_formats
@both_engines
def test_checkpoints_move_between_devices(engine: str, fmt: Format) -> None:
    """Trained on the GPU, then on the CPU, as if there all along."""
    on_cpu, params = make("cpu", fmt), make("cuda", fmt)
    host = start("adamw", on_cpu, fmt, engine="cpu")
    optimizer = start("adamw", params, fmt, engine=present(engine))
    for t in range(2):
        for one, its in ((host, on_cpu), (optimizer, params)):
            set_grads(its, fmt, t)
            one.step()
    moved = make("cpu", fmt)
    resumed = start("adamw", moved, fmt, engine="cpu")
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for target, source in zip(moved, params, strict=True):
            target.copy_(source)
    for one, its in ((host, on_cpu), (resumed, moved)):
        set_grads(its, fmt, 2)
        one.step()
    assert_same(everything(host, on_cpu), everything(resumed, moved))
