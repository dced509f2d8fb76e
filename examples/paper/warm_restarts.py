"""Figure 3: warm restarts against one long cosine, AdamWR and SGDWR.

Loshchilov & Hutter (arXiv 1711.05101), figure 4, and SGDR (arXiv 1608.03983): with restarts a good
network is at hand at the end of every cycle, long before the end of training.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Stack, arguments, digits, mean_and_error, save, steps, train
from matplotlib.figure import Figure

from fused_adamw import FusedAdamW, FusedSGDW
from fused_adamw.schedules import CosineAnnealing, CosineWarmRestarts

OPTIMIZERS: dict[str, Any] = {
    "SGDW": (FusedSGDW, {"lr": 2.0**-3, "momentum": 0.9, "weight_decay": 2.0**-8}),
    "AdamW": (FusedAdamW, {"lr": 2.0**-6, "decay": "decoupled", "weight_decay": 2.0**-8}),
}


def main() -> None:
    args = arguments(__doc__)
    seeds, first, cycles = (2, 1, 2) if args.quick else (24, 10, 4)
    epochs = first * (2**cycles - 1)
    ends = [first * (2**cycle - 1) for cycle in range(1, cycles + 1)]  # epochs
    data = digits()
    schedules = {
        "one cosine": CosineAnnealing(T_max=steps(data, epochs)),
        "restarts": CosineWarmRestarts(T_0=steps(data, first), T_mult=2),
    }
    numbers: dict[str, Any] = {"epochs": epochs, "seeds": seeds, "ends of cycles": ends}
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, (name, (optimizer, options)) in zip(
        figure.subplots(1, 2), OPTIMIZERS.items(), strict=True
    ):
        stack = Stack(len(schedules), seeds)
        groups = stack.groups(schedule=list(schedules.values()))
        errors = [
            100 * stack.evaluate(data.test_images, data.test_labels)[1]
            for _ in train(stack, [optimizer(groups, **options)], data, epochs, name)
        ]
        for error, schedule in zip(torch.stack(errors).unbind(1), schedules, strict=True):
            at_ends = [mean_and_error(error[end - 1].tolist()) for end in ends]
            numbers[f"{name}, {schedule}"] = {
                "test error in percent at the ends of cycles": [mean for mean, _ in at_ends],
                "standard errors": [standard_error for _, standard_error in at_ends],
            }
            axis.semilogy(range(1, epochs + 1), error.mean(-1), label=schedule)
        for end in ends:
            axis.axvline(end, color="black", alpha=0.2, linestyle=":")
        axis.set(xlabel="epoch", title=f"{name}: test error in percent")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3, which="both")
    save("warm_restarts", numbers, figure, args.output)


if __name__ == "__main__":
    main()
