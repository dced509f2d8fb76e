"""Figure 2: AdamW against Adam with L2 over longer training.

Loshchilov & Hutter (arXiv 1711.05101), figure 3: learning curves of either at its best weight
decay, and test error against training loss for every weight decay: is AdamW better only since it
trains better, or also at equal training loss?
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import Stack, arguments, digits, mean_and_error, save, steps, train
from matplotlib.figure import Figure

from fused_adamw import FusedAdam, FusedAdamW
from fused_adamw.schedules import CosineAnnealing

LR = 2.0**-7
STYLES = {"AdamW": "tab:blue", "Adam with L2": "tab:red"}


def better_at_equal_loss(losses: np.ndarray, errors: np.ndarray) -> float:
    """Mean of Adam's less AdamW's test error where both reach a training loss; [2, decays] each."""
    order = losses[0].argsort()
    logs, others = np.log(losses[0][order]), np.log(losses[1])
    common = (others >= logs[0]) & (others <= logs[-1])
    theirs = np.interp(others[common], logs, errors[0][order])
    return float((errors[1][common] - theirs).mean()) if common.any() else float("nan")


def main() -> None:
    args = arguments(__doc__)
    seeds, epochs = (2, 2) if args.quick else (6, 300)
    decays = [2.0**k for k in range(-14, -2)]
    data = digits()
    schedule = CosineAnnealing(T_max=steps(data, epochs))
    stack = Stack(2 * len(decays), seeds)
    groups = stack.groups(weight_decay=decays + decays)
    optimizers = [
        FusedAdamW(groups[: len(decays)], lr=LR, decay="decoupled", schedule=schedule),
        FusedAdam(groups[len(decays) :], lr=LR, schedule=schedule),
    ]
    epochs_seen, losses, errors = [], [], []  # of [2, decays, seeds]
    for epoch in train(stack, optimizers, data, epochs, "AdamW and Adam with L2"):
        if epoch % 5 == 0 or epoch in (1, epochs):
            epochs_seen.append(epoch)
            losses.append(stack.evaluate(data.images, data.labels)[0].view(2, -1, seeds))
            error = stack.evaluate(data.test_images, data.test_labels)[1]
            errors.append(100 * error.view(2, -1, seeds))
    loss, error = torch.stack(losses), torch.stack(errors)
    numbers: dict[str, Any] = {"lr": LR, "epochs": epochs, "seeds": seeds, "decays": decays}
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss_axis, error_axis, scatter = figure.subplots(1, 3)
    for i, (name, color) in enumerate(STYLES.items()):
        best = int(error[-1, i].mean(-1).argmin())
        found = mean_and_error(error[-1, i, best].tolist())
        numbers[name] = {
            "best decay": decays[best],
            "test error in percent": found[0],
            "standard error": found[1],
            "training loss": loss[-1, i, best].mean().item(),
            "test errors of all decays": error[-1, i].mean(-1),
            "training losses of all decays": loss[-1, i].mean(-1),
        }
        label = f"{name}, λ = 2^{np.log2(decays[best]):.0f}"
        loss_axis.semilogy(epochs_seen, loss[:, i, best].mean(-1), color=color, label=label)
        error_axis.semilogy(epochs_seen, error[:, i, best].mean(-1), color=color, label=label)
        scatter.loglog(loss[-1, i].mean(-1), error[-1, i].mean(-1), "o-", color=color, label=name)
    mean = (loss[-1].mean(-1).numpy(), error[-1].mean(-1).numpy())
    numbers["Adam's test error above AdamW's at equal training loss"] = better_at_equal_loss(*mean)
    loss_axis.set(xlabel="epoch", title="training loss, best λ")
    error_axis.set(xlabel="epoch", title="test error in percent, best λ")
    scatter.set(xlabel="training loss at the end", title="test error at the end, every λ")
    for axis in (loss_axis, error_axis, scatter):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3, which="both")
    save("longer_training", numbers, figure, args.output)


if __name__ == "__main__":
    main()
