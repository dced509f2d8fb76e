"""What the kernel report reads out of names and machine code, on examples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.kernels.compiled import Compiled
from bench.kernels.gpus import GPUS, Gpu
from bench.kernels.names import Kernel
from bench.kernels.report import bound_by_instructions, narrowed, render, spilled
from bench.kernels.sass import Access, Code

A100, H200, _ = GPUS
OPTIONS = (("l2", False), ("amsgrad", False), ("nesterov", False))
ADAM = Kernel("update_kernel", "adam", OPTIONS, ("float32",) * 3)

# A loop over full packs, with a branch around for ragged ones, a call, and a way out.
LOOP = """
    MOV R1, c[0x0][0x28]
    @P0 BRA 0x0090
    LDG.E.128 R4, desc[UR4][R42.64]
    LDG.E.128 R8, desc[UR4][R43.64]
    LDG.E.128 R12, desc[UR4][R44.64]
    LDG.E.128 R16, desc[UR4][R45.64]
    @!P1 BRA 0x00c0
    MOV R20, 0x00c0
    CALL.REL.NOINC 0x0150
    LDG.E R4, desc[UR4][R42.64]
    STG.E desc[UR4][R42.64], R4
    BRA 0x0130
    FADD R4, R4, R8
    FMUL R8, R8, R8
    STG.E.128 desc[UR4][R42.64], R4
    STG.E.128 desc[UR4][R44.64], R8
    @!P4 BRA 0x0130
    STG.E desc[UR4][R45.64], R12
    BRA 0x0140
    STG.E.128 desc[UR4][R45.64], R12
    @P2 BRA 0x0010
    EXIT
    RET.REL.NODEC R20 0x0
"""
# The same work once, after narrow loads that say what it is, and a ragged rest behind it.
STRAIGHT = """
    LDG.E.64 R2, desc[UR4][R30.64]
    @P0 BRA 0x00b0
    @!P1 LDG.E.128 R4, desc[UR4][R42.64]
    @!P1 LDG.E.128 R8, desc[UR4][R43.64]
    @!P1 LDG.E.128 R12, desc[UR4][R44.64]
    @!P1 LDG.E.128 R16, desc[UR4][R45.64]
    FADD R4, R4, R8
    @!P1 STG.E.128 desc[UR4][R42.64], R4
    @!P1 STG.E.128 desc[UR4][R44.64], R8
    @!P1 STG.E.128 desc[UR4][R45.64], R12
    @P3 EXIT
    LDG.E.U16 R4, desc[UR4][R42.64]
    STG.E.U16 desc[UR4][R42.64], R4
    @P4 BRA 0x00b0
    EXIT
"""


def code(text: str) -> Code:
    lines = enumerate(text.strip().splitlines())
    return Code.of("\n".join(f"/*{16 * i:04x}*/  {line.strip()} ;" for i, line in lines))


def kernel(text: str, gpu: Gpu = H200, stack: int = 0, registers: int = 64) -> Compiled:
    return Compiled("cuda", ADAM, gpu, "", code(text), 256, registers, stack, 0)


def test_the_loop_over_full_packs() -> None:
    path = code(LOOP).main_path
    assert path is not None
    assert path.loop
    assert path.accesses == {Access("load", 16): 4, Access("store", 16): 3}
    assert path.operations["LDG.E.128"] == 4
    assert path.operations["CALL.REL.NOINC"] == path.operations["MOV"] == 0
    assert path.operations.total() == 13


def test_the_way_through_a_kernel_without_a_loop() -> None:
    path = code(STRAIGHT).main_path
    assert path is not None
    assert not path.loop
    assert path.accesses == {Access("load", 8): 1, Access("load", 16): 4, Access("store", 16): 3}
    assert path.operations.total() == 11


def test_what_follows_from_the_main_path() -> None:
    found = kernel(LOOP)
    assert (found.elements, found.states, found.bytes_per_param) == (4, 2, 28)
    assert found.instructions_per_param == 13 / 4
    assert found.bytes_in_flight == 4 * 256 * 64
    # 28 bytes in 3.25 instructions, of which 132 multiprocessors issue 128 in a clock.
    assert found.memory_bound_to == pytest.approx(28 / 3.25 * 132 * 128 * 1.98e9)
    assert not bound_by_instructions(found)
    assert not narrowed(found)
    assert not spilled(found)


@pytest.mark.parametrize(
    "instead",
    [
        "LDG.E.128 R8, desc[UR4][R45.64]",  # where another load is to arrive
        "LDG.E.128 R16, desc[UR4][R8.64]",  # from an address that is to arrive
        "FADD R0, R0, R11\nLDG.E.128 R16, desc[UR4][R45.64]",
    ],
)
def test_a_load_that_waits_for_another_is_not_under_way(instead: str) -> None:
    found = kernel(LOOP.replace("LDG.E.128 R16, desc[UR4][R45.64]", instead))
    assert found.bytes_in_flight == 4 * 256 * 48


@pytest.mark.parametrize("text", [LOOP, STRAIGHT], ids=["loop", "straight"])
@pytest.mark.parametrize("kind", ["LDG", "STG"])
def test_one_narrower_access_is_seen(text: str, kind: str) -> None:
    wide, narrow = (line for line in text.splitlines() if f"{kind}.E.128" in line), ".E.64"
    last = list(wide)[-1]
    changed = text.replace(last, last.replace(".E.128", narrow))
    assert changed != text
    assert narrowed(kernel(changed)) or kernel(changed).path is None


def test_a_repeated_access_is_seen() -> None:
    line = "@!P1 LDG.E.128 R8, desc[UR4][R43.64]"
    assert narrowed(kernel(STRAIGHT.replace(line, f"{line}\n{line}")))


def test_spills_are_seen() -> None:
    assert spilled(kernel(LOOP, stack=8))
    assert spilled(kernel(LOOP.replace("FMUL R8, R8, R8", "STL [R1], R8")))
    assert spilled(kernel(LOOP.replace("FMUL R8, R8, R8", "LDL.LU R8, [R1+0x4]")))


def test_a_jump_through_a_register_is_refused() -> None:
    with pytest.raises(ValueError, match="BRX"):
        _ = code(LOOP.replace("FADD R4, R4, R8", "BRX R4 -0x10")).main_path


# By NVIDIA's occupancy calculator.
@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared", "blocks"),
    [
        (H200, 256, 32, 0, 8),
        (H200, 256, 64, 0, 4),
        (H200, 256, 65, 0, 3),
        (H200, 256, 80, 0, 3),
        (H200, 256, 81, 0, 2),
        (H200, 1024, 64, 0, 1),
        (H200, 32, 16, 0, 32),
        (H200, 96, 64, 0, 10),
        (A100, 256, 32, 40 * 1024, 4),
        (H200, 256, 32, 40 * 1024, 5),
    ],
)
def test_resident_blocks(gpu: Gpu, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert gpu.resident_blocks(threads, registers, shared) == blocks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "fused_adamw::cuda::update_kernel<fused_adamw::Adam<false, true, true>, "
            "fused_adamw::cuda::Uniform<fused_adamw::bfloat16> >",
            "adam-amsgrad nesterov-bfloat16-bfloat16-bfloat16",
        ),
        (
            "fused_adamw::cuda::update_kernel<fused_adamw::Rmsprop<true, false>, "
            "fused_adamw::cuda::Mixed>",
            "rmsprop-centered-mixed",
        ),
        ("void update_kernel<a::Lion, a::Uniform<float>>", "lion-float32-float32-float32"),
        ("update_kernel<a::New<(a::Mode)2, true>, a::Old, a::Mixed>", "new-0=2 1 old-mixed"),
        ("update_kernel<a::Lion, a::Coded, true>", "lion-coded-whole"),
        ("a::tick", "tick"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert str(Kernel.of(name)) == expected


def test_nothing_is_read_from_a_path_that_tells_dtypes_apart() -> None:
    mixed = replace(kernel(LOOP), kernel=replace(ADAM, dtypes=(), storage="mixed"))
    assert mixed.path is mixed.elements is mixed.states is mixed.instructions_per_param is None
    assert not narrowed(mixed)
    (row,) = (line for line in render([mixed], {}).splitlines() if line.startswith("| adam"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["adam", "mixed", "64", "0", "0", "0", "50.0%", *[""] * 5]


def test_the_report_marks_what_misses_an_aim() -> None:
    text = render([kernel(LOOP), kernel(LOOP, stack=8, registers=72)], {"nvcc": "13.0"})
    good, bad = (line for line in text.splitlines() if line.startswith("| adam"))
    assert "!" not in good
    assert "72 !" in bad
    assert "8 !" in bad
    assert "16 B: 4 + 3" in bad
    assert "3.2 |" in good
