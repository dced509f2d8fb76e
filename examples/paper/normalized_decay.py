"""Figure 4: the best weight decay for budgets of epochs, raw and normalized.

Loshchilov & Hutter (arXiv 1711.05101), section 3 and appendix B.1: the best lambda falls as
training gets longer; lambda_norm, with lambda = lambda_norm sqrt(b / (B T)), is to depend on T
less. The number for it is the drift: by how many factors of two the best value moves for each
factor of two of T.
"""

from __future__ import annotations

from typing import Any

import torch
from common import BATCH, Stack, arguments, digits, mean_and_error, save, slope, steps, train
from matplotlib.figure import Figure

from fused_adamw import FusedAdamW, FusedSGDW, normalized_weight_decay
from fused_adamw.schedules import CosineAnnealing

OPTIMIZERS: dict[str, Any] = {
    "SGDW": (FusedSGDW, {"lr": 2.0**-3, "momentum": 0.9}),
    "AdamW": (FusedAdamW, {"lr": 2.0**-6, "decay": "decoupled"}),
}


def main() -> None:
    args = arguments(__doc__)
    seeds, budgets = (2, [1, 2]) if args.quick else (12, [6, 12, 25, 50, 100, 200])
    decays = [2.0 ** (k / 2) for k in range(-28, -3, 2)]
    data = digits()
    numbers: dict[str, Any] = {"budgets in epochs": budgets, "seeds": seeds, "decays": decays}
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    for row, (name, (optimizer, options)) in zip(
        figure.subplots(2, 2), OPTIMIZERS.items(), strict=True
    ):
        best, best_normalized, errors = [], [], []
        for epochs in budgets:
            stack = Stack(len(decays), seeds)
            schedule = CosineAnnealing(T_max=steps(data, epochs))
            groups = stack.groups(weight_decay=decays)
            made = optimizer(groups, schedule=schedule, **options)
            for _ in train(stack, [made], data, epochs, f"{name}, {epochs} epochs"):
                pass
            error = 100 * stack.evaluate(data.test_images, data.test_labels)[1]
            # A decay of `unit` is a normalized one of 1.
            unit = normalized_weight_decay(
                1.0, batch_size=BATCH, dataset_size=len(data.labels), epochs=epochs
            )
            log_decays = torch.tensor(decays, dtype=torch.float64).log2()
            chosen = log_decays[1:-1][error.unfold(0, 3, 1).mean(-1).argmin(0)]  # of each seed
            best.append(chosen)
            best_normalized.append(chosen - torch.tensor(unit).log2())
            errors.append(error.mean(-1))
            row[0].loglog(decays, errors[-1], label=f"{epochs} epochs")
            row[1].loglog([decay / unit for decay in decays], errors[-1], label=f"{epochs} epochs")
        times = torch.tensor(budgets, dtype=torch.float64).log2().tolist()
        drifts = {}
        for title, found in (("raw", best), ("normalized", best_normalized)):
            of_seeds = torch.stack(found).unbind(1)
            drifts[title] = mean_and_error([slope(times, seed.tolist()) for seed in of_seeds])
        numbers[name] = {
            "test error in percent": torch.stack(errors),
            "log2 best decay": torch.stack(best).mean(1),
            "drift, raw": drifts["raw"],
            "drift, normalized": drifts["normalized"],
        }
        for axis, title, symbol in zip(row, drifts, ("λ", "λ_norm"), strict=True):
            drift = "drift {:+.2f} ± {:.2f}".format(*drifts[title])
            axis.set(xlabel=symbol, title=f"{name}, {title}: test error in percent, {drift}")
            axis.grid(alpha=0.3, which="both")
            axis.legend(frameon=False)
    save("normalized_decay", numbers, figure, args.output)


if __name__ == "__main__":
    main()
