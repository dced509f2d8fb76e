"""``python -m fused_adamw plan``: memory and time of a model's optimizer, before it is built.

Parameters, gradients and states are sharded by rows over all GPUs, as torch's FSDP2 does; shown is
the GPU with most of them. Activations and what a model gathers are not the optimizer's, and are
left out. A step takes the bytes that it moves over the bandwidth; docs/scale.md works it out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_adamw.memory_report import MemoryReport, PlannedTensor, memory_report
from fused_adamw.precision import BLOCK, PRECISIONS, layout_of
from fused_adamw.shards import block_split

Shapes = list[tuple[int, ...]]

_STATES = {"adamw": 2, "lion": 1, "sgd": 1}  # arrays of each; SGD with momentum
_LLAMA_TYPES = ("llama", "mistral")
_LLAMA_KEYS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    "vocab_size",
)
_GPT2_KEYS = ("n_layer", "n_embd", "n_positions", "vocab_size")
_MEASURED_BYTES = 1 << 28


def _llama(layers: int, width: int, hidden: int) -> dict[str, Any]:
    """A model of Llama 3: 8 heads of keys and values, heads of 128, 128256 tokens."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": width // 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }


# As in the config.json of meta-llama/Meta-Llama-3-8B, -70B and Llama-3.1-405B.
MODELS = {
    "llama-3-8b": _llama(32, 4096, 14336),
    "llama-3-70b": _llama(80, 8192, 28672),
    "llama-3-405b": _llama(126, 16384, 53248),
}


def shapes_of(config: dict[str, Any]) -> Shapes:
    """The parameters of a model as its configuration (Hugging Face's config.json) gives them.

    Raises:
        ValueError: another architecture, or a value that is missing.
    """
    kind = config.get("model_type")
    if kind not in (*_LLAMA_TYPES, "gpt2"):
        raise ValueError(
            f"--config: found model_type {kind!r}, accepted: {', '.join(_LLAMA_TYPES)}, gpt2; of "
            "another model the number of parameters, by --params"
        )
    keys = _GPT2_KEYS if kind == "gpt2" else _LLAMA_KEYS
    for key in keys:
        if not isinstance(config.get(key), int) or config[key] <= 0:
            raise ValueError(f"--config: found {key} {config.get(key)!r}, accepted: a number > 0")
    return _gpt2_shapes(config) if kind == "gpt2" else _llama_shapes(config)


def _llama_shapes(config: dict[str, Any]) -> Shapes:
    width, hidden, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    layer: Shapes = [(queries, width), (keys, width), (keys, width), (width, queries)]
    layer += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    outer: Shapes = [(vocabulary, width)] * (1 if config.get("tie_word_embeddings") else 2)
    return [*outer, *layer * config["num_hidden_layers"], (width,)]


def _gpt2_shapes(config: dict[str, Any]) -> Shapes:
    width = config["n_embd"]
    norm: Shapes = [(width,), (width,)]
    layer = [*norm, (width, 3 * width), (3 * width,), (width, width), (width,), *norm]
    layer += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    outer: Shapes = [(config["vocab_size"], width), (config["n_positions"], width)]
    return [*outer, *layer * config["n_layer"], *norm]


def planned(
    shapes: Shapes, gpus: int, precision: str, states: int, *, averaged: bool = False
) -> MemoryReport:
    """What the GPU with most of it holds, and what a step moves there.

    Args:
        shapes: of the parameters: float32 with "fp32", else bfloat16.
        gpus: over how many the rows of each are sharded.
        precision: one of `PRECISIONS`.
        states: arrays that the rule keeps.
        averaged: whether averages of the parameters are kept.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def tensor(shape: tuple[int, ...]) -> PlannedTensor:
        fits = gpus == 1 or block_split(shape, {0: [gpus]}, BLOCK) is not None
        layout = layout_of(dtype, math.prod(shape), precision, codable=fits)
        rows = -(-shape[0] // gpus)
        return PlannedTensor(rows * math.prod(shape[1:]), dtype, layout, states, averaged)

    return memory_report(map(tensor, shapes))


def measured_bandwidth() -> float:
    """Bytes a second that a copy reads and writes on this machine: its GPU, or its CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.zeros(_MEASURED_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    best = math.inf
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _MEASURED_BYTES / best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", choices=list(MODELS))
    model.add_argument("--config", type=Path, help="a config.json of Hugging Face")
    model.add_argument("--params", type=float, help="their number, as 7e9")
    parser.add_argument("--gpus", type=int, default=1, help="that share the shards")
    parser.add_argument(
        "--precision", nargs="*", choices=PRECISIONS, help="by default all, side by side"
    )
    parser.add_argument("--optimizer", choices=list(_STATES), default="adamw")
    parser.add_argument("--ema", action="store_true", help="with averages of the parameters")
    parser.add_argument(
        "--bandwidth", type=float, help="GB/s that a GPU reads and writes; by default measured here"
    )


def table(
    shapes: Shapes,
    gpus: int,
    precisions: Sequence[str],
    states: int,
    bandwidth: float,
    *,
    averaged: bool = False,
) -> str:
    """A column for each precision; see `planned`.

    Args:
        shapes: see `planned`.
        gpus: see `planned`.
        precisions: the columns.
        states: see `planned`.
        bandwidth: bytes a second.
        averaged: see `planned`.
    """
    reports = [planned(shapes, gpus, name, states, averaged=averaged) for name in precisions]
    numel = sum(map(math.prod, shapes))
    lines = [
        f"{numel / 1e9:.2f}e9 parameters over {gpus} GPU{'s' * (gpus > 1)}; of each, GB:",
        f"{'':24s}" + "".join(f"{name:>10s}" for name in precisions),
    ]
    kinds = [kind for kind in reports[0].held if any(report.held[kind] for report in reports)]
    for kind in kinds:
        lines.append(_row(kind, [report.held[kind] / 1e9 for report in reports]))
    lines.append(_row("total", [report.total / 1e9 for report in reports]))
    lines.append(_row("moved by a step", [report.moved / 1e9 for report in reports]))
    lines.append(
        _row(
            f"ms at {bandwidth / 1e9:.0f} GB/s",
            [report.moved / bandwidth * 1e3 for report in reports],
        )
    )
    return "\n".join(lines)


def _row(name: str, values: Sequence[float]) -> str:
    return f"{name:24s}" + "".join(f"{value:10.2f}" for value in values)


def main(arguments: argparse.Namespace) -> int:
    """Prints the table; returns the exit status."""
    try:
        if arguments.gpus < 1:
            raise ValueError(f"--gpus: found {arguments.gpus}, accepted: a number >= 1")
        if arguments.bandwidth is not None and not 0 < arguments.bandwidth < math.inf:
            raise ValueError(f"--bandwidth: found {arguments.bandwidth}, accepted: a number > 0")
        shapes = _asked(arguments)
    except (OSError, ValueError) as error:
        print(error)
        return 2
    measured = arguments.bandwidth is None
    bandwidth = measured_bandwidth() if measured else arguments.bandwidth * 1e9
    print(
        table(
            shapes,
            arguments.gpus,
            arguments.precision or PRECISIONS,
            _STATES[arguments.optimizer],
            bandwidth,
            averaged=arguments.ema,
        )
    )
    if measured:
        print("The bandwidth is that of a copy on this machine.")
    return 0


def _asked(arguments: argparse.Namespace) -> Shapes:
    if arguments.model is not None:
        return shapes_of(MODELS[arguments.model])
    if arguments.config is not None:
        found = json.loads(arguments.config.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"--config: found {type(found).__name__}, accepted: an object")
        return shapes_of(found)
    if not 1 <= arguments.params < math.inf:
        raise ValueError(f"--params: found {arguments.params}, accepted: a number >= 1")
    # As rows of blocks, so that all of them are coded where states are.
    rows = max(1, int(arguments.params) // BLOCK)
    return [(rows, BLOCK)]
