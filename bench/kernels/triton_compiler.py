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
from fused_adamw.triton_kernels import formats, norm, update

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """What to compile the kernel for.

    Attributes:
        rule: a Triton function.
        options: its OPTIONS.
        dtypes: of param, grad and states, by name.
        states: how many there are.
        beside: see `formats.Format`; so are stochastic and kinds.
        stochastic: whether rounding to bfloat16 is.
        kinds: of coded states.
        runs: whether elements are in runs of a whole tensor.
        ema: whether there is a moving average of the param.
        zero_grads: whether the gradient is zeroed.
    """

    rule: Any
    options: tuple[bool | str, ...]
    dtypes: tuple[str, ...]
    states: int
    beside: str = ""
    stochastic: bool = False
    kinds: tuple[str, ...] = ()
    runs: bool = False
    ema: bool = False
    zero_grads: bool = False

    @property
    def coefficients(self) -> int:
        """How many the rule takes: it begins by naming them."""
        names = re.search(r"^\s+\(?(.+?)\)? = coefficients$", inspect.getsource(self.rule.fn), re.M)
        if names is None:
            raise ValueError(f"{self.rule.__name__}: no line `a, b, c = coefficients`")
        return len([name for name in names[1].split(",") if name.strip()])

    @property
    def layout(self) -> formats.Layout:
        """What its format is compiled to."""
        format = formats.Format(*self.dtypes, self.beside, self.stochastic, self.kinds)
        return formats.layout(format, self.states, self.runs, self.ema, self.zero_grads)


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    """Compiles the update; see `compile_kernel`."""
    constants = update.constants(case.rule, case.options, case.coefficients, case.layout)
    tables = {"chunks": "*i32", "tensors": "*i64", "coefficients": "*fp32"}
    return compile_kernel(update.update_kernel, tables, constants, update.COMPILE_OPTIONS, arch)


def compile_norm(dtype: str, arch: int) -> dict[str, Any]:
    """Compiles the squared norm of gradients of a dtype; see `compile_kernel`."""
    tables = {"chunks": "*i32", "tensors": "*i64", "partials": "*fp64"}
    constants = norm.constants(dtype)
    return compile_kernel(norm.norm_kernel, tables, constants, norm.COMPILE_OPTIONS, arch)


def compile_kernel(
    kernel: Any,
    tables: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    arch: int,
) -> dict[str, Any]:
    """Compiles and disassembles.

    Args:
        kernel: a Triton function.
        tables: the types of its arguments, by name.
        constants: the values of those it is compiled for, by name.
        options: the compiler's.
        arch: compute capability times ten.

    Returns:
        PTX ("ptx"), the dumps of cuobjdump ("sass", "usage") and the bytes of shared memory that a
        launch asks for ("shared").
    """
    source = ASTSource(
        kernel,
        signature=tables | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass, usage = (
            subprocess.check_output([TOOLS / "cuobjdump", f"--dump-{what}", cubin.name], text=True)
            for what in ("sass", "resource-usage")
        )
    return {
        "ptx": compiled.asm["ptx"],
        "sass": sass,
        "usage": usage,
        "shared": compiled.metadata.shared,
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
