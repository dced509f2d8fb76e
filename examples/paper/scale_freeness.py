"""Figure 5: scale-freeness, and the sizes of updates in deep networks without normalization.

Zhuang et al. (arXiv 2202.00089). Multiply every gradient coordinate by a positive factor of its
own, the same in every step. With eps = 0 AdamW and AdamProx take the same path, bit for bit where
the factors are powers of two and no number leaves the normal range, to rounding where they are not;
Adam with L2 takes another. In deep networks gradients of different layers differ in scale by
themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import BATCH, Data, Stack, arguments, digits, mean_and_error, save, train
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from fused_adamw import FusedAdam, FusedAdamProx, FusedAdamW

LR, DECAY = 2.0**-7, 2.0**-10
STILL = 1e-6  # no update of a weight that has had a gradient lately is as small
MAKE: dict[str, Callable[[list[Any], float], Optimizer]] = {
    "AdamW": lambda params, eps: FusedAdamW(
        params, lr=LR, eps=eps, weight_decay=DECAY, decay="decoupled"
    ),
    "AdamProx": lambda params, eps: FusedAdamProx(params, lr=LR, eps=eps, weight_decay=DECAY),
    "Adam with L2": lambda params, eps: FusedAdam(params, lr=LR, eps=eps, weight_decay=DECAY),
}


def record(data: Data, steps: int) -> tuple[Tensor, Tensor]:
    """Parameters [n] of a network at first, and gradients [steps, n] of its training with AdamW.

    Those that ever have a gradient of zero, such as the weights of a unit that is always off, are
    left out: with eps = 0 they would be divided 0 / 0.
    """
    stack = Stack(1, 1)
    optimizer = MAKE["AdamW"](stack.groups(), 1e-8)
    start = torch.cat([param.detach().flatten() for param in stack.params])
    grads = []
    for _ in range(steps):
        stack.backward(data.images[None], data.labels[None])
        grads.append(torch.cat([param.grad.flatten() for param in stack.params]))
        optimizer.step()
    used = (torch.stack(grads) != 0).all(0)
    return start[used], torch.stack(grads)[:, used]


def follow(start: Tensor, grads: Tensor, name: str, eps: float) -> Tensor:
    """Where an optimizer gets by these gradients."""
    param = start.clone()
    optimizer = MAKE[name]([param], eps)
    for param.grad in grads:
        optimizer.step()
    return param


def deviations(start: Tensor, grads: Tensor) -> dict[str, Any]:
    """What scaled gradients change: share of parameters, and by how much of the way they went."""
    draw = torch.Generator().manual_seed(0)
    exponents = torch.randint(-12, 13, start.shape, generator=draw)
    factors = {
        "powers of two": 2.0**exponents,
        "any factors": 2.0**exponents * (1 + torch.rand(start.shape, generator=draw)),
    }
    found = {}
    for (kind, factor), name, eps in itertools.product(factors.items(), MAKE, (0.0, 1e-8)):
        plain = follow(start, grads, name, eps)
        scaled = follow(start, grads * factor, name, eps)
        way = (plain - start).double().norm()
        found[f"{name}, eps {eps:g}, {kind}"] = {
            "share of parameters that differ": (plain != scaled).double().mean().item(),
            "distance, relative to the way": ((plain - scaled).double().norm() / way).item(),
        }
    return found


def update_sizes(optimizer: Optimizer) -> list[Tensor]:
    """Magnitudes of m / (sqrt(v) + eps), bias-corrected, of each parameter tensor, in order."""
    sizes = []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for param in group["params"]:
            state = optimizer.state[param]
            m = state["exp_avg"] / (1 - beta1 ** state["step"].item())
            v = state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())
            sizes.append((m / (v.sqrt() + group["eps"])).abs())
    return sizes


def deep(data: Data, depth: int, epochs: int, seeds: int, decays: list[float]) -> dict[str, Any]:
    """Trains networks of `depth` hidden layers without normalization with AdamW and Adam with L2.

    Returns:
        Of either, at its best decay: test error, share of the weights that stand still, and of the
        others the spread of the update sizes (the 95th percentile over the 5th, in factors of ten).
    """
    stack = Stack(2 * len(decays), seeds, normalize=False, sizes=(64, *[32] * depth, 10))
    groups = stack.groups(weight_decay=decays + decays)
    lr = 2.0**-10
    optimizers = {
        "AdamW": FusedAdamW(groups[: len(decays)], lr=lr, decay="decoupled"),
        "Adam with L2": FusedAdam(groups[len(decays) :], lr=lr),
    }
    for _ in train(stack, list(optimizers.values()), data, epochs, f"{depth} hidden layers"):
        pass
    errors = 100 * stack.evaluate(data.test_images, data.test_labels)[1].view(2, -1, seeds)
    found = {}
    for error, (name, optimizer) in zip(errors, optimizers.items(), strict=True):
        best = int(error.mean(-1).argmin())
        layers = 2 * (depth + 1)
        weights = update_sizes(optimizer)[best * layers : (best + 1) * layers : 2]
        sizes = torch.cat([weight.flatten() for weight in weights])
        moving = sizes[sizes > STILL]
        low, high = moving.log10().quantile(torch.tensor([0.05, 0.95])).tolist()
        mean, standard_error = mean_and_error(error[best].tolist())
        found[name] = {
            "best decay": decays[best],
            "test error in percent": mean,
            "standard error": standard_error,
            "test errors of all decays": error.mean(-1),
            "spread of update sizes in decades": high - low,
            "share of weights that stand still": 1 - len(moving) / len(sizes),
            "sizes": moving,
        }
    return found


def main() -> None:
    args = arguments(__doc__)
    steps, seeds, epochs = (10, 2, 1) if args.quick else (200, 5, 60)
    depths = [2, 4] if args.quick else [2, 8, 16, 24]
    data = digits()
    numbers: dict[str, Any] = {
        "steps": steps,
        "scaled gradients": deviations(*record(data, steps)),
        "batch size": BATCH,
        "epochs": epochs,
        "seeds": seeds,
    }
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(depths), sharey=True)
    bins = torch.linspace(-6, 1, 71)
    for axis, depth in zip(axes, depths, strict=True):
        found = deep(data, depth, epochs, seeds, [2.0**k for k in range(-16, -5, 2)])
        for (name, values), color in zip(found.items(), ("tab:blue", "tab:red"), strict=True):
            sizes = values.pop("sizes").log10()
            spread = values["spread of update sizes in decades"]
            error = values["test error in percent"]
            axis.hist(
                sizes.numpy(),
                bins.numpy(),
                density=True,
                color=color,
                alpha=0.5,
                label=f"{name}\nspread {spread:.2f}, error {error:.1f}%",
            )
        numbers[f"{depth} hidden layers"] = found
        axis.set(title=f"{depth} hidden layers", xlabel="log10 of the update size")
        axis.legend(frameon=False, fontsize=8)
    save("scale_freeness", numbers, figure, args.output)


if __name__ == "__main__":
    main()
