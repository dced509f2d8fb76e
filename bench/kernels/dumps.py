"""Reads what the compilers left of kernels: PTX, and the dumps that cuobjdump makes of a cubin."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from bench.kernels.compiled import Compiled
from bench.kernels.gpus import SHARED_RESERVED, Gpu
from bench.kernels.names import Kernel, demangled
from bench.kernels.sass import Code


def cuda_kernels(gpu: Gpu, cubin: Path) -> Iterator[Compiled]:
    """Every kernel of a file that nvcc compiled, beside which its PTX and its dumps lie."""
    parts = [cubin.with_suffix(suffix).read_text() for suffix in (".ptx", ".sass", ".usage")]
    pieces = _pieces(*parts)
    for symbol, name in demangled(pieces).items():
        yield _kernel("cuda", Kernel.of(name), gpu, *pieces[symbol])


def triton_kernels(gpu: Gpu, results: Path) -> Iterator[Compiled]:
    """Every kernel of a file that `bench.kernels.triton_compiler` wrote."""
    for result in json.loads(results.read_text()):
        kernel = Kernel.restored(result["kernel"])
        (piece,) = _pieces(result["ptx"], result["sass"], result["usage"]).values()
        yield _kernel("triton", kernel, gpu, *piece, launched_with=result["shared"])


def _pieces(ptx: str, sass: str, usage: str) -> dict[str, tuple[str, str, str]]:
    """What belongs to each kernel, by symbol."""
    ptx_of = {part.split("(", 1)[0]: part for part in ptx.split(".entry ")[1:]}
    sass_of = dict(part.split("\n", 1) for part in sass.split("Function : ")[1:])
    usage_of = dict(part.split(":", 1) for part in usage.split("Function ")[1:])
    return {symbol: (ptx_of[symbol], sass_of[symbol], usage_of[symbol]) for symbol in ptx_of}


def _kernel(
    engine: str, kernel: Kernel, gpu: Gpu, ptx: str, sass: str, usage: str, launched_with: int = 0
) -> Compiled:
    """One kernel; launched with more bytes of shared memory than it declares."""
    resources = {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    declared = resources["SHARED"]
    if declared and gpu.arch >= 90:  # there, ptxas adds what the system takes of each block
        declared -= SHARED_RESERVED
    threads = re.search(r"\.(?:max|req)ntid (\d+)(?:, (\d+), (\d+))?", ptx)
    return Compiled(
        engine=engine,
        kernel=kernel,
        gpu=gpu,
        ptx=ptx,
        code=Code.of(sass),
        threads=math.prod(int(n or 1) for n in threads.groups()) if threads else None,
        registers=resources["REG"],
        stack=resources["STACK"],
        shared=declared + launched_with,
    )
