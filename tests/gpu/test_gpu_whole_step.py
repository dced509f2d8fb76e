"""The whole step on a GPU: the bits of the CPU, no waiting, launches counted, graphs replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from family import CLASSES
from held_state import assert_same, everything
from problems import same_bits
from torch import Tensor, nn

from fused_adamw import FusedAdamW, engine_status
from fused_adamw.optimizer import FusedOptimizer
from fused_adamw.schedules import CosineWarmRestarts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(
        engine_status()["cuda"] is not None, reason=f"engine 'cuda': {engine_status()['cuda']}"
    ),
]

all_classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
RESTARTS = CosineWarmRestarts(3, T_mult=2)
SHAPES = ((33, 70), (70,), (1,), (0, 3), (20_000,))
WHOLE = {"max_grad_norm": 1.5, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True}


def make(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES
    ]


def set_grads(params: list[nn.Parameter], t: int) -> None:
    """In place, as static buffers have it."""
    generator = torch.Generator().manual_seed(t)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def start(cls: Any, params: list[nn.Parameter], **options: Any) -> FusedOptimizer:
    groups = [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:]}]
    optimizer: FusedOptimizer = cls(groups, **{"lr": 0.05, "weight_decay": 0.1, **options})
    return optimizer


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@all_classes
def test_the_bits_of_the_cpu(cls: Any, dtype: torch.dtype) -> None:
    """With every option, an overflow in between, and a schedule that the GPU evaluates."""
    runs = []
    for device in ("cpu", "cuda"):
        params = make(device, dtype)
        optimizer = start(cls, params, schedule=RESTARTS, **WHOLE)
        norms = []
        for t in range(8):
            set_grads(params, t)
            if t == 4:
                assert params[0].grad is not None
                params[0].grad[0, 0] = torch.inf
            optimizer.step()
            assert optimizer.grad_norm is not None
            norms.append(optimizer.grad_norm.cpu().clone())
        assert all(not param.grad.any() for param in params if param.grad is not None)
        runs.append((everything(optimizer, params), norms, optimizer.state_dict()))
    (want, want_norms, want_dict), (got, norms, got_dict) = runs
    assert_same(want, got)
    assert all(map(same_bits, want_norms, norms))
    for a, b in zip(want_dict["param_groups"], got_dict["param_groups"], strict=True):
        assert a["schedule_step"] == b["schedule_step"]


@pytest.mark.parametrize("engine", ["cuda", "triton"])
def test_grad_scaler(engine: str) -> None:
    if engine_status()[engine] is not None:
        pytest.skip(str(engine_status()[engine]))
    results = []
    for device, name in (("cpu", "cpu"), ("cuda", engine)):
        params = make(device)
        optimizer = start(FusedAdamW, params, engine=name)
        scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2)
        for t in range(6):
            set_grads(params, t)
            for param in params:
                assert param.grad is not None
                param.grad.mul_(scaler.get_scale())
            if t in (0, 3):
                assert params[1].grad is not None
                params[1].grad[5] = torch.nan
            scaler.scale(torch.ones((), device=device))
            scaler.step(optimizer)
            scaler.update()
        results.append(everything(optimizer, params))
    assert_same(*results)


def test_telemetry() -> None:
    found = []
    for device in ("cpu", "cuda"):
        params = make(device, torch.bfloat16)
        optimizer = start(FusedAdamW, params, telemetry=True)
        set_grads(params, 0)
        optimizer.step()
        found.append(optimizer.telemetry())
    assert found[0] == found[1]


def test_nothing_waits() -> None:
    params = make("cuda")
    optimizer = start(FusedAdamW, params, schedule=RESTARTS, telemetry=True, **WHOLE)
    scale, overflow = torch.tensor(4.0, device="cuda"), torch.tensor(0.0, device="cuda")
    optimizer.grad_scale, optimizer.found_inf = scale, overflow
    set_grads(params, 0)
    optimizer.step()
    with no_waiting():
        for _ in range(3):
            optimizer.step()


def kernels_of(optimizer: FusedOptimizer) -> list[str]:
    """Names of the kernels that one step launches."""
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "kernel" in event.name
    ]


def test_launches() -> None:
    """Of 465 param groups as many as of one: the update, and what the options add before it."""
    for options, expected in (
        ({}, ["update_kernel"]),
        ({"zero_grads": True, "ema_decay": 0.9}, ["update_kernel"]),
        (
            {"max_grad_norm": 1.0},
            ["square_sum_kernel", "fold_kernel", "tick_kernel", "update_kernel"],
        ),
        ({"capturable": True}, ["tick_kernel", "update_kernel"]),
    ):
        for groups in (1, 465):
            params = [nn.Parameter(torch.randn(64, device="cuda")) for _ in range(465)]
            for param in params:
                param.grad = torch.randn_like(param)
            size = 465 // groups
            optimizer = FusedAdamW(
                [{"params": params[g * size : (g + 1) * size]} for g in range(groups)],
                **options,  # type: ignore[arg-type]
            )
            found = kernels_of(optimizer)
            named = [kernel for kernel in found if "fused_adamw" in kernel]
            assert len(named) == len(expected), named
            assert all(name in kernel for name, kernel in zip(expected, named, strict=True))


@all_classes
def test_graph_replays_with_new_values(cls: Any) -> None:
    """Gradients, lr, eta, the limit, the scale and an overflow are written between replays."""
    on_cpu, params = make("cpu"), make("cuda")
    host = start(cls, on_cpu, schedule=RESTARTS, **WHOLE)
    lr = torch.tensor(0.05, dtype=torch.float64, device="cuda")
    limit = torch.tensor(1.5, device="cuda")
    options = {**WHOLE, "max_grad_norm": limit, "lr": lr, "capturable": True}
    optimizer = start(cls, params, schedule=RESTARTS, **options)
    optimizer.grad_scale = torch.tensor(1.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")

    set_grads(on_cpu, 0)
    host.step()
    stream = torch.cuda.Stream()
    set_grads(params, 0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    for t in range(1, 12):
        set_grads(on_cpu, t)
        set_grads(params, t)
        scale, overflow = 2.0 ** (t % 3), t in (3, 7)
        host.grad_scale = torch.tensor(scale)
        host.found_inf = torch.tensor(float(overflow))
        optimizer.grad_scale.fill_(scale)
        optimizer.found_inf.fill_(float(overflow))
        host.max_grad_norm = 1.0 + t / 8
        limit.fill_(1.0 + t / 8)
        for group in host.param_groups:
            group["lr"] = 0.05 / t
        lr.fill_(0.05 / t)
        host.step()
        graph.replay()
        assert all(not param.grad.any() for param in params if param.grad is not None)
    assert_same(everything(host, on_cpu), everything(optimizer, params))


def test_graph_of_forward_backward_and_step() -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).cuda()
        optimizer = FusedAdamW(
            model.parameters(),
            lr=torch.tensor(0.01, device="cuda"),
            capturable=True,
            schedule=RESTARTS,
            zero_grads=True,
        )
        inputs = torch.zeros(8, 16, device="cuda")

        def train(
            model: nn.Module = model,
            inputs: Tensor = inputs,
            optimizer: FusedOptimizer = optimizer,
        ) -> None:
            model(inputs).square().sum().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for t in range(3):
                inputs.fill_(t)
                train()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                train()
        for t in range(10):
            inputs.copy_(torch.randn(8, 16, generator=torch.Generator().manual_seed(t)))
            graph.replay() if captured else train()
        results.append(everything(optimizer, list(model.parameters())))
    assert_same(*results)


def captured(optimizer: FusedOptimizer) -> torch.cuda.CUDAGraph:
    """A graph of one step, after one outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize("between", ["checkpoint", "steps", "another capture"])
def test_graph_replays_after_other_use(between: str) -> None:
    """Of the optimizer between capture and replay, with other values and gradients."""
    on_cpu, params = make("cpu"), make("cuda")
    host = start(FusedAdamW, on_cpu, schedule=RESTARTS, **WHOLE)
    lr = torch.tensor(0.05, dtype=torch.float64, device="cuda")
    optimizer = start(FusedAdamW, params, schedule=RESTARTS, lr=lr, capturable=True, **WHOLE)
    set_grads(on_cpu, 0)
    set_grads(params, 0)
    host.step()
    graph = captured(optimizer)

    def step_outside(t: int) -> None:
        for made, stepped in ((on_cpu, host), (params, optimizer)):
            set_grads(made, t)
            stepped.param_groups[0]["weight_decay"] = 0.4
            kept, made[1].grad = made[1].grad, None
            stepped.step()
            made[1].grad = kept
            stepped.param_groups[0]["weight_decay"] = 0.2

    taken = []  # memory that was freed is given out again, and written
    for t in range(1, 9):
        if between == "checkpoint":
            optimizer.state_dict()
        elif between == "steps":
            step_outside(10 + t)
        elif t == 4:
            for made, stepped in ((on_cpu, host), (params, optimizer)):
                set_grads(made, 20)
                stepped.step()
            optimizer.state_dict()
            for made, stepped in ((on_cpu, host), (params, optimizer)):
                set_grads(made, 21)
                if stepped is host:
                    stepped.step()
            other = captured(optimizer)
            set_grads(on_cpu, 22)
            set_grads(params, 22)
            host.step()
            other.replay()
        taken += [torch.full((2**k,), -1, device="cuda") for k in range(14)]
        set_grads(on_cpu, t)
        set_grads(params, t)
        host.step()
        graph.replay()
    assert all((tensor == -1).all() for tensor in taken)
    assert_same(everything(host, on_cpu), everything(optimizer, params))


def test_first_step_is_not_captured() -> None:
    """And a refused one leaves nothing behind."""
    params = make("cuda")
    set_grads(params, 0)
    optimizer = start(FusedAdamW, params, lr=torch.tensor(0.05, device="cuda"), capturable=True)
    torch.cuda.synchronize()
    message = "under CUDA graph capture: found a first step"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {}], ids=["clipped", "scaled"])
def test_parameters_on_two_devices(options: dict[str, Any]) -> None:
    """The host decides, and waits."""
    results = []
    for devices in (("cpu", "cpu"), ("cuda", "cpu")):
        params = make(devices[0])[:2] + make(devices[1])[2:]
        optimizer = start(FusedAdamW, params, **options)
        optimizer.grad_scale = torch.tensor(4.0, device=devices[0])
        optimizer.found_inf = torch.tensor(0.0, device=devices[0])
        for t in range(3):
            set_grads(params, t)
            optimizer.step()
        results.append(everything(optimizer, params))
    assert_same(*results)


def test_numbers_on_the_cpu() -> None:
    """An lr and a limit in CPU tensors are read as numbers, at every step."""
    results = []
    for device in ("cpu", "cuda"):
        params = make(device)
        lr, limit = torch.tensor(0.05), torch.tensor(0.5)
        optimizer = start(FusedAdamW, params, lr=lr, max_grad_norm=limit)
        for t in range(4):
            set_grads(params, t)
            lr.fill_(0.05 / (t + 1))
            limit.fill_(0.5 + t)
            optimizer.step()
        results.append(everything(optimizer, params))
    assert_same(*results)


def test_no_gradients() -> None:
    """Kernels that count the step have nothing to update."""
    params = make("cuda")
    set_grads(params, 0)
    optimizer = start(FusedAdamW, params, max_grad_norm=0.5)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert all(group["schedule_step"] == 2 for group in optimizer.param_groups)


def test_capture_is_refused_by_name() -> None:
    params = make("cuda")
    set_grads(params, 0)
    for options, message in (
        ({}, "accepted: capturable=True"),
        ({"capturable": True}, "param group 0: lr: found 0.05 under CUDA graph capture"),
    ):
        optimizer = start(FusedAdamW, params, **options)
        optimizer.step()
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
