"""Learning in every storage format: what `precision=` of FusedAdamW does to the loss.

Two tasks without downloads: the demo's GPT on text and a perceptron on scikit-learn's digits. For
each seed every format starts from the same weights, which bfloat16 has, and sees the same batches.
Parameters are stored in the format, and the model computes with them widened to float32; their
gradients are rounded to their dtype. So storage is all that differs, not arithmetic.

    python examples/precision.py --tasks gpt --text book.txt --seeds 5 --output results
    python examples/precision.py --peers    # 8-bit states of other libraries beside ours
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig, even_windows, load_text, random_windows, split_text
from matplotlib.figure import Figure
from paper.common import BATCH, FIGURES, digits, progress, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from train_gpt import param_groups
from warmup import warmup_then

from fused_adamw import FusedAdamW
from fused_adamw.schedules import CosineAnnealing

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16, nearest": {"precision": "bf16"},
    "bf16, stochastic": {"precision": "bf16", "stochastic_rounding": True},
    "master": {"precision": "master"},
    "split": {"precision": "split"},
    "kahan": {"precision": "kahan"},
    "8bit": {"precision": "8bit"},
    "8bit, 16-bit remainder": {"precision": "8bit", "remainder_bits": 16},
}
"""Options of the optimizer; the first is what the others are compared with."""
OF_FLOAT32: dict[str, dict[str, Any]] = {
    "fp32": FORMATS["fp32"],
    "8bit of float32": {"precision": "8bit"},
}
"""The same of formats whose parameters are float32, which is what peers have in 8 bits on a CPU."""
PEERS = {
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit"),
}
"""Modules and classes; only with ``--peers``, where they are installed."""
NEARLY_THE_FORMER = ("split", "8bit, 16-bit remainder", "8bit of float32")  # drawn with gaps
EVALUATIONS = 20


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, and how.

    Attributes:
        title: of the pictures.
        steps: of training.
        options: of the optimizer.
        weight_decay: of matrices other than embeddings.
        make_model: draws the weights from torch's global generator.
        batch: inputs and targets to train on.
        held_out: inputs and targets to validate with.
    """

    title: str
    steps: int
    options: dict[str, Any]
    weight_decay: float
    make_model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]


def gpt_task(args: argparse.Namespace) -> Task:
    """The GPT of `make demo` in small, with its learning rate, betas and weight decay."""
    config = GPTConfig(context=64, layers=2, heads=2, width=64)
    training, validation = split_text(load_text(args.text), config.context)
    return Task(
        title="GPT: validation loss (nats a byte)",
        steps=args.steps or 2000,
        options={"lr": 3e-3, "betas": (0.9, 0.99)},
        weight_decay=0.1,
        make_model=lambda: GPT(config),
        batch=lambda generator: random_windows(training, 8, config.context, generator),
        held_out=even_windows(validation, 64, config.context),
    )


def digits_task(args: argparse.Namespace) -> Task:
    """A perceptron on images of digits, with the optimizer's own defaults."""
    data = digits(train=1280)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(data.labels), (BATCH,), generator=generator)
        return data.images[chosen], data.labels[chosen]

    return Task(
        title="Digits: validation loss (nats an image)",
        steps=args.steps or 2000,
        options={},
        weight_decay=1e-2,
        make_model=lambda: nn.Sequential(
            *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        ),
        batch=batch,
        held_out=(data.test_images, data.test_labels),
    )


TASKS = {"gpt": gpt_task, "digits": digits_task}


@dataclasses.dataclass
class Run:
    """What was measured of one training.

    Attributes:
        validation_loss: at even distances, after the last step last.
        training_loss: mean over the batches of the last tenth of the steps.
        lost: mean over measured steps of the fraction of weights that did not change though their
            gradient was not zero; None of a peer.
        kept: bytes a parameter of parameters and states; None of a peer.
        moved: bytes a parameter that a step reads and writes; None of a peer.
    """

    validation_loss: list[float]
    training_loss: float
    lost: float | None
    kept: float | None
    moved: float | None


def evaluation_steps(steps: int) -> list[int]:
    """After how many steps the model is evaluated."""
    count = min(EVALUATIONS, steps)
    return [steps * (i + 1) // count for i in range(count)]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the model with its parameters widened to float32."""
    widened = {name: param.float() for name, param in model.named_parameters()}
    scores = functional_call(model, widened, (inputs,))
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())


def lost_fraction(optimizer: FusedAdamW) -> float:
    """Of all weights, those that the step left as they were though their gradient is not zero."""
    sizes = [sum(param.numel() for param in group["params"]) for group in optimizer.param_groups]
    groups = optimizer.telemetry() or []
    lost = [group.lost_fraction * size for group, size in zip(groups, sizes, strict=True)]
    return sum(lost) / sum(sizes)


def make_optimizer(
    name: str, model: nn.Module, task: Task, seed: int
) -> tuple[Optimizer, Callable[[], None]]:
    """The optimizer of a format or a peer, and what follows each of its steps."""
    groups = param_groups(model, task.weight_decay)
    schedule = warmup_then(CosineAnnealing, task.steps)
    if name in PEERS:
        module, cls = PEERS[name]
        peer: Optimizer = getattr(importlib.import_module(module), cls)(groups, **task.options)
        return peer, LambdaLR(peer, schedule).step
    options = {**OF_FLOAT32, **FORMATS}[name]
    return FusedAdamW(groups, schedule=schedule, seed=seed, **task.options, **options), lambda: None


def train(task: Task, name: str, seed: int, advance: Callable[[], None]) -> Run:
    """Trains one model in one format."""
    torch.manual_seed(seed)
    model = task.make_model().bfloat16()  # float32 too starts from weights that bfloat16 has
    if name in OF_FLOAT32 or name in PEERS:
        model.float()
    optimizer, follow = make_optimizer(name, model, task, seed)
    generator = torch.Generator().manual_seed(seed)
    evaluated = evaluation_steps(task.steps)
    training: list[float] = []
    validation: list[float] = []
    lost: list[float] = []
    for step in range(1, task.steps + 1):
        loss = loss_of(model, *task.batch(generator))
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(optimizer, FusedAdamW):
            optimizer.collect_telemetry = step in evaluated
        optimizer.step()
        follow()
        optimizer.zero_grad()
        training.append(loss.item())
        if step in evaluated:
            if isinstance(optimizer, FusedAdamW):
                lost.append(lost_fraction(optimizer))
            with torch.no_grad():
                validation.append(loss_of(model, *task.held_out).item())
        advance()
    training_loss = statistics.fmean(training[-max(1, task.steps // 10) :])
    if not isinstance(optimizer, FusedAdamW):
        return Run(validation, training_loss, None, None, None)
    report = optimizer.memory_report()
    return Run(
        validation,
        training_loss,
        statistics.fmean(lost),
        report.per_parameter(report.total - report.held["gradients"]),
        report.per_parameter(report.moved),
    )


def train_all(task: Task, names: Sequence[str], seeds: int, title: str) -> dict[str, list[Run]]:
    """The runs of every format, one a seed."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with progress() as bars:
        bar = bars.add_task(f"{title:40}", total=seeds * len(names) * task.steps)
        for seed in range(seeds):
            for name, done in runs.items():
                bars.update(bar, description=f"{f'{title}, seed {seed}, {name}':40}")
                done.append(train(task, name, seed, lambda: bars.advance(bar)))
    return runs


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and the standard deviation of a seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean, if all is known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def numbers_of(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """All that was measured of a task, by format."""
    finals = {name: [run.validation_loss[-1] for run in done] for name, done in runs.items()}
    first = finals[next(iter(runs))]
    found: dict[str, Any] = {}
    for name, done in runs.items():
        differences = [x - y for x, y in zip(finals[name], first, strict=True)]
        curves = zip(*(run.validation_loss for run in done), strict=True)
        found[name] = {
            "final validation loss": finals[name],
            "mean, standard deviation": mean_and_deviation(finals[name]),
            "difference from fp32 at the same seed": differences,
            "mean, standard deviation of the difference": mean_and_deviation(differences),
            "training loss": statistics.fmean(run.training_loss for run in done),
            "fraction of updates lost": mean_or_none([run.lost for run in done]),
            "bytes a parameter, kept": done[0].kept,
            "bytes a parameter, moved": done[0].moved,
            "curve": [statistics.fmean(losses) for losses in curves],
        }
    return found


def table_of(title: str, numbers: dict[str, Any]) -> Table:
    """What matters most of a task's numbers."""
    table = Table(title=title)
    table.add_column("format")
    for column in ("validation loss", "less fp32's\n(1e-3)", "updates\nlost", "bytes\nmoved"):
        table.add_column(column, justify="right")
    for name, found in numbers.items():
        mean, deviation = found["mean, standard deviation"]
        difference, spread = found["mean, standard deviation of the difference"]
        lost, moved = found["fraction of updates lost"], found["bytes a parameter, moved"]
        table.add_row(
            name,
            f"{mean:.4f} ± {deviation:.4f}",
            f"{1e3 * difference:+.1f} ± {1e3 * spread:.1f}",
            f"{lost:.1%}" if lost is not None else "",
            f"{moved:.2f}" if moved is not None else "",
        )
    return table


def draw(tasks: dict[str, Task], numbers: dict[str, dict[str, Any]]) -> Figure:
    """Mean curves of each task, and how far they are from that of fp32."""
    figure = Figure(figsize=(12, 4.4 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 2, squeeze=False)
    for (losses, differences), (key, task) in zip(rows, tasks.items(), strict=True):
        steps = evaluation_steps(task.steps)
        base = next(iter(numbers[key].values()))["curve"]
        for name, found in numbers[key].items():
            style = "--" if name in NEARLY_THE_FORMER else "-"
            options = {"label": name, "linestyle": style, "linewidth": 1.4}
            losses.plot(steps, found["curve"], **options)
            distance = [x - y for x, y in zip(found["curve"], base, strict=True)]
            differences.plot(steps, distance, **options)
        losses.set(title=task.title, xlabel="step", yscale="log")
        differences.set(title="less that of fp32", xlabel="step")
        losses.legend(frameon=False, fontsize="small")
        for axes in (losses, differences):
            axes.grid(alpha=0.3, which="both")
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def argument_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Learning in every storage format of FusedAdamW.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="what to learn")
    option("--seeds", type=int, default=4, help="trainings of each format")
    option("--steps", type=int, help="of each training; by default each task's own")
    option("--text", type=Path, metavar="FILE", help="for the GPT, if not Python's topics")
    option("--peers", action="store_true", help="8-bit states of float32 parameters, and peers'")
    option("--output", type=Path, default=FIGURES, help="folder of numbers and picture")
    return parser


def is_installed(module: str) -> bool:
    """Whether a peer can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def check(args: argparse.Namespace) -> None:
    """Refuse now what would fail after minutes of training."""
    for name in ("seeds", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, found {value}")
    args.output.mkdir(parents=True, exist_ok=True)


def main() -> None:
    """Train, print the tables, write precision.json and precision.png (with peers: own files)."""
    parser = argument_parser()
    args = parser.parse_args()
    torch.set_num_threads(1)  # on which the order of the sums in a product depends
    try:
        check(args)
        tasks = {name: TASKS[name](args) for name in args.tasks}
    except (OSError, ValueError) as error:
        parser.error(str(error))

    names, file = list(FORMATS), "precision"
    if args.peers:
        installed = [name for name, (module, _) in PEERS.items() if is_installed(module)]
        names, file = [*OF_FLOAT32, *installed], "precision_peers"
    console = Console()
    results: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    for name, task in tasks.items():
        results[name] = numbers_of(train_all(task, names, args.seeds, name))
        console.print(table_of(task.title, results[name]))
        settings[name] = {
            **{"steps": task.steps, "weight decay of matrices": task.weight_decay},
            **{"options": task.options, "evaluated after": evaluation_steps(task.steps)},
        }
    numbers = {"seeds": args.seeds, "settings": settings, "results": results}
    save(file, numbers, draw(tasks, results), args.output)
    console.out(f"Numbers and picture: {args.output}")


if __name__ == "__main__":
    main()
