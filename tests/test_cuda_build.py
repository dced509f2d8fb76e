"""What nvcc makes of the CUDA kernels, for GPUs that need not be present.

Compiled as the extension compiles them; the machine code is read with the cuobjdump of a CUDA
toolkit or of the triton package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
from sass import BYTES, Code, Kernel, Resources, disassembly, resources

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-I", str(CSRC)]  # as in setup.py
DTYPES = ("float32", "bfloat16", "float16")
ARCHS = (80, 90, 100)
REGISTERS_PER_SM = 65536
THREADS = 256

NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("nvcc is not on the PATH", allow_module_level=True)


def find_cuobjdump() -> str | None:
    """The tool on the PATH, or the one that triton carries; both come with nvdisasm."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(carried) if os.access(carried, os.X_OK) else None
    return found


@dataclass
class Build:
    """One file compiled for one architecture."""

    ptx: str
    resources: dict[Kernel, Resources]
    cubin: Path

    @cached_property
    def code(self) -> dict[Kernel, Code]:
        cuobjdump = find_cuobjdump()
        if cuobjdump is None:
            pytest.skip("cuobjdump is neither on the PATH nor in a triton package")
        return dict(
            disassembly(subprocess.check_output([cuobjdump, "-sass", self.cubin], text=True))
        )


def compile_kernels(dtype: str, arch: int, folder: Path) -> Build:
    assert NVCC is not None
    folder.mkdir()
    cubin = folder / "kernels.cubin"
    command = [NVCC, *FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "--keep", "--keep-dir"]
    source = CSRC / "cuda" / f"kernels_{dtype}.cu"
    done = subprocess.run(
        [*command, folder, source, "-o", cubin], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (ptx,) = folder.glob("*.ptx")
    return Build(ptx.read_text(), resources(done.stderr), cubin)


Builds = dict[tuple[str, int], "Future[Build]"]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Every file for every architecture, compiled once, side by side with the tests."""
    folder = tmp_path_factory.mktemp("cuda")
    pool = ThreadPoolExecutor(os.cpu_count())
    return {
        (dtype, arch): pool.submit(compile_kernels, dtype, arch, folder / f"{dtype}-{arch}")
        for dtype, arch in product(DTYPES, ARCHS)
    }


@pytest.fixture(params=product(DTYPES, ARCHS), ids=lambda key: f"{key[0]}-sm{key[1]}")
def build(request: pytest.FixtureRequest, builds: Builds) -> Build:
    return builds[request.param].result()


def test_no_spills_and_registers_for_full_blocks(build: Build) -> None:
    assert len(build.resources) in (16, 20)  # four variants of the rule, four or five formats
    for kernel, found in build.resources.items():
        assert (found.stack, found.spills) == (0, 0), str(kernel)
        # Four blocks a multiprocessor; three where a thread holds over 32 values.
        values = kernel.elements_per_thread * len(kernel.loaded)
        blocks = 3 if values > 32 else 4
        assert found.registers <= REGISTERS_PER_SM // (THREADS * blocks) // 8 * 8, str(kernel)


def test_every_operation_is_rounded_by_itself(build: Build) -> None:
    ptx = build.ptx
    assert not re.search(r"\b(?:fma|mad)\.\S*f32", ptx)
    assert not re.search(r"\b(?:add|sub|mul)\.f32", ptx)  # without .rn ptxas might fuse them
    assert not re.search(r"\.(?:approx|full|ftz)\b", ptx)
    for operation in ("div", "sqrt"):
        modifiers = set(re.findall(rf"\b{operation}\.(\S*f32)\b", ptx))
        assert modifiers == {"rn.f32"}, operation


def test_main_path_has_only_16_byte_accesses(build: Build) -> None:
    """A thread with full, aligned packs goes round its loop by 16-byte accesses alone.

    Ragged ends and unaligned views need narrower accesses, so the kernel has both. The main path
    is what remains of the loop when the narrower ones are taken out. It must still be a loop, and
    what it loads and stores must be the whole pack: then nothing is left for a narrower access.
    (That a full pack takes this way is a condition in the source, which this cannot see.)
    """
    for kernel, code in build.code.items():
        loop = code.main_loop()
        accesses = [code.operation(code.instructions[a])[:3] for a in loop if code.is_wide(a)]
        packs = {dtype: kernel.elements_per_thread * BYTES[dtype] // 16 for dtype in BYTES}
        wanted = {
            "LDG": sum(packs[dtype] for dtype in kernel.loaded),
            "STG": sum(packs[dtype] for dtype in kernel.stored),
        }
        assert Counter(accesses) == wanted, str(kernel)
        assert not any(re.match(r"LDL|STL", name) for name in code.count()), str(kernel)


def test_main_path_has_no_fused_multiply_add(build: Build) -> None:
    """Every sum and product of the rule is an instruction of its own in the main path.

    The IEEE division and square root are themselves made of fused operations, so their presence
    says nothing; but a sum of the rule that were fused would be missing among the additions.
    """
    for kernel, code in build.code.items():
        count = code.count(code.main_loop())
        halves_in = kernel.loaded.count("float16")  # widened by an exact product
        halves_out = kernel.stored.count("float16")  # denormals are rounded by a sum
        products = 9 + kernel.l2 + halves_in
        sums = 4 + kernel.l2 + halves_out
        elements = kernel.elements_per_thread
        assert count["FMUL"] == products * elements, str(kernel)
        assert count["FADD"] == sums * elements, str(kernel)
