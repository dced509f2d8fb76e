"""Compiles Triton's counterparts of the CUDA kernels for one format, in a process of its own.

    python -m bench.kernels.triton_compiler ARCH PARAM-GRAD-STATES OUT.json CUBIN...

Triton cannot both interpret and compile in one process, and the tests interpret. The CUDA kernels
that are found in the cubins say what there is to compile: rules of the same names, with the same
options and numbers of states.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels.dumps import cuda_kernels
from bench.kernels.gpus import GPUS
from fused_adamw import triton_kernels
from fused_adamw.triton_kernels import update

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """What to compile the kernel for.

    Attributes:
        rule: a Triton function.
        options: its OPTIONS.
        dtypes: of param, grad and states, by name.
        states: how many there are.
    """

    rule: Any
    options: tuple[bool | str, ...]
    dtypes: tuple[str, ...]
    states: int

    @property
    def coefficients(self) -> int:
        """How many the rule takes: it begins by naming them."""
        names = re.search(r"^\s+\(?(.+?)\)? = coefficients$", inspect.getsource(self.rule.fn), re.M)
        if names is None:
            raise ValueError(f"{self.rule.__name__}: no line `a, b, c = coefficients`")
        return len([name for name in names[1].split(",") if name.strip()])


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    """Compiles and disassembles.

    Args:
        case: what to compile.
        arch: compute capability times ten.

    Returns:
        PTX ("ptx"), the dumps of cuobjdump ("sass", "usage") and the bytes of shared memory that a
        launch asks for ("shared").
    """
    constants = update.constants(
        case.rule, case.options, case.dtypes, 2 + case.states, case.coefficients
    )
    tables = {"chunks": "*i32", "tensors": "*i64", "coefficients": "*fp32"}
    source = ASTSource(
        update.update_kernel,
        signature=tables | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source, target=target, options=update.COMPILE_OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        sass, usage = (
            subprocess.check_output([TOOLS / "cuobjdump", f"--dump-{what}", cubin.name], text=True)
            for what in ("sass", "resource-usage")
        )
    return {
        "ptx": kernel.asm["ptx"],
        "sass": sass,
        "usage": usage,
        "shared": kernel.metadata.shared,
    }


def main(arch: int, dtypes: tuple[str, ...], out: Path, cubins: list[Path]) -> None:
    """Writes the results as a list, each with what the kernel is ("kernel")."""
    (gpu,) = (gpu for gpu in GPUS if gpu.arch == arch)
    found = (kernel for cubin in cubins for kernel in cuda_kernels(gpu, cubin))
    cases = {
        replace(cuda.kernel, dtypes=dtypes): cuda.states
        for cuda in found
        if cuda.states is not None
    }
    results = []
    for kernel, states in cases.items():
        rule, options = kernel.functor
        case = Case(triton_kernels.RULES[rule], options, dtypes, states)
        results.append({"kernel": asdict(kernel), **compile_case(case, arch)})
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    arch, dtypes, out, *cubins = sys.argv[1:]
    main(int(arch), tuple(dtypes.split("-")), Path(out), [Path(name) for name in cubins])
