"""The report on all kernels as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from bench.kernels.compiled import Compiled
from bench.kernels.gpus import Gpu
from bench.kernels.sass import WIDE

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MOST_REGISTERS = 64  # at THREADS: then 4 blocks fit into a multiprocessor
THREADS = 256
MOST_INSTRUCTIONS = 80  # a parameter, of AdamW in float32

INTRO = """\
# GPU kernels, as compiled

What {versions} make of every CUDA kernel and of Triton's for some dtypes:
`make kernels` reads it from the machine code and writes this file. No GPU is needed and nothing is
measured. `!` marks an aim that is missed; the columns, and what a blank means, are explained in
[bench/README.md](../README.md#kernel-report).
"""

COLUMNS: dict[str, Callable[[Compiled], str]] = {
    "rule": lambda k: " ".join(
        filter(
            None, (k.kernel.rule or k.kernel.function, k.kernel.variant, k.kernel.whole and "whole")
        )
    ),
    "param/grad/states": lambda k: "/".join(SHORT[x] for x in k.kernel.dtypes) or k.kernel.storage,
    "registers": lambda k: _flag(k.registers, too_many_registers(k)),
    "spills": lambda k: _flag(k.code.local_accesses, k.code.local_accesses > 0),
    "stack B": lambda k: _flag(k.stack, k.stack > 0),
    "shared B": lambda k: str(k.shared),
    "occupancy": lambda k: _number(k.occupancy, "{:.1%}"),
    "in flight": lambda k: _number(k.bytes_in_flight, "{:.0f}", 1 / 1024),
    "accesses": lambda k: _flag(_accesses(k), narrowed(k)),
    "B/param": lambda k: _number(k.bytes_per_param, "{:.0f}"),
    "instr/param": lambda k: _flag(
        _number(k.instructions_per_param, "{:.1f}"), too_many_instructions(k)
    ),
    "bound to": lambda k: _flag(
        _number(k.memory_bound_to, "{:.1f} TB/s", 1e-12), bound_by_instructions(k)
    ),
}


def too_many_registers(kernel: Compiled) -> bool:
    """Whether fewer blocks of 256 threads fit into a multiprocessor than are aimed at."""
    return kernel.threads is not None and kernel.registers * kernel.threads > (
        MOST_REGISTERS * THREADS
    )


def too_many_instructions(kernel: Compiled) -> bool:
    """Whether AdamW in float32 takes more instructions than are aimed at."""
    is_adamw = kernel.kernel.rule == "adam" and not kernel.kernel.variant
    return (
        is_adamw
        and {*kernel.kernel.dtypes} == {"float32"}
        and (kernel.instructions_per_param or 0) > MOST_INSTRUCTIONS
    )


def spilled(kernel: Compiled) -> bool:
    """Whether local memory is used, for spilled registers or anything else."""
    return kernel.stack > 0 or kernel.code.local_accesses > 0


def narrowed(kernel: Compiled) -> bool:
    """Whether a main path moves its arrays otherwise than whole, once and by 16-byte accesses.

    What else it loads may only say what there is to do, as a Triton kernel's tables do.
    """
    path = kernel.path
    if path is None:
        return False
    narrow = [access.kind for access in path.accesses if access.width < WIDE]
    return kernel.states is None or any(path.loop or kind != "load" for kind in narrow)


def bound_by_instructions(kernel: Compiled) -> bool:
    """Whether the memory could deliver more than the instructions take, by the estimate."""
    bound = kernel.memory_bound_to
    return bound is not None and bound < kernel.gpu.bandwidth


AIMS: dict[str, Callable[[Compiled], bool]] = {
    f"more than {MOST_REGISTERS} registers at {THREADS} threads": too_many_registers,
    "spills or stack": spilled,
    "accesses that are not 16 bytes wide": narrowed,
    "bound by instructions, not by memory": bound_by_instructions,
    f"AdamW in float32 in over {MOST_INSTRUCTIONS} instructions a parameter": too_many_instructions,
}


def render(kernels: Sequence[Compiled], versions: Mapping[str, str]) -> str:
    """The report.

    Args:
        kernels: what there is, of every architecture.
        versions: of the compilers, by name.
    """
    return "\n".join(_lines(kernels, versions)) + "\n"


def _lines(kernels: Sequence[Compiled], versions: Mapping[str, str]) -> Iterator[str]:
    yield INTRO.format(versions=" and ".join(f"{name} {x}" for name, x in versions.items()))
    yield "## Aims missed\n"
    groups = Counter((kernel.gpu, kernel.engine) for kernel in kernels)
    heads = [f"{gpu.capability} {engine}" for gpu, engine in groups]
    yield from _table(["kernels with", *heads], _aim_rows(kernels, list(groups)), left=1)
    for gpu in dict.fromkeys(gpu for gpu, _ in groups):
        yield ""
        yield f"## {gpu.capability}: {gpu.name}\n"
        yield (
            f"{gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:.2f} GHz issue at most "
            f"{gpu.issue_rate / 1e12:.1f}e12 instructions a second; the memory moves "
            f"{gpu.bandwidth / 1e12:.2f} TB/s."
        )
        for engine in dict.fromkeys(engine for _, engine in groups):
            chosen = [k for k in kernels if (k.gpu, k.engine) == (gpu, engine)]
            yield f"\n### {gpu.capability} {engine}\n"
            rows = [[cell(k) for cell in COLUMNS.values()] for k in sorted(chosen, key=_order)]
            yield from _table(list(COLUMNS), rows, left=2)


def _aim_rows(
    kernels: Sequence[Compiled], groups: Sequence[tuple[Gpu, str]]
) -> Iterator[list[str]]:
    for aim, missed in AIMS.items():
        counts = Counter((k.gpu, k.engine) for k in kernels if missed(k))
        yield [aim, *(str(counts[group]) for group in groups)]
    counts = Counter((k.gpu, k.engine) for k in kernels)
    yield ["all", *(str(counts[group]) for group in groups)]


def _order(kernel: Compiled) -> tuple[object, ...]:
    """By rule, then by variant, then wide dtypes before narrow ones, and unknown ones last."""
    k = kernel.kernel
    widths = tuple(-width for width in k.widths)
    return k.function, k.rule, len(k.variant), k.variant, not widths, widths, k.dtypes, k.storage


def _accesses(kernel: Compiled) -> str:
    """`16 B: 4 + 3; 8 B: 6 + 0`: loads and stores of each width."""
    if kernel.path is None:
        return ""
    counts: dict[int, Counter[str]] = {}
    for access, n in kernel.path.accesses.items():
        counts.setdefault(access.width, Counter())[access.kind] += n
    return "; ".join(
        f"{width} B: {n['load']} + {n['store'] + n['other']}"
        for width, n in sorted(counts.items(), reverse=True)
    )


def _flag(cell: object, missed: bool) -> str:
    return f"{cell} !" if missed else str(cell)


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else form.format(value * scale)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> Iterator[str]:
    """A Markdown table whose columns line up; the first `left` columns are of words."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    for line in [lines[0], rule, *lines[1:]]:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |"
