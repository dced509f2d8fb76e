"""What nvcc and Triton make of the GPU kernels, for a GPU that need not be present."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from bench import sanitize_case
from bench.kernels import build
from bench.kernels.__main__ import REPORT
from bench.kernels.compiled import Compiled
from bench.kernels.names import Kernel
from bench.kernels.report import narrowed, render, spilled
from bench.kernels.sass import WIDE
from fused_adamw import _C, engines
from fused_adamw.triton_kernels import RULES

pytestmark = pytest.mark.xdist_group("compiled kernels")

ELEMENTS_OF_A_THREAD = 16  # at once, where states are coded
BYTES_IN_FLIGHT = 48 * 1024  # what an SM of an H200 needs on its way to keep the memory busy


# Kernels of whole steps also hold what is observed and averaged, in 128 registers against half of
# the warps that more would cost: those of three coded states spill what a thread reads once. The
# tick's one thread a parameter may spill.
WHOLE_STEPS_THAT_SPILL = {
    *("adam amsgrad whole", "adam l2 amsgrad whole", "rmsprop centered momentum whole"),
}
# All in bfloat16, in 64 registers; and for 10.0 three states of mixed dtypes, in 80.
STEPS_THAT_SPILL = {"adam l2 nesterov", "rmsprop centered momentum"}
# ptxas stops at 64 registers, which let four blocks be resident, and spills two more.
KNOWN_TO_SPILL = {
    "triton-adamax-float32-bfloat16-float32-sm90",
    "cuda-adam-l2 nesterov-bfloat16-bfloat16-bfloat16-sm90",
}


class Expected(NamedTuple):
    """What a rule takes for an element."""

    states: int
    divisions: int
    roots: int


EXPECTED = {
    "adam": Expected(2, 1, 1),
    "sgd": Expected(0, 0, 0),
    "rmsprop": Expected(1, 1, 1),
    "adagrad": Expected(1, 1, 1),
    "adadelta": Expected(2, 1, 2),
    "adamax": Expected(2, 1, 0),
    "lion": Expected(1, 0, 0),
}
OPTIONS_WITH_A_STATE = {"amsgrad", "centered", "momentum"}
MOST_STACK_OF_A_WHOLE_STEP = 16  # bytes a thread
UNIFORM = (("float32",) * 3, ("bfloat16",) * 3)
# Dtypes, or where they are told apart at run time the storage.
STORAGES = {"cuda": {*UNIFORM, "mixed", "joined"}, "triton": {*build.TRITON_FORMATS}}
WHOLE_STORAGES = {UNIFORM[0], "mixed", "joined", "coded"}


@pytest.fixture(params=["cuda", "triton"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def updates(engine: str, compiled_kernels: list[Compiled]) -> list[Compiled]:
    """The kernels of one engine that update."""
    return [k for k in compiled_kernels if k.engine == engine and k.kernel.rule]


@pytest.fixture
def kernels(updates: list[Compiled]) -> list[Compiled]:
    """Those that do nothing beside."""
    return [kernel for kernel in updates if not kernel.kernel.whole]


def storage_of(kernel: Kernel) -> tuple[str, ...] | str:
    return kernel.dtypes or kernel.storage


def states_of(kernel: Compiled) -> int:
    on = {name for name, value in kernel.kernel.options if value}
    return EXPECTED[kernel.kernel.rule].states + len(on & OPTIONS_WITH_A_STATE)


def test_whole_steps_are_compiled_too(compiled_kernels: list[Compiled]) -> None:
    """Of CUDA for float32 and for what is told apart at run time, where a bit may be spilled."""
    cuda = [kernel for kernel in compiled_kernels if kernel.engine == "cuda"]
    functors = {kernel.kernel.functor for kernel in cuda if kernel.kernel.rule}
    wanted = {(functor, storage) for functor in functors for storage in WHOLE_STORAGES}
    whole = [kernel for kernel in cuda if kernel.kernel.whole]
    assert {(kernel.kernel.functor, storage_of(kernel.kernel)) for kernel in whole} == wanted
    assert len(whole) == len(wanted)
    for kernel in whole:
        assert kernel.stack <= MOST_STACK_OF_A_WHOLE_STEP, str(kernel)
        if kernel.kernel.dtypes:
            assert not spilled(kernel), str(kernel)


def test_accesses_to_coded_states_are_wide(compiled_kernels: list[Compiled]) -> None:
    """Of each array a 16-byte access, and the largest magnitudes shared by shuffles."""
    coded = [kernel for kernel in compiled_kernels if kernel.kernel.storage == "coded"]
    assert coded
    for kernel in coded:
        count = kernel.code.count()
        states = states_of(kernel)
        wide = {
            kind: sum(n for name, n in count.items() if name.startswith(kind) and "128" in name)
            for kind in ("LDG", "STG")
        }
        # A bfloat16 or float32 parameter, its remainder and the gradient; the states.
        assert wide["LDG"] >= 2 + 4 + 1 + 2 + states, str(kernel)
        assert wide["STG"] >= 2 + 4 + 1 + states, str(kernel)
        # The division of an index has some; of codes there would be one an element.
        conversions = sum(n for name, n in count.items() if re.match(r"I2F|F2I", name))
        assert conversions < ELEMENTS_OF_A_THREAD, str(kernel)
        if states:
            assert count["SHFL.BFLY"] >= 2 * states, str(kernel)


def test_kernels_beside_the_updates(compiled_kernels: list[Compiled]) -> None:
    """The squares, their fold and the tick, which has the stack of a schedule's program."""
    found = {
        kernel.kernel.function: kernel for kernel in compiled_kernels if not kernel.kernel.rule
    }
    assert {*found} == {"square_sum_kernel", "fold_kernel", "tick_kernel"}
    assert not spilled(found["square_sum_kernel"])
    assert not spilled(found["fold_kernel"])
    for kernel in found.values():
        assert not re.search(r"\bfma\.rn\.f(?:32|64)", kernel.ptx), str(kernel)


@pytest.fixture
def legible(kernels: list[Compiled]) -> list[Compiled]:
    """Those with a main path that can be read: whose dtypes are not told apart at run time."""
    return [kernel for kernel in kernels if kernel.kernel.dtypes]


def test_every_functor_is_compiled_for_every_storage(engine: str, kernels: list[Compiled]) -> None:
    functors = {kernel.kernel.functor for kernel in kernels}
    assert {rule for rule, _ in functors} == {*EXPECTED} == {*RULES}
    wanted = {(functor, storage) for functor in functors for storage in STORAGES[engine]}
    assert {(kernel.kernel.functor, storage_of(kernel.kernel)) for kernel in kernels} == wanted
    assert len(kernels) == len(wanted)


def test_local_memory_is_not_used(kernels: list[Compiled]) -> None:
    found = {str(kernel) for kernel in kernels if spilled(kernel)}
    assert found == KNOWN_TO_SPILL & {str(kernel) for kernel in kernels}


def test_main_path_has_only_16_byte_accesses(legible: list[Compiled]) -> None:
    """All arrays are moved whole and once, by 16-byte accesses of a narrowest array or of two.

    Ragged ends and unaligned views need narrower accesses, so the kernels have both. (That a full
    pack takes the main path is a condition in the source, which the machine code does not tell.)
    """
    for kernel in legible:
        assert kernel.path is not None, str(kernel)
        assert kernel.path.loop == (kernel.engine == "cuda"), str(kernel)
        assert not narrowed(kernel), f"{kernel}: {kernel.path.accesses}"
        assert kernel.elements is not None
        assert kernel.elements * min(kernel.kernel.widths) % WIDE == 0, str(kernel)
        assert kernel.states == states_of(kernel), str(kernel)


def test_enough_bytes_in_flight(legible: list[Compiled]) -> None:
    for kernel in legible:
        assert kernel.bytes_in_flight is not None
        assert kernel.bytes_in_flight >= BYTES_IN_FLIGHT, str(kernel)


def test_every_operation_is_rounded_by_itself(updates: list[Compiled]) -> None:
    for kernel in updates:
        ptx = kernel.ptx
        assert not re.search(r"\b(?:fma|mad)\.\S*f32", ptx), str(kernel)
        # Without .rn ptxas might fuse them.
        assert not re.search(r"\b(?:add|sub|mul)\.f32", ptx), str(kernel)
        assert not re.search(r"\.(?:approx|full|ftz)\b", ptx), str(kernel)
        expected = EXPECTED[kernel.kernel.rule]
        divides = expected.divisions or (kernel.kernel.storage == "coded" and states_of(kernel))
        for operation, n in (("div", divides), ("sqrt", expected.roots)):
            modifiers = set(re.findall(rf"\b{operation}\.(\S*f32)\b", ptx))
            assert modifiers == ({"rn.f32"} if n else set()), f"{kernel}: {operation}"


def test_main_path_fuses_only_within_division_and_root(legible: list[Compiled]) -> None:
    """An IEEE division takes five fused operations after its reciprocal, a square root two."""
    for kernel in legible:
        assert kernel.path is not None
        assert kernel.elements is not None
        count = kernel.path.operations
        assert not {name for name in count if re.match(r"HFMA2\.BF16|FFMA2", name)}, str(kernel)
        fused = sum(n for name, n in count.items() if name.split(".")[0] == "FFMA")
        assert fused == 5 * count["MUFU.RCP"] + 2 * count["MUFU.RSQ"], str(kernel)
        expected = EXPECTED[kernel.kernel.rule]
        assert count["MUFU.RCP"] == expected.divisions * kernel.elements, str(kernel)
        assert count["MUFU.RSQ"] == expected.roots * kernel.elements, str(kernel)


def test_bfloat16_is_rounded_in_pairs(legible: list[Compiled]) -> None:
    for kernel in legible:
        assert kernel.path is not None
        assert kernel.elements is not None
        assert kernel.states is not None
        param, _, state = kernel.kernel.dtypes
        narrow = (param == "bfloat16") + kernel.states * (state == "bfloat16")
        count = kernel.path.operations
        pairs = sum(n for name, n in count.items() if name.startswith("F2FP.BF16"))
        assert pairs == narrow * kernel.elements / 2, str(kernel)


def test_the_sanitizers_watch_every_kernel(
    compiled_kernels: list[Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = set()

    def record(bucket: _C.Bucket, _: Sequence[_C.Hyperparameters]) -> None:
        dtypes = (bucket.param_dtype, bucket.grad_dtype, bucket.state_dtype)
        storage: tuple[str, ...] | str = dtypes if dtypes in UNIFORM else "mixed"
        if bucket.beside or bucket.stochastic:
            storage = "joined"
        if bucket.state_dtype == "code8":
            storage = "coded"
        ran.add((bucket.functor, bucket.options, storage, storage == "coded" or whole))

    monkeypatch.setitem(engines._BY_NAME, "cpu", engines._CPU._replace(update=record))
    for case in sanitize_case.CASES:
        whole = case.options.keys() >= sanitize_case.WHOLE.keys()
        sanitize_case.run("cpu", case)
    cuda = [kernel.kernel for kernel in compiled_kernels if kernel.engine == "cuda"]
    assert ran >= {
        (*kernel.functor, storage_of(kernel), kernel.whole)
        for kernel in cuda
        if kernel.rule and not never_runs(kernel)
    }


def never_runs(kernel: Kernel) -> bool:
    """Centered, no state is coded: the variance is a difference of two of them."""
    return kernel.storage == "coded" and ("centered", True) in kernel.options


def sections(report: str) -> dict[str, str]:
    """The text below each heading."""
    return dict(section.split("\n", 1) for section in report.split("\n## ")[1:])


def test_the_committed_report_is_up_to_date(compiled_kernels: list[Compiled]) -> None:
    committed = REPORT.read_text()
    versions = build.versions()
    if any(f"{name} {version}" not in committed for name, version in versions.items()):
        pytest.skip(f"the committed report is of other compilers than {versions}")
    gpu = compiled_kernels[0].gpu
    heading = f"{gpu.capability}: {gpu.name}"
    texts = [sections(x)[heading].strip() for x in (committed, render(compiled_kernels, versions))]
    lines = [text.splitlines() for text in texts]
    difference = "\n".join(difflib.unified_diff(*lines, "committed", "now", lineterm="", n=0))
    assert not difference, f"run `make kernels` and commit what it writes:\n{difference}"


def test_cuda_kernels_of_the_committed_report_that_spill() -> None:
    spill = set()
    for heading, text in sections(REPORT.read_text()).items():
        if heading.split(":")[0] not in ("8.0", "9.0", "10.0"):
            continue
        cuda = text.split(" cuda\n", 1)[1].split("\n### ", 1)[0]
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in cuda.splitlines()]
        (heads,) = (row for row in rows if row[0] == "rule")
        spills = heads.index("spills")
        spill |= {row[0] for row in rows if len(row) > spills and row[spills].endswith("!")}
    assert spill == WHOLE_STEPS_THAT_SPILL | STEPS_THAT_SPILL | {"tick_kernel"}
