"""What Triton compiles the kernel to, for GPUs that need not be present.

Run as a program, this file compiles its cases and prints the results: the tests do so in a process
of its own, since Triton cannot both interpret and compile in one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_adamw.triton_kernels import adam, update

F32, BF16, F16 = "float32", "bfloat16", "float16"
BYTES = {F32: 4, BF16: 2, F16: 2}

ELEMENTS_PER_THREAD = 8
REGISTERS_OF_SM = 65536
BYTES_IN_FLIGHT = 48 * 1024  # what an SM of an H200 needs on its way to keep the memory busy


@triton.jit  # type: ignore[untyped-decorator]
def multiply_add(param, grad, states, coefficients, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A rule that asks for fused multiply-add and has no division or root, which consist of it."""
    return coefficients[0] * param + coefficients[1] * grad, states


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel to compile."""

    dtypes: tuple[str, str, str]  # of param, grad, state
    options: tuple[bool, ...] = (False, False)
    capability: int = 90
    rule: Any = adam
    states: int = 2
    coefficients: int = 8

    @property
    def slots(self) -> list[str]:
        """The storage dtype of each array."""
        param, grad, state = self.dtypes
        return [param, grad, *[state] * self.states]

    def __str__(self) -> str:
        return "-".join([self.rule.__name__, *self.dtypes, *map(str, self.options)])


MAIN = [(F32, F32, F32), (BF16, BF16, BF16)]
MIXED = [
    (F32, BF16, F32),
    (F32, F32, BF16),
    (BF16, BF16, F32),
    (BF16, F32, BF16),
    (F16, F16, F16),
]
HOPPER = [
    *[Case(dtypes) for dtypes in MAIN],
    *[Case(dtypes, (True, True), states=3) for dtypes in [*MAIN, *MIXED]],
]
OTHERS = [Case(dtypes, capability=capability) for capability in (80, 100) for dtypes in MAIN]
FUSIBLE = Case((F32, F32, F32), (), rule=multiply_add, states=1, coefficients=2)
CASES = [*HOPPER, *OTHERS, FUSIBLE]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a case was compiled to."""

    ptx: str
    sass: str
    resources: dict[str, int]  # by cuobjdump's names


def compile_case(case: Case) -> Compiled:
    """Compiles and disassembles; only in a process that does not interpret."""
    constants = update.constants(
        case.rule, case.options, case.dtypes, len(case.slots), case.coefficients
    )
    tables = {"chunks": "*i32", "tensors": "*i64", "coefficients": "*fp32"}
    source = ASTSource(
        update.update_kernel,
        signature=tables | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    target = GPUTarget("cuda", case.capability, 32)
    kernel = triton.compile(source, target=target, options=update.COMPILE_OPTIONS)

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])

        def run(tool: str, option: str) -> str:
            return subprocess.check_output([tools / tool, option, cubin], text=True)

        sass = run("nvdisasm", "--print-code")
        usage = run("cuobjdump", "--dump-resource-usage")
    resources = {name: int(n) for name, n in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", usage)}
    return Compiled(kernel.asm["ptx"], sass, resources)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Compiled]:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    output = subprocess.check_output([sys.executable, __file__], env=environment, text=True)
    results = [Compiled(**result) for result in json.loads(output)]
    return dict(zip(CASES, results, strict=True))


def accesses(ptx: str) -> Counter[tuple[str, int]]:
    """How often the PTX has each kind of access to global memory: load or store, and its bits."""
    found = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
    return Counter((kind, int(count or 1) * int(bits)) for kind, count, bits in found)


def table_loads(case: Case) -> Counter[tuple[str, int]]:
    """The accesses that find out what to do."""
    l2, _ = case.options
    coefficients = case.coefficients if l2 else case.coefficients - 1  # the one that is not used
    chunk, addresses, numel, row = 2, len(case.slots), 1, 1
    return Counter({("ld", 32): chunk + coefficients, ("ld", 64): addresses + numel + row})


hopper = pytest.mark.parametrize("case", HOPPER, ids=str)


@hopper
def test_aligned_memory_goes_by_16_byte_accesses(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    wanted = table_loads(case)
    for slot, dtype in enumerate(case.slots):
        kinds = ["ld"] if slot == update.GRAD.value else ["ld", "st"]
        for kind in kinds:
            wanted[kind, 128] += ELEMENTS_PER_THREAD * BYTES[dtype] // 16
            wanted[kind, 8 * BYTES[dtype]] += 1  # the rest, element by element
    assert accesses(compiled[case].ptx) == wanted

    sass = compiled[case].sass
    assert len(re.findall(r"\bLDG\S*\.128\b", sass)) == wanted["ld", 128]
    assert len(re.findall(r"\bSTG\S*\.128\b", sass)) == wanted["st", 128]


@hopper
def test_every_access_to_a_tensor_is_masked(case: Case, compiled: dict[Case, Compiled]) -> None:
    lines = re.findall(r"^.*\b(?:ld|st)\.global.*$", compiled[case].ptx, re.MULTILINE)
    without = accesses("\n".join(line for line in lines if "@%p" not in line))
    assert without == table_loads(case)


@hopper
def test_enough_bytes_in_flight(case: Case, compiled: dict[Case, Compiled]) -> None:
    allocated = -(-compiled[case].resources["REG"] // 8) * 8 * update.THREADS.value
    tile_bytes = update.TILE.value * sum(BYTES[dtype] for dtype in case.slots)
    assert REGISTERS_OF_SM // allocated * tile_bytes >= BYTES_IN_FLIGHT


def test_registers(compiled: dict[Case, Compiled]) -> None:
    for dtypes in MAIN:
        assert compiled[Case(dtypes)].resources["REG"] <= 64


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-sm{case.capability}")
def test_nothing_is_spilled(case: Case, compiled: dict[Case, Compiled]) -> None:
    resources = compiled[case].resources
    assert (resources["STACK"], resources["LOCAL"]) == (0, 0)
    assert not re.search(r"\b(?:LDL|STL)\b", compiled[case].sass)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-sm{case.capability}")
def test_every_operation_is_rounded_by_itself(case: Case, compiled: dict[Case, Compiled]) -> None:
    ptx = compiled[case].ptx
    assert not re.search(r"\bfma\b", ptx)
    assert not re.search(r"\b(?:add|sub|mul)\.f32", ptx)  # without .rn ptxas might fuse them
    assert not re.search(r"\.(?:approx|full|ftz)\b", ptx)
    if case.rule is adam:
        elements = ELEMENTS_PER_THREAD + 1  # of the main path, of the rest
        assert len(re.findall(r"\bdiv\.rn\.f32", ptx)) == elements
        assert len(re.findall(r"\bsqrt\.rn\.f32", ptx)) == elements


def test_ptxas_fuses_nothing(compiled: dict[Case, Compiled]) -> None:
    sass = compiled[FUSIBLE].sass
    assert re.search(r"\bFMUL\b", sass)
    assert not re.search(r"\bFFMA", sass)


@pytest.mark.parametrize(("dtype", "suffix"), [(BF16, "bf16"), (F16, "f16")])
def test_rounding_to_storage_is_to_nearest_even(
    dtype: str, suffix: str, compiled: dict[Case, Compiled]
) -> None:
    ptx = compiled[Case((dtype, dtype, dtype), (True, True), states=3)].ptx
    narrowing = set(re.findall(rf"\bcvt\S*\.{suffix}(?:x2)?\.f32", ptx))
    assert narrowing == {f"cvt.rn.{suffix}x2.f32", f"cvt.rn.{suffix}.f32"}


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(compile_case(case)) for case in CASES]))
