"""What the experiments share: the data, stacks of networks that train at once, output.

Small networks spend their time on overhead, and an experiment needs hundreds of them. So networks
of one shape are stacked along a first dimension and trained together: one batched matrix product a
layer, and one param group for each setting of the hyperparameters in a single fused optimizer,
whose step over a thousand small tensors takes no longer than over one large one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim import Optimizer

BATCH = 32
FIGURES = Path(__file__).parents[2] / "docs" / "figures"


class Data(NamedTuple):
    """Images [n, 64] and their classes [n], to train on and to test with."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(train: int = 512) -> Data:
    """scikit-learn's 1797 scans of 8 x 8 pixels, in one shuffled order, standardized."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float(), labels[order]
    images = (images - images[:train].mean()) / images[:train].std()
    return Data(images[:train], labels[:train], images[train:], labels[train:])


class Stack:
    """Multilayer perceptrons of one shape: `settings` times `seeds` of them.

    A setting's networks start from the same weights as every other setting's. Where normalized
    (layer norm before every ReLU, without weights of its own) the function does not change when the
    weights of a hidden layer are multiplied by a number, as in the papers' networks with batch
    norm.

    Args:
        settings: of hyperparameters, each with its own param group.
        seeds: networks of a setting.
        normalize: whether hidden layers are normalized.
        sizes: units of the layers, from the inputs to the outputs.
    """

    def __init__(
        self,
        settings: int,
        seeds: int,
        normalize: bool = True,
        sizes: tuple[int, ...] = (64, 32, 32, 10),
    ) -> None:
        self.settings, self.seeds, self.normalize = settings, seeds, normalize
        self.params: list[Tensor] = []  # weight and bias of each layer, [settings * seeds, ...]
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        for fan_in, fan_out in itertools.pairwise(sizes):
            weights = [torch.randn(fan_in, fan_out, generator=draw) for draw in generators]
            weight = torch.stack(weights) * math.sqrt(2 / fan_in)
            for param in (weight, torch.zeros(seeds, 1, fan_out)):
                param = param.repeat(settings, 1, 1).requires_grad_()
                param.grad = torch.zeros_like(param)
                self.params.append(param)

    def __call__(self, images: Tensor) -> Tensor:
        """Scores [settings, seeds, n, classes] of images [n, pixels] or [seeds, n, pixels]."""
        shape = (self.settings, self.seeds, *images.shape[-2:])
        hidden = images.expand(shape).flatten(0, 1)
        for i in range(0, len(self.params), 2):
            if i:
                hidden = F.layer_norm(hidden, hidden.shape[-1:]) if self.normalize else hidden
                hidden = hidden.relu()
            hidden = torch.baddbmm(self.params[i + 1], hidden, self.params[i])
        return hidden.unflatten(0, shape[:2])

    def groups(self, **options: list[Any]) -> list[dict[str, Any]]:
        """A param group for each setting, with its part of every parameter and gradient.

        Args:
            options: for each name of an option its value in every setting.
        """
        groups = []
        for setting in range(self.settings):
            part = slice(setting * self.seeds, (setting + 1) * self.seeds)
            params = []
            for param in self.params:
                params.append(param.detach()[part])
                params[-1].grad = param.grad[part]
            values = {name: values[setting] for name, values in options.items()}
            groups.append({"params": params, **values})
        return groups

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Sets the gradients, by a batch [seeds, n, ...]; returns the loss [settings, seeds]."""
        losses = cross_entropy(self(images), labels)
        for param in self.params:
            param.grad.zero_()
        losses.sum().backward()
        return losses.detach()

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and error rate, both [settings, seeds], on images [n, pixels]."""
        scores = self(images)
        wrong = scores.argmax(-1) != labels
        return cross_entropy(scores, labels), wrong.float().mean(-1)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over the images, of scores [..., n, classes] and labels [n] or [..., n]."""
    labels = labels.expand(scores.shape[:-1])
    losses = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(-1)


def train(
    stack: Stack,
    optimizers: Sequence[Optimizer],
    data: Data,
    epochs: int,
    title: str,
) -> Iterator[int]:
    """Trains a stack, every seed with an order of the images of its own, under a progress bar.

    Yields the number of epochs done after each.

    Args:
        stack: the networks.
        optimizers: of the stack's groups, each group in one.
        data: batches are `BATCH` of its images to train on.
        epochs: passes over these.
        title: what the progress bar says.
    """
    orders = [torch.Generator().manual_seed(1000 + seed) for seed in range(stack.seeds)]
    with progress() as bars:
        for epoch in bars.track(range(1, epochs + 1), description=f"{title:24}"):
            order = torch.stack([torch.randperm(len(data.labels), generator=g) for g in orders])
            for batch in order.split(BATCH, dim=1):
                stack.backward(data.images[batch], data.labels[batch])
                for optimizer in optimizers:
                    optimizer.step()
            yield epoch


def progress() -> Progress:
    """A progress bar with what is done and the time that is left."""
    text = TextColumn("{task.description}")
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def steps(data: Data, epochs: int) -> int:
    """Steps in so many epochs."""
    return epochs * math.ceil(len(data.labels) / BATCH)


def slope(x: Iterable[float], y: Iterable[float]) -> float:
    """Of the line through the points that is best in least squares."""
    return statistics.linear_regression(list(x), list(y)).slope


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / math.sqrt(len(values))


def arguments(description: str | None) -> argparse.Namespace:
    """The command line, `quick` and `output`; and what makes a run the same again."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: a test")
    parser.add_argument(
        "--output", type=Path, default=FIGURES, help="folder of numbers and picture"
    )
    torch.set_num_threads(2)  # on which the order of the sums in a product depends
    return parser.parse_args()


def save(name: str, numbers: dict[str, Any], figure: Figure, folder: Path) -> None:
    """Writes name.json and name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=1, default=lambda x: x.tolist())
    text = re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda found: f"{float(found[0]):.6g}", text)
    text = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text)
    (folder / f"{name}.json").write_text(text + "\n")
    figure.savefig(folder / f"{name}.png", dpi=110)
