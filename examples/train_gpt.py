"""Train a small GPT with FusedAdamW, next to torch.optim.AdamW.

Two copies of one byte-level GPT learn English text (by default Python's own reference topics): the
same initial weights, the same batches in the same order, one with `fused_adamw.FusedAdamW` and one
with `torch.optim.AdamW(fused=True)`, torch's fastest. They take turns step by step, so that
whatever else the machine is doing falls on both alike.

The two optimizers agree to rounding, so the two loss curves should lie on top of each other
(training amplifies rounding, so the last digits drift apart). What differs is the time that
`optimizer.step()` takes. At the end stand a table and a picture of both.

    python examples/train_gpt.py --text book.txt --steps 2000 --width 256 --output book.png
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig, even_windows, load_text, random_windows, split_text
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fused_adamw import FusedAdamW, available_engines


@dataclasses.dataclass
class Run:
    """One model, what trains it, and what was measured on the way."""

    name: str
    model: GPT
    optimizer: Optimizer
    scheduler: LRScheduler
    train_loss: list[float] = dataclasses.field(default_factory=list)
    validation_loss: dict[int, float] = dataclasses.field(default_factory=dict)
    step_ms: list[float] = dataclasses.field(default_factory=list)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay the matrices of linear layers; leave embeddings, norms and biases alone."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in model.named_parameters():
        (matrices if param.ndim == 2 and "embedding" not in name else others).append(param)
    decayed = {"params": matrices, "weight_decay": weight_decay}
    return [decayed, {"params": others, "weight_decay": 0.0}]


def warmup_then_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Raise the learning rate over the first 5% of the steps, then lower it to 10% of its peak."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, factor)


def make_runs(args: argparse.Namespace) -> list[Run]:
    """Build the two runs; they differ in the optimizer and in nothing else."""
    config = GPTConfig(args.context, args.layers, args.heads, args.width)
    options = {"lr": args.lr, "betas": (0.9, 0.99)}

    def make_run(name: str, make_optimizer: Callable[[list[dict[str, Any]]], Optimizer]) -> Run:
        torch.manual_seed(args.seed)
        model = GPT(config).to(args.device)
        optimizer = make_optimizer(param_groups(model, args.weight_decay))
        return Run(name, model, optimizer, warmup_then_cosine(optimizer, args.steps))

    return [
        make_run("FusedAdamW", lambda groups: FusedAdamW(groups, engine=args.engine, **options)),
        make_run("torch AdamW", lambda groups: AdamW(groups, fused=True, **options)),
    ]


def next_byte_loss(model: GPT, inputs: Tensor, targets: Tensor, bf16: bool) -> Tensor:
    """Mean cross-entropy in nats a byte; with `bf16`, the matrix products are in bfloat16."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def clock_ms(device: torch.device) -> float:
    """The time in milliseconds, read when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def train_step(run: Run, inputs: Tensor, targets: Tensor, bf16: bool) -> None:
    """Train on one batch; note the loss and the time of the optimizer."""
    loss = next_byte_loss(run.model, inputs, targets, bf16)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=1.0)

    started = clock_ms(inputs.device)
    run.optimizer.step()
    run.step_ms.append(clock_ms(inputs.device) - started)

    run.optimizer.zero_grad()
    run.scheduler.step()
    run.train_loss.append(loss.item())


@torch.no_grad()
def evaluate(run: Run, inputs: Tensor, targets: Tensor, bf16: bool) -> None:
    """Note the validation loss after the steps taken so far."""
    run.model.eval()
    loss = next_byte_loss(run.model, inputs, targets, bf16)
    run.validation_loss[len(run.train_loss)] = loss.item()
    run.model.train()


def train(runs: list[Run], text: Tensor, args: argparse.Namespace, console: Console) -> None:
    """Train all runs in turns on the same batches; evaluate them 20 times on the same windows."""
    training, validation = split_text(text.to(args.device), args.context)
    held_out = even_windows(validation, 64, args.context)
    evaluate_every = max(1, args.steps // 20)
    generator = torch.Generator().manual_seed(args.seed)
    columns = (
        "{task.description}",
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        "loss {task.fields[loss]:.3f}  optimizer {task.fields[ms]:.2f} ms",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(r.name, total=args.steps, loss=math.nan, ms=0.0) for r in runs]
        for run in runs:
            evaluate(run, *held_out, args.bf16)
        for step in range(1, args.steps + 1):
            batch = random_windows(training, args.batch_size, args.context, generator)
            for run, bar in zip(runs, bars, strict=True):
                train_step(run, *batch, args.bf16)
                if step % evaluate_every == 0 or step == args.steps:
                    evaluate(run, *held_out, args.bf16)
                recent_ms = statistics.median(run.step_ms[-50:])
                progress.update(bar, advance=1, loss=run.train_loss[-1], ms=recent_ms)


def results_table(runs: list[Run]) -> Table:
    """Final validation loss and time of the optimizer, and how the time compares with torch's."""
    table = Table()
    table.add_column("optimizer")
    table.add_column("validation loss\n(nats/byte)", justify="right")
    table.add_column("optimizer.step()\n(median, ms)", justify="right")
    table.add_column("speed\n(torch = 1)", justify="right")
    torch_ms = statistics.median(runs[-1].step_ms)
    for run in runs:
        loss = list(run.validation_loss.values())[-1]
        ms = statistics.median(run.step_ms)
        table.add_row(run.name, f"{loss:.4f}", f"{ms:.3f}", f"{torch_ms / ms:.2f}x")
    return table


def draw(runs: list[Run], output: Path) -> None:
    """Draw the loss curves and the times of the optimizer into a picture."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, times = figure.subplots(1, 2)
    styles: list[dict[str, Any]] = [
        {"color": "tab:red", "linestyle": "--", "zorder": 3},
        {"color": "tab:blue", "linewidth": 5, "alpha": 0.45},
    ]
    for run, style in zip(runs, styles, strict=True):
        loss, color, median = run.validation_loss, style["color"], statistics.median(run.step_ms)
        losses.plot(list(loss), list(loss.values()), label=run.name, **style)
        times.plot(run.step_ms, ".", color=color, markersize=2, alpha=0.4)
        times.axhline(median, color=color, label=f"{run.name}, median {median:.3g} ms")
    losses.set(title="Validation loss", xlabel="step", ylabel="nats per byte")
    times.set(title="Time of optimizer.step()", xlabel="step", ylabel="milliseconds")
    # Pauses of the machine, far above the medians, would flatten the rest: they are left out.
    times.set_ylim(0, 3 * max(statistics.median(run.step_ms) for run in runs))
    for axes in (losses, times):
        axes.legend(loc="upper right", frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)


def argument_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT with FusedAdamW, next to torch.optim.AdamW.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option(
        "--text",
        type=Path,
        metavar="FILE",
        help="file to learn from, if not Python's reference topics",
    )
    option("--steps", type=int, default=400, help="optimizer steps of each model")
    option("--batch-size", type=int, default=8, help="windows of text in a step")
    option("--context", type=int, default=128, help="bytes in a window of text")
    option("--layers", type=int, default=4, help="transformer blocks")
    option("--heads", type=int, default=4, help="attention heads in a block")
    option("--width", type=int, default=128, help="size of the residual stream")
    option("--lr", type=float, default=3e-3, help="peak learning rate")
    option("--weight-decay", type=float, default=0.1, help="of the matrices")
    option("--engine", default="auto", help="auto, cuda, triton, cpu or reference")
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    option("--bf16", action="store_true", help="autocast the model to bfloat16")
    option("--seed", type=int, default=0, help="of the weights and the batches")
    option("--output", type=Path, default=Path("demo.png"), help="picture to write")
    return parser


def best_device(engine: str) -> str:
    """CUDA where the machine has it and an engine for it; else the CPU."""
    engines = available_engines() if engine == "auto" else [engine]
    usable = torch.cuda.is_available() and not {"cuda", "triton"}.isdisjoint(engines)
    return "cuda" if usable else "cpu"


def check(args: argparse.Namespace) -> None:
    """Refuse now what would fail after minutes of training."""
    for name in ("steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    formats = Figure().canvas.get_supported_filetypes()
    if args.output.suffix[1:] not in formats:
        raise ValueError(f"--output: {args.output} must end in one of {', '.join(sorted(formats))}")
    args.output.parent.mkdir(parents=True, exist_ok=True)


def main() -> None:
    """Train, print the table, draw the picture."""
    parser = argument_parser()
    args = parser.parse_args()
    try:
        check(args)
        if args.device == "auto":
            args.device = best_device(args.engine)
        text = load_text(args.text)
        split_text(text, args.context)
        runs = make_runs(args)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))

    console = Console()
    params = sum(param.numel() for param in runs[0].model.parameters())
    console.print(f"GPT of {params:,} parameters, text of {len(text):,} bytes")
    console.print(f"Device {args.device}, engine {args.engine}")
    train(runs, text, args, console)
    console.print(results_table(runs))
    draw(runs, args.output)
    console.out(f"Picture: {args.output}")


if __name__ == "__main__":
    main()
