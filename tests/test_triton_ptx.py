"""What Triton compiles the kernels to, for GPUs that need not be present.

Run as a program, this file compiles its cases and prints the results: the tests do so in a process
of its own, since Triton cannot both interpret and compile in one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from bench.kernels.names import BYTES
from bench.kernels.triton_compiler import Case, compile_case, compile_norm
from fused_adamw.triton_kernels import RULES, norm, update

F32, BF16, F16, CODE8 = "float32", "bfloat16", "float16", "code8"

pytestmark = pytest.mark.xdist_group("compiled by Triton")

ELEMENTS_PER_THREAD = 8


@triton.jit  # type: ignore[untyped-decorator]
def multiply_add(param, grad, states, coefficients, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A rule that asks for fused multiply-add and has no division or root, which consist of it."""
    scale, rate = coefficients
    return scale * param + rate * grad, states


MAIN = [(F32, F32, F32), (BF16, BF16, BF16)]
MIXED = [
    (F32, BF16, F32),
    (F32, F32, BF16),
    (BF16, BF16, F32),
    (BF16, F32, BF16),
    (F16, F16, F16),
]
ADAMW, L2_AMSGRAD = (False, False, False), (True, True, False)
CASES = [
    *[Case(RULES["adam"], ADAMW, dtypes, states=2) for dtypes in MAIN],
    *[Case(RULES["adam"], L2_AMSGRAD, dtypes, states=3) for dtypes in [*MAIN, *MIXED]],
    Case(RULES["sgd"], (False, False), (BF16, BF16, BF16), states=0),
    Case(RULES["sgd"], (True, True), (BF16, BF16, BF16), states=1),
    Case(RULES["rmsprop"], (True, True), (BF16, BF16, F32), states=3),
    Case(RULES["adagrad"], (), (BF16, BF16, F32), states=1),
    Case(RULES["adadelta"], (), (F32, F32, F32), states=2),
    Case(RULES["adamax"], (), (F32, BF16, F32), states=2),
    Case(RULES["lion"], (), (F32, F32, BF16), states=1),
]
WHOLE_STEPS = [
    # The most arrays that a tensor may have.
    *[
        Case(RULES["adam"], L2_AMSGRAD, dtypes, states=3, ema=True, zero_grads=True)
        for dtypes in [*MAIN, *MIXED]
    ],
    Case(RULES["adam"], ADAMW, MAIN[1], states=2, ema=True),
    Case(RULES["adam"], ADAMW, MAIN[1], states=2, zero_grads=True),
]
MOMENTS, AMSGRAD_MOMENTS = ("signed", "square"), ("signed", "square", "square")
FORMATS = [
    Case(RULES["adam"], ADAMW, (F32, F32, CODE8), states=2, kinds=MOMENTS),
    Case(RULES["adam"], ADAMW, (BF16, BF16, BF16), states=2, stochastic=True),
    Case(RULES["adam"], ADAMW, (BF16, F32, F32), states=2, stochastic=True),
    Case(RULES["adam"], ADAMW, (BF16, BF16, F32), states=2, beside="master"),
    Case(RULES["adam"], ADAMW, (F16, F16, F32), states=2, beside="master"),
    Case(RULES["adam"], ADAMW, (BF16, BF16, F32), states=2, beside="remainder16"),
    Case(RULES["adam"], ADAMW, (BF16, BF16, BF16), states=2, beside="remainder16"),
    Case(RULES["adam"], ADAMW, (BF16, BF16, CODE8), 2, "remainder16", kinds=MOMENTS),
    Case(RULES["adam"], ADAMW, (BF16, BF16, CODE8), 2, "remainder8", kinds=MOMENTS),
    Case(RULES["adam"], ADAMW, (BF16, BF16, BF16), states=2, beside="compensation"),
    Case(
        *(RULES["adam"], L2_AMSGRAD, (BF16, F32, CODE8), 3, "remainder8"),
        kinds=AMSGRAD_MOMENTS,
        ema=True,
        zero_grads=True,
    ),
    Case(RULES["adamax"], (), (F32, BF16, CODE8), states=2, kinds=("signed", "magnitude")),
    Case(RULES["adam"], ADAMW, (BF16, BF16, BF16), states=2, stochastic=True, runs=True),
    Case(RULES["adam"], ADAMW, (BF16, BF16, CODE8), 2, "remainder8", kinds=MOMENTS, runs=True),
]
CASES += [*WHOLE_STEPS, *FORMATS]
NORM_DTYPES = [F32, BF16, F16]
# Coefficients that options leave out: l2 and b; b; momentum, c and ahead.
UNUSED = {("adam", ADAMW): 2, ("adam", L2_AMSGRAD): 1, ("sgd", (False, False)): 3}
FUSIBLE = Case(multiply_add, (), (F32, F32, F32), states=1)
ARCH = 90

Compiled = dict[str, str]  # see compile_case


def label(case: Case) -> str:
    beside = [case.beside] if case.beside else ["stochastic"] * case.stochastic
    passes = ["runs"] * case.runs + ["ema"] * case.ema + ["zero"] * case.zero_grads
    options = map(str, case.options)
    return "-".join([case.rule.__name__, *case.dtypes, *beside, *options, *passes])


def element_sizes(case: Case) -> list[int]:
    """Bytes of an element of each array."""
    return [dtype.primitive_bitwidth // 8 for dtype in case.layout.DTYPES]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Case | str, Compiled]:
    """Of each case the update, of each dtype of gradients the norm."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    output = subprocess.check_output([sys.executable, __file__], env=environment, text=True)
    return dict(zip([*CASES, FUSIBLE, *NORM_DTYPES], json.loads(output), strict=True))


def accesses(ptx: str) -> Counter[tuple[str, int]]:
    """How often the PTX has each kind of access to global memory: load or store, and its bits."""
    found = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
    return Counter((kind, int(count or 1) * int(bits)) for kind, count, bits in found)


def table_loads(case: Case) -> Counter[tuple[str, int]]:
    """The accesses that find out what to do."""
    of_the_rule = case.coefficients - UNUSED.get((case.rule.__name__, case.options), 0)
    draws = case.layout.DRAWS
    # The gradient's factor, the average's weight, the number of steps.
    coefficients = of_the_rule + 1 + case.ema + draws
    addresses = len(element_sizes(case)) + len(case.kinds)
    chunk, numel, row, source = 2, 1, 1, 2 * draws + 2 * case.layout.RUNS
    return Counter({("ld", 32): chunk + coefficients, ("ld", 64): addresses + numel + row + source})


all_cases = pytest.mark.parametrize("case", CASES, ids=label)


@all_cases
def test_aligned_memory_goes_by_16_byte_accesses(
    case: Case, compiled: dict[Case | str, Compiled]
) -> None:
    packs, rest = table_loads(case), Counter[tuple[str, int]]()
    for slot, size in enumerate(element_sizes(case)):
        kinds = ["ld"] if slot == update.GRAD.value and not case.zero_grads else ["ld", "st"]
        if slot == update.PARAM.value and case.beside == "master":
            kinds = ["st"]
        bits = 8 * size * ELEMENTS_PER_THREAD  # of arrays of bytes, no more than 8 of them
        for kind in kinds:
            packs[kind, min(bits, 128)] += -(-bits // 128)
            rest[kind, 8 * size] += 1  # element by element
    for scales in (packs, rest):
        scales["ld", 32] += len(case.kinds)
        scales["st", 32] += len(case.kinds)
    found = accesses(compiled[case]["ptx"])
    # Where a rule is short, the compiler unrolls the loop over the rest.
    stored = ("st", 8 * element_sizes(case)[0])
    unrolled = (found - packs)[stored] // rest[stored]
    assert unrolled in (1, 2, 4)
    assert found == packs + Counter({access: unrolled * n for access, n in rest.items()})


@pytest.mark.parametrize("case", [*WHOLE_STEPS, *FORMATS], ids=label)
def test_local_memory_is_not_used(case: Case, compiled: dict[Case | str, Compiled]) -> None:
    assert not spills(compiled[case])


def spills(kernel: Compiled) -> bool:
    return "STACK:0 " not in kernel["usage"] or bool(re.search(r"\b(?:LDL|STL)\b", kernel["sass"]))


@all_cases
def test_every_access_to_a_tensor_is_masked(
    case: Case, compiled: dict[Case | str, Compiled]
) -> None:
    lines = re.findall(r"^.*\b(?:ld|st)\.global.*$", compiled[case]["ptx"], re.MULTILINE)
    without = accesses("\n".join(line for line in lines if "@%p" not in line))
    assert without == table_loads(case)


@all_cases
def test_operations_are_rounded_one_by_one(
    case: Case, compiled: dict[Case | str, Compiled]
) -> None:
    ptx = compiled[case]["ptx"]
    assert not re.search(r"\bfma\b|\bmad\.\S*f\d|\.ftz\b|\.approx\b|\.full\b", ptx)
    assert set(re.findall(r"\b(?:div|sqrt)\.\S*f\d+", ptx)) <= {"div.rn.f32", "sqrt.rn.f32"}


@pytest.mark.parametrize("case", [case for case in FORMATS if case.kinds], ids=label)
def test_blocks_of_codes_stay_within_a_warp(
    case: Case, compiled: dict[Case | str, Compiled]
) -> None:
    """Where memory is aligned 8 threads have a block: 3 exchanges find its largest magnitude."""
    exchanges = re.findall(r"shfl\.sync\.bfly\.b32\s.*, (\d+), 31, -1;", compiled[case]["ptx"])
    assert exchanges[: 3 * case.states] == ["4", "2", "1"] * case.states


def test_ptxas_fuses_nothing(compiled: dict[Case | str, Compiled]) -> None:
    sass = compiled[FUSIBLE]["sass"]
    assert re.search(r"\bFMUL\b", sass)
    assert not re.search(r"\bFFMA", sass)


@pytest.mark.parametrize(("dtype", "suffix"), [(BF16, "bf16"), (F16, "f16")])
def test_rounding_to_storage_is_to_nearest_even(
    dtype: str, suffix: str, compiled: dict[Case | str, Compiled]
) -> None:
    ptx = compiled[Case(RULES["adam"], L2_AMSGRAD, (dtype, dtype, dtype), states=3)]["ptx"]
    narrowing = set(re.findall(rf"\bcvt\S*\.{suffix}(?:x2)?\.f32", ptx))
    assert narrowing == {f"cvt.rn.{suffix}x2.f32", f"cvt.rn.{suffix}.f32"}


all_norms = pytest.mark.parametrize("dtype", NORM_DTYPES)


@all_norms
def test_norm_reads_every_element_once(dtype: str, compiled: dict[Case | str, Compiled]) -> None:
    ptx = compiled[dtype]["ptx"]
    lanes = norm.SEGMENTS.value * norm.LANES.value // norm.THREADS
    tables = Counter({("ld", 32): 2, ("ld", 64): 3, ("st", 64): 1})
    rows = Counter({("ld", 8 * BYTES[dtype]): lanes * (norm.ROWS.value + 1)})  # and what is left
    assert accesses(ptx) == rows + tables
    loads = re.findall(r"^.*\bld\.global.*$", ptx, re.MULTILINE)
    assert sum("@%p" not in load for load in loads) == 5  # the tables'


@all_norms
def test_norm_uses_no_local_memory(dtype: str, compiled: dict[Case | str, Compiled]) -> None:
    assert not spills(compiled[dtype])


@all_norms
def test_norm_adds_and_multiplies_in_binary64(
    dtype: str, compiled: dict[Case | str, Compiled]
) -> None:
    ptx, sass = compiled[dtype]["ptx"], compiled[dtype]["sass"]
    assert not re.search(r"\bfma\b|\bmad\.\S*f|\b(?:add|mul)\.\S*f32|\.ftz\b", ptx)
    assert re.search(r"\bDMUL\b", sass)
    assert re.search(r"\bDADD\b", sass)
    assert not re.search(r"\bDFMA\b|\bF(?:ADD|MUL|FMA)\b", sass)


if __name__ == "__main__":
    kernels = [compile_case(case, ARCH) for case in [*CASES, FUSIBLE]]
    print(json.dumps(kernels + [compile_norm(dtype, ARCH) for dtype in NORM_DTYPES]))
