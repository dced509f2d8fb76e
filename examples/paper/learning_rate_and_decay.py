"""Figure 1: test error over learning rate and weight decay, SGD and SGDW, Adam and AdamW.

Loshchilov & Hutter (arXiv 1711.05101), figures 1 and 2: where decay is decoupled, the best decay
does not depend on the learning rate. The number for it is the drift: by how many factors of two the
best lambda moves for each factor of two of alpha.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import Stack, arguments, digits, mean_and_error, save, slope, steps, train
from matplotlib.figure import Figure
from torch import Tensor

from fused_adamw import FusedAdam, FusedAdamW, FusedSGD, FusedSGDW
from fused_adamw.schedules import CosineAnnealing

OPTIMIZERS: dict[str, Any] = {
    "SGD": (FusedSGD, {"momentum": 0.9}, -8),
    "SGDW": (FusedSGDW, {"momentum": 0.9}, -8),
    "Adam": (FusedAdam, {}, -10),
    "AdamW": (FusedAdamW, {"decay": "decoupled"}, -10),
}
NETWORKS = {"layer norm": True, "no normalization": False}


def best_decays(errors: Tensor, decays: list[int]) -> Tensor:
    """Log2 of the best decay [rates, seeds]; errors [rates, decays, seeds], averaged over three."""
    inner = errors.unfold(1, 3, 1).mean(-1)
    return torch.tensor(decays[1:-1], dtype=torch.float64)[inner.argmin(1)]


def main() -> None:
    args = arguments(__doc__)
    seeds, epochs, rates, stride = (2, 1, 3, 3) if args.quick else (3, 50, 9, 1)
    decays = list(range(-13, -1, stride))
    data = digits()
    numbers: dict[str, Any] = {"log2 decays": decays, "epochs": epochs, "seeds": seeds}
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(2, 4)
    schedule = CosineAnnealing(T_max=steps(data, epochs))
    for row, (network, normalize) in enumerate(NETWORKS.items()):
        for column, (name, (optimizer, options, smallest)) in enumerate(OPTIMIZERS.items()):
            lrs = list(range(smallest, smallest + rates))
            grid = [(2.0**lr, 2.0**decay) for lr in lrs for decay in decays]
            stack = Stack(len(grid), seeds, normalize)
            groups = stack.groups(lr=[lr for lr, _ in grid], weight_decay=[wd for _, wd in grid])
            made = optimizer(groups, schedule=schedule, **options)
            for _ in train(stack, [made], data, epochs, f"{name}, {network}"):
                pass
            _, errors = stack.evaluate(data.test_images, data.test_labels)
            errors = 100 * errors.view(len(lrs), len(decays), seeds)
            best = best_decays(errors, decays)
            mean = errors.mean(-1)
            # Rates that lead nowhere whatever the decay have no best decay.
            used = mean.amin(1) <= 2 * mean.min()
            lrs_used = torch.tensor(lrs)[used].tolist()
            drift = mean_and_error([slope(lrs_used, of_seed) for of_seed in best[used].T.tolist()])
            numbers[f"{name}, {network}"] = {
                "log2 rates": lrs,
                "test error in percent": mean,
                "log2 rates used": lrs_used,
                "log2 best decay there": best[used].mean(1),
                "drift": drift[0],
                "standard error of the drift": drift[1],
                "best test error in percent": mean.min().item(),
            }
            axis = axes[row, column]
            axis.imshow(
                mean.log().numpy(),
                origin="lower",
                aspect="auto",
                cmap="viridis_r",
                vmin=math.log(3.3),
                vmax=math.log(12),
                extent=(decays[0] - 0.5, decays[-1] + 0.5, lrs[0] - 0.5, lrs[-1] + 0.5),
            )
            axis.plot(best[used].mean(1), lrs_used, "o-", color="tab:red", markersize=4)
            axis.set_title(
                f"{name}, {network}\ndrift {drift[0]:+.2f} ± {drift[1]:.2f}", fontsize=10
            )
            axis.set(xlabel="log2 λ", ylabel="log2 α")
    save("learning_rate_and_decay", numbers, figure, args.output)


if __name__ == "__main__":
    main()
