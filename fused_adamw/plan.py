"""What training will take on each GPU, by format: ``python -m fused_adamw plan``.

Arithmetic alone; nothing is allocated but the arrays that the bandwidth is measured with.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_adamw import checks
from fused_adamw.decoder_shapes import MODELS, Shape, is_known, shapes_of
from fused_adamw.memory_report import MemoryReport, PlannedTensor, memory_report
from fused_adamw.precision import BLOCK, PRECISIONS, layout_of
from fused_adamw.shards import block_split

GB = 10**9
_MEASURED_BYTES = 2**28
MOST_BANDWIDTH = 1_000_000
"""In GB/s: more is another unit."""
_ROUNDS = 7


class Row(NamedTuple):
    """A format of the table.

    Attributes:
        precision: what the command line calls it.
        note: what tells it from others of the same name.
        dtype: of the parameters and gradients.
        options: of `layout_of`.
    """

    precision: str
    note: str
    dtype: torch.dtype
    options: dict[str, Any]


ROWS = (
    Row("fp32", "", torch.float32, {}),
    Row("bf16", "", torch.bfloat16, {}),
    Row("bf16", "float32 states", torch.bfloat16, {"state_dtype": torch.float32}),
    Row("master", "", torch.bfloat16, {}),
    Row("split", "", torch.bfloat16, {}),
    Row("split", "bfloat16 states", torch.bfloat16, {"state_dtype": torch.bfloat16}),
    Row("kahan", "", torch.bfloat16, {}),
    Row("8bit", "", torch.bfloat16, {}),
    Row("8bit", "16-bit remainder", torch.bfloat16, {"remainder_bits": 16}),
)
"""Every format that differs in bytes."""


def shard(shape: Shape, ranks: int) -> int:
    """Elements of a tensor on the rank that holds most, in the sense of FSDP2's ``fully_shard``.

    The first dimension is cut into as many pieces of the same number of rows, of which the last
    may be short or empty.
    """
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def planned(shapes: Sequence[Shape], ranks: int, row: Row, states: int) -> MemoryReport:
    """Bytes on the rank that holds most.

    Args:
        shapes: of all parameters.
        ranks: over which each is sharded.
        row: the format.
        states: the number of arrays that the rule keeps.
    """

    def tensors() -> Iterator[PlannedTensor]:
        for shape in shapes:
            # Whether states are coded follows from its whole size, and from its shards.
            layout = layout_of(
                row.dtype,
                math.prod(shape),
                row.precision,
                codable=ranks == 1 or block_split(shape, {0: [ranks]}, BLOCK) is not None,
                **row.options,
            )
            yield PlannedTensor(shard(shape, ranks), row.dtype, layout, states)

    return memory_report(tensors())


def measured_bandwidth() -> float:
    """Bytes a second that a copy within the memory of this machine's first device moves."""
    on_gpu = torch.cuda.is_available()
    source = torch.ones(_MEASURED_BYTES, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * _MEASURED_BYTES / statistics.median(seconds[1:])  # the first one maps the memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", choices=list(MODELS), help="one that is known by name")
    model.add_argument(
        "--config", type=Path, metavar="FILE", help="config.json of a model of transformers"
    )
    model.add_argument("--params", metavar="N", help="a number of parameters: 7e9, 70B")
    option = parser.add_argument
    option("--gpus", type=int, default=1, metavar="N", help="that share every tensor; default: 1")
    option("--precision", choices=PRECISIONS, help="only formats of this name")
    option(
        "--states",
        type=int,
        default=2,
        metavar="N",
        help="arrays that the optimizer keeps: 2 for Adam's family (the default), 3 with amsgrad, "
        "1 for SGD with momentum and Lion",
    )
    option(
        "--bandwidth",
        metavar="N",
        help="of a GPU's memory, in GB/s (10^9 bytes a second): 4000; by default that of a copy in "
        "this machine's memory is measured",
    )
    parser.set_defaults(parser=parser)


def main(parsed: argparse.Namespace) -> int:
    """Prints the table; bad options end in argparse's exit status 2."""
    try:
        ranks = checks.count("--gpus", parsed.gpus)
        states = checks.count("--states", parsed.states, at_least=0)
        bandwidth = None if parsed.bandwidth is None else _bandwidth(parsed.bandwidth)
        shapes = _shapes(parsed)
    except ValueError as error:
        parsed.parser.error(str(error))
    rate, source = bandwidth, "given"
    if rate is None:
        rate = measured_bandwidth()
        kind = "GPU" if torch.cuda.is_available() else "CPU"
        source = f"a copy in the memory of this machine's {kind}; --bandwidth is that of others"
    rows = [row for row in ROWS if parsed.precision in (None, row.precision)]
    numel = sum(map(math.prod, shapes))
    print(
        f"{numel:,d} parameter{'s' * (numel != 1)} over {ranks} GPU{'s' * (ranks != 1)}: GB (10^9 "
        "bytes) on the GPU that holds most"
    )
    print(table([(row, planned(shapes, ranks, row, states)) for row in rows], rate))
    print(
        f"extra: masters, remainders, compensations, scales of codes. step: the optimizer's, at "
        f"{rate / GB:,.0f} GB/s ({source})"
    )
    return 0


def table(rows: Sequence[tuple[Row, MemoryReport]], bandwidth: float) -> str:
    """The plans side by side.

    Args:
        rows: formats and their bytes.
        bandwidth: bytes a second.
    """
    columns = ("parameters", "gradients", "states", "extra", "total", "moved", "step")
    lines = [f"{'':24s}" + "".join(f"{column:>12s}" for column in columns[:-1]) + f"{'step':>16s}"]
    for row, report in rows:
        held = dict(report.held)
        main_kinds = [held.pop(kind) for kind in columns[:3]]
        counts = [*main_kinds, sum(held.values()), report.total, report.moved]
        name = ", ".join(filter(None, (row.precision, row.note)))
        cells = "".join(f"  {_digits(count / GB):>10s}" for count in counts)
        lines.append(f"{name:24s}{cells}  {_digits(report.moved / bandwidth * 1e3):>11s} ms")
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Two places, or of what would have none left two digits."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _shapes(parsed: argparse.Namespace) -> list[Shape]:
    """Of the model that the command line names.

    Raises:
        ValueError: naming the option.
    """
    if parsed.model is not None:
        return shapes_of(MODELS[parsed.model])
    if parsed.params is not None:
        rows, rest = divmod(_number(parsed.params), BLOCK)  # so that blocks of codes fit any shard
        return [shape for shape in [(rows, BLOCK), (rest,)] if shape[0]]
    try:
        config = json.loads(parsed.config.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"found {type(config).__name__}, accepted: an object of JSON")
        return _shapes_of_any(config)
    except OSError as error:
        raise ValueError(f"--config: {error}") from None
    except ValueError as error:
        raise ValueError(f"--config: {parsed.config}: {error}") from None


def _shapes_of_any(config: dict[str, Any]) -> list[Shape]:
    """Of a model that is known here, or that transformers knows."""
    names_one = isinstance(config.get("model_type"), str)
    if is_known(config) or not names_one or find_spec("transformers") is None:
        return shapes_of(config)
    try:
        from fused_adamw import transformers_shapes  # which takes long to import
    except ImportError as error:
        raise ValueError(f"found a model that transformers may know: {error}") from error
    return transformers_shapes.shapes_of(config)


def _number(text: str) -> int:
    """A number of parameters, with a unit or without."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    unit = units.get(text[-1:].upper(), 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text) * unit
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number < 1 or number % 1:
        raise ValueError(f"--params: found {text!r}, accepted: an integer >= 1, as 7e9 or 7.5B")
    return int(number)


def _bandwidth(text: str) -> float:
    """Bytes a second, of a number of GB a second that some memory may have."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < MOST_BANDWIDTH:
        raise ValueError(
            f"--bandwidth: found {text!r}, accepted: GB/s as a number > 0 and < {MOST_BANDWIDTH:,}"
        )
    return number * GB
