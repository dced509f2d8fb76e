"""Figure 6: AdamProx and AdamW on the same trajectory.

Zhuang et al. (arXiv 2202.00089): AdamW is the first-order approximation of AdamProx, and the two
trace nearly the same path. How near, is measured twice: where AdamProx is given AdamW's gradients,
and where each goes its own way. The latter is compared with AdamW started one rounding away, since
training amplifies any difference, and with Adam with L2.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Stack, arguments, digits, save, steps, train
from matplotlib.figure import Figure

from fused_adamw import FusedAdam, FusedAdamProx, FusedAdamW
from fused_adamw.schedules import CosineAnnealing

LR = 2.0**-7
STYLES = {
    "AdamProx on AdamW's gradients": "tab:green",
    "AdamProx": "tab:blue",
    "AdamW, one rounding away": "black",
    "Adam with L2": "tab:red",
}


def main() -> None:
    args = arguments(__doc__)
    seeds, epochs = (2, 2) if args.quick else (8, 50)
    data = digits()
    schedule = CosineAnnealing(T_max=steps(data, epochs))
    numbers: dict[str, Any] = {"lr": LR, "epochs": epochs, "seeds": seeds}
    figure = Figure(figsize=(13, 4), layout="constrained")
    exponents = (-14, -11, -8)
    for axis, exponent in zip(figure.subplots(1, 3, sharey=True), exponents, strict=True):
        options = {"lr": LR, "weight_decay": 2.0**exponent, "schedule": schedule}
        stack = Stack(4, seeds)
        adamw, prox, rounded, adam = stack.groups()
        follower = {"params": [param.clone() for param in adamw["params"]]}
        for param, leader in zip(follower["params"], adamw["params"], strict=True):
            param.grad = leader.grad
        draw = torch.Generator().manual_seed(0)
        for param in rounded["params"]:
            param.mul_(1 + 2.0**-23 * torch.randn(param.shape, generator=draw).sign())
        optimizers = [
            FusedAdamW([adamw, rounded], decay="decoupled", **options),
            FusedAdamProx([follower, prox], **options),
            FusedAdam([adam], **options),
        ]
        others = dict(zip(STYLES, (follower, prox, rounded, adam), strict=True))
        start = [param.clone() for param in adamw["params"]]
        distances: dict[str, list[float]] = {name: [] for name in others}
        for _ in train(stack, optimizers, data, epochs, f"λ = 2^{exponent}"):
            way = distance(adamw["params"], start)
            for name, group in others.items():
                apart = distance(adamw["params"], group["params"])
                distances[name].append((apart / way).mean().item())
        errors = 100 * stack.evaluate(data.test_images, data.test_labels)[1].mean(1)
        found: dict[str, Any] = {"distance from AdamW, relative to its way": {}}
        for name, values in distances.items():
            axis.semilogy(range(1, epochs + 1), values, color=STYLES[name], label=name)
            found["distance from AdamW, relative to its way"][name] = values[-1]
        names = ("AdamW", "AdamProx", "AdamW, one rounding away", "Adam with L2")
        found["test error in percent"] = dict(zip(names, errors.tolist(), strict=True))
        numbers[f"decay 2^{exponent}"] = found
        axis.set(xlabel="epoch", title=f"distance from AdamW, λ = 2^{exponent}")
        axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    save("proximal", numbers, figure, args.output)


def distance(params: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean, over all parameters, of each seed: their first dimension."""
    squares = [
        (param - other).double().square().flatten(1).sum(1)
        for param, other in zip(params, others, strict=True)
    ]
    return torch.stack(squares).sum(0).sqrt()


if __name__ == "__main__":
    main()
