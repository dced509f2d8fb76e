"""What nvcc and Triton make of the GPU kernels, for GPUs that need not be present."""

from __future__ import annotations

import difflib
import re

import pytest

from bench import sanitize_case
from bench.kernels import build
from bench.kernels.__main__ import REPORT
from bench.kernels.compiled import Compiled
from bench.kernels.gpus import GPUS
from bench.kernels.report import narrowed, render, spilled
from bench.kernels.sass import WIDE

BYTES_IN_FLIGHT = 48 * 1024  # what an SM of an H200 needs on its way to keep the memory busy

# ptxas stops at 80 registers, which let three blocks be resident, and spills two more.
KNOWN_TO_SPILL = {
    f"triton-adam-amsgrad-float32-{grad}-float32-sm100" for grad in ("bfloat16", "float16")
}


@pytest.fixture(params=["cuda", "triton"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=GPUS, ids=lambda gpu: f"sm{gpu.arch}")
def kernels(
    request: pytest.FixtureRequest, engine: str, compiled_kernels: list[Compiled]
) -> list[Compiled]:
    """The kernels of one engine for one architecture."""
    found = [k for k in compiled_kernels if (k.engine, k.gpu) == (engine, request.param)]
    assert found
    return found


def test_local_memory_is_not_used(kernels: list[Compiled]) -> None:
    found = {str(kernel) for kernel in kernels if spilled(kernel)}
    assert found == KNOWN_TO_SPILL & {str(kernel) for kernel in kernels}


def test_main_path_has_only_16_byte_accesses(kernels: list[Compiled]) -> None:
    """All arrays are moved whole and once, by 16-byte accesses of a narrowest array or of two.

    Ragged ends and unaligned views need narrower accesses, so the kernels have both. (That a full
    pack takes the main path is a condition in the source, which the machine code does not tell.)
    """
    for kernel in kernels:
        assert kernel.path is not None, str(kernel)
        assert kernel.path.loop == (kernel.engine == "cuda"), str(kernel)
        assert not narrowed(kernel), f"{kernel}: {kernel.path.accesses}"
        assert kernel.elements is not None
        assert kernel.elements * min(kernel.kernel.widths) % WIDE == 0, str(kernel)
        assert kernel.states == 2 + (("amsgrad", True) in kernel.kernel.options), str(kernel)


def test_enough_bytes_in_flight(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert kernel.bytes_in_flight is not None
        assert kernel.bytes_in_flight >= BYTES_IN_FLIGHT, str(kernel)


def test_every_operation_is_rounded_by_itself(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        ptx = kernel.ptx
        assert not re.search(r"\b(?:fma|mad)\.\S*f32", ptx), str(kernel)
        # Without .rn ptxas might fuse them.
        assert not re.search(r"\b(?:add|sub|mul)\.f32", ptx), str(kernel)
        assert not re.search(r"\.(?:approx|full|ftz)\b", ptx), str(kernel)
        for operation in ("div", "sqrt"):
            modifiers = set(re.findall(rf"\b{operation}\.(\S*f32)\b", ptx))
            assert modifiers == {"rn.f32"}, f"{kernel}: {operation}"


def test_main_path_fuses_only_within_division_and_root(kernels: list[Compiled]) -> None:
    """An IEEE division takes five fused operations after its reciprocal, a square root two."""
    for kernel in kernels:
        assert kernel.path is not None
        count = kernel.path.operations
        assert not {name for name in count if re.match(r"HFMA2\.BF16|FFMA2", name)}, str(kernel)
        fused = sum(n for name, n in count.items() if name.split(".")[0] == "FFMA")
        assert fused == 5 * count["MUFU.RCP"] + 2 * count["MUFU.RSQ"], str(kernel)
        assert count["MUFU.RCP"] == count["MUFU.RSQ"] == kernel.elements, str(kernel)


def test_the_sanitizers_watch_every_kernel(kernels: list[Compiled]) -> None:
    assert len(kernels) == len(sanitize_case.VARIANTS)


def test_the_committed_report_is_up_to_date(compiled_kernels: list[Compiled]) -> None:
    committed = REPORT.read_text()
    versions = build.versions()
    if any(f"{name} {version}" not in committed for name, version in versions.items()):
        pytest.skip(f"the committed report is of other compilers than {versions}")
    new = render(compiled_kernels, versions)
    lines = committed.splitlines(), new.splitlines()
    difference = "\n".join(difflib.unified_diff(*lines, "committed", "now", lineterm="", n=0))
    assert committed == new, f"run `make kernels` and commit what it writes:\n{difference}"
