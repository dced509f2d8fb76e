"""Compiles every kernel of both engines through ninja, which leaves alone what has not changed."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.kernels.compiled import Compiled
from bench.kernels.dumps import cuda_kernels, triton_kernels
from bench.kernels.gpus import GPUS, Gpu
from setup import NVCC_FLAGS, find_nvcc

ROOT = Path(__file__).parents[2]
FOLDER = Path("build", "kernels")
# What compiles Triton's kernels, and finds out which there are.
TRITON_CODE = ("triton_compiler.py", "dumps.py", "names.py", "compiled.py", "sass.py")
# Triton compiles a kernel for each combination of dtypes; these are reported: those of one dtype,
# which CUDA kernels are compiled for too, and the usual ones with states of float32.
TRITON_FORMATS = (
    ("float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "float32"),
)

# A comment with a compiler's version has ninja repeat its work where the version has changed.
NINJA_HEAD = """\
builddir = {folder}
nvcc = {nvcc}
cuobjdump = {cuobjdump}
rule ptx
  command = $nvcc -Icsrc -arch=compute_$arch -ptx -MD -MF $out.d $in -o $out # {versions[nvcc]}
  depfile = $out.d
  deps = gcc
  description = compile $out
rule cubin
  command = $nvcc -arch=sm_$arch -cubin $in -o $out # {versions[nvcc]}
  description = assemble $out
rule dump
  command = $cuobjdump --dump-$what $in > $out
  description = dump $out
rule triton
  command = env -u TRITON_INTERPRET TRITON_CACHE_DIR={folder}/triton-cache $
    {python} -m bench.kernels.triton_compiler $arch $dtypes $out $in # {versions[Triton]}
  description = compile $out
"""


class BuildError(Exception):
    """A tool is missing, or a kernel did not compile."""


def compile_all(gpus: Sequence[Gpu] = GPUS) -> list[Compiled]:
    """Compiles and disassembles what is not up to date below build/, and reads the results.

    Args:
        gpus: what to compile for.

    Raises:
        BuildError: with the compiler's message.
    """
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    head = NINJA_HEAD.format(
        folder=FOLDER,
        nvcc=shlex.join([nvcc(), *NVCC_FLAGS]).replace("$", "$$"),
        cuobjdump=shlex.quote(str(cuobjdump())),
        versions=versions(),
        python=shlex.quote(sys.executable),
    )
    plan = "".join(edge for gpu in gpus for edge in _edges(gpu))
    (folder / "build.ninja").write_text(head + plan)
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
    ninja = [sys.executable, "-m", "ninja", "-f", f"{FOLDER}/build.ninja", *jobs]
    done = subprocess.run(
        ninja, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise BuildError(done.stdout)
    return [compiled for gpu in gpus for compiled in _read(gpu)]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the compilers, on which everything that is reported depends."""
    answer = subprocess.check_output([nvcc(), "--version"], text=True)
    release = re.search(r"V(\d[\d.]+)", answer)
    triton = importlib.metadata.version("triton")
    return {"nvcc": release[1] if release else "unknown", "Triton": triton}


def nvcc() -> str:
    """The compiler that the extension is built with."""
    found = find_nvcc()
    if found is None:
        raise BuildError("nvcc was not found, or is left out by FUSED_ADAMW_CUDA=off")
    return found


def cuobjdump() -> Path:
    """The one that comes with triton, which has nvdisasm beside it."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise BuildError("triton is not installed; it brings the disassembler too")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def _objects(gpu: Gpu) -> list[Path]:
    """One for each source, below `ROOT`."""
    return [FOLDER / f"sm{gpu.arch}-{source.stem}.cubin" for source in _sources()]


def _triton_results(gpu: Gpu) -> dict[tuple[str, str, str], Path]:
    """One for each format, below `ROOT`."""
    name = f"sm{gpu.arch}-triton"
    return {dtypes: FOLDER / f"{name}-{'-'.join(dtypes)}.json" for dtypes in TRITON_FORMATS}


def _edges(gpu: Gpu) -> Iterator[str]:
    """The steps of ninja for one architecture."""
    dumps = []
    for source, cubin in zip(_sources(), _objects(gpu), strict=True):
        ptx = cubin.with_suffix(".ptx")
        yield f"build {ptx}: ptx {source}\n  arch = {gpu.arch}\n"
        yield f"build {cubin}: cubin {ptx}\n  arch = {gpu.arch}\n"
        for suffix, what in ((".sass", "sass"), (".usage", "resource-usage")):
            dumps.append(cubin.with_suffix(suffix))
            yield f"build {dumps[-1]}: dump {cubin}\n  what = {what}\n"
    code = [*(ROOT / "triton_kernels").glob("*.py"), *map(Path(__file__).with_name, TRITON_CODE)]
    needed = " ".join(map(str, [*dumps, *sorted(path.relative_to(ROOT) for path in code)]))
    objects = " ".join(map(str, _objects(gpu)))
    for dtypes, results in _triton_results(gpu).items():
        yield f"build {results}: triton {objects} | {needed}\n"
        yield f"  arch = {gpu.arch}\n  dtypes = {'-'.join(dtypes)}\n"


def _read(gpu: Gpu) -> Iterator[Compiled]:
    for cubin in _objects(gpu):
        yield from cuda_kernels(gpu, ROOT / cubin)
    for results in _triton_results(gpu).values():
        yield from triton_kernels(gpu, ROOT / results)
