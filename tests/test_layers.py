"""Who may know whom: `#include`s and imports point in the direction that CONTRIBUTING.md gives."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fused_adamw

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"

# What each folder of csrc may include, from csrc and from elsewhere.
STANDARD = r"c?[a-z_]+"  # <vector>, <cmath>
INCLUDES = {
    "rules": r"array|cmath|cstdint|core/(platform|closed_forms|state_kind)\.h|rules/.*",
    "rules/registry.h": rf"{STANDARD}|rules/.*",  # what the other layers see of rules
    "schedules": r"cstdint|core/(platform|closed_forms)\.h",
    "storage": rf"{STANDARD}|core/(platform|state_kind)\.h|storage/.*",
    "core": rf"{STANDARD}|(core|storage)/.*",
    "cpu": rf"{STANDARD}|omp\.h|(cpu|core|storage|rules)/.*",
    "cuda": rf"{STANDARD}|cuda_runtime\.h|(cuda|core|storage|rules|schedules)/.*",
    "host": rf"{STANDARD}|structmember\.h|pybind11/.*|(host|core|storage|rules)/.*",
    "bindings.cpp": rf"{STANDARD}|pybind11/.*|(host|cpu|cuda|core|storage|rules|schedules)/.*",
}
SOURCES = [p for p in sorted(CSRC.rglob("*")) if p.suffix in (".h", ".cuh", ".cpp", ".cu")]

# What Python may import, beside the standard library. What is relative stays within its package.
IMPORTS = {
    "triton_kernels/*.py": r"(torch|triton)(\..*)?",
    "fused_adamw/reference.py": r"numpy(\..*)?",
    "fused_adamw/reference_formats.py": r"(numpy|fused_adamw\.reference)(\..*)?",
    "fused_adamw/schedules.py": r"fused_adamw\.checks",  # no library's arithmetic
    "fused_adamw/plot_schedule.py": r"(matplotlib|fused_adamw)(\..*)?",  # where it is installed
    "fused_adamw/transformers_shapes.py": r"(torch|transformers|fused_adamw)(\..*)?",  # likewise
    "fused_adamw/**/*.py": r"(torch|numpy|triton|typing_extensions|fused_adamw)(\..*)?",
    # Other projects at will, of ours the public names.
    "examples/**/*.py": r"(?!fused_adamw\b|tests\b|bench\b).*",
    "bench/**/*.py": r"(?!fused_adamw\b|tests\b|examples\b).*",
}
# The kernels that are described, the launches that are counted, the least tensor that is coded and
# the shapes of known models are no part of what users call.
PRIVATE = {
    "bench/kernels/triton_compiler.py": r"fused_adamw\.triton_kernels(\..*)?",
    "bench/launches.py": r"fused_adamw\._C",
    "bench/models.py": r"fused_adamw\.decoder_shapes\..*",
    "bench/precision.py": r"fused_adamw\.precision\.LEAST_CODED",
}
# A module that takes long to import is imported by name alone.
MODULES = ("checkpoint",)
PUBLIC = rf"fused_adamw(\.(__version__|{'|'.join([*fused_adamw.__all__, *MODULES])})(\..*)?)?"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes(path: Path) -> None:
    relative = path.relative_to(CSRC)
    allowed = INCLUDES.get(str(relative)) or INCLUDES[relative.parts[0]]
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE):
        assert re.fullmatch(allowed, name), name
        assert not re.match(r"torch|ATen|c10", name), name


def imported(path: Path) -> Iterator[str]:
    """Full names of what is imported; relative ones are left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("pattern", IMPORTS)
def test_imports(pattern: str) -> None:
    allowed = IMPORTS[pattern]
    if pattern.startswith(("examples", "bench")):
        allowed = rf"{allowed}|{PUBLIC}"
    for path in ROOT.glob(pattern):
        relative = str(path.relative_to(ROOT))
        more = PRIVATE.get(relative, r"(?!)")
        if pattern != relative and relative in IMPORTS:
            continue  # a file with an entry of its own
        for name in imported(path):
            if name.split(".")[0] not in sys.stdlib_module_names:
                assert re.fullmatch(rf"{allowed}|{more}", name), f"{relative}: {name}"


def test_nothing_imports_examples_and_benchmarks() -> None:
    modules = {
        path.stem for folder in ("examples", "bench") for path in ROOT.glob(f"{folder}/**/*.py")
    }
    for path in (*ROOT.glob("fused_adamw/**/*.py"), *ROOT.glob("triton_kernels/*.py")):
        for name in imported(path):
            assert not {"examples", "bench", *modules} & set(name.split(".")[:1]), path
