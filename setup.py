"""Builds the extension `fused_adamw._C`: C++ by $CXX, CUDA by nvcc where found, through ninja.

No part of torch is needed, included or linked. The environment chooses:

    FUSED_ADAMW_CUDA        auto (default: CUDA where nvcc is found), on, off
    FUSED_ADAMW_CUDA_ARCHS  such as "8.0;9.0+PTX"; the default is below
    CUDA_HOME, CUDA_PATH    where bin/nvcc is looked for first; then PATH and /usr/local/cuda
    CXX                     the C++ compiler (default: c++)
    MAX_JOBS                how many compilers run at once (default: ninja's choice)
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError, PlatformError

ENV = os.environ
# Every engine returns the same bits only if no compiler fuses a*b+c or takes other liberties.
HOST_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wall", "-Wextra", *HOST_FLAGS]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", ",".join(["-fPIC", *HOST_FLAGS])]
# A kernel's 32 KB of arguments are as many zeros in the machine code for each architecture.
NVCC_FLAGS += ["-Xfatbin=-compress-all"]
# nvcc links, since it knows where its static cudart lies; there is no device code left to link.
NVCC_LINK_FLAGS = ["-nodlink", "-cudart=static", "-cudadevrt=none", "-Xcompiler=-fopenmp"]
# Only these folders see Python's headers: an isolated build has a new copy of pybind11 each time,
# and compiles the engines again only where they changed.
PYTHON_FOLDERS = [Path("csrc"), Path("csrc/host")]
# Of these, the default is what nvcc knows, and PTX of the last for GPUs to come. One a major
# generation will do: machine code for X.0 also runs on every later X.Y.
DEFAULT_ARCHS = ["7.5", "8.0", "9.0", "10.0", "11.0", "12.0"]

NINJA_HEAD = """\
builddir = {folder}
rule compile
  command = $tool -Icsrc -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = $tool $in -o $out
  description = link $out
"""


def find_nvcc() -> str | None:
    """The path of nvcc, or None where FUSED_ADAMW_CUDA or the machine leaves CUDA out."""
    wanted = ENV.get("FUSED_ADAMW_CUDA") or "auto"
    if wanted not in ("auto", "on", "off"):
        raise OptionError(f"FUSED_ADAMW_CUDA must be auto, on or off, not {wanted!r}")
    places = [f"{ENV[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in ENV]
    places += [ENV.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if wanted == "on" and not nvcc:
        raise PlatformError(
            "FUSED_ADAMW_CUDA=on, but nvcc was not found in $CUDA_HOME/bin, $CUDA_PATH/bin, $PATH "
            "or /usr/local/cuda/bin; install the CUDA toolkit, or set FUSED_ADAMW_CUDA=off"
        )
    return nvcc if wanted != "off" else None


def ask(nvcc: str, option: str, pattern: str) -> list[tuple[str, ...]]:
    """The matches of a pattern in what `nvcc option` prints."""
    answer = subprocess.run([nvcc, option], capture_output=True, text=True)
    if answer.returncode or not (matches := re.findall(pattern, answer.stdout)):
        raise PlatformError(f"{nvcc} {option} failed: {answer.stderr or answer.stdout}")
    return matches


def cuda_archs(nvcc: str) -> list[str]:
    """The compute capabilities to compile for; "+PTX" marks those kept as PTX as well."""
    known = [f"{major}.{minor}" for major, minor in ask(nvcc, "--list-gpu-arch", r"_(\d+)(\d)")]
    wanted = re.findall(r"[^;,\s]+", ENV.get("FUSED_ADAMW_CUDA_ARCHS", ""))
    for arch in wanted:
        if arch.removesuffix("+PTX") not in known:
            raise OptionError(
                f"FUSED_ADAMW_CUDA_ARCHS: {nvcc} does not know {arch!r}; accepted, separated by ; "
                f"or , and with +PTX after each that is kept as PTX too: {', '.join(known)}"
            )
    *earlier, last = [arch for arch in DEFAULT_ARCHS if arch in known]
    return list(dict.fromkeys(wanted)) or [*earlier, f"{last}+PTX"]


def gencode(arch: str) -> str:
    """The option of nvcc that compiles for one of `cuda_archs`."""
    number = arch.removesuffix("+PTX").replace(".", "")
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def edge(target: Path, rule: str, inputs: list[Path], tool: list[str]) -> str:
    """One step of the ninja file."""
    command = shlex.join(tool).replace("$", "$$")
    return f"build {target}: {rule} {' '.join(map(str, inputs))}\n  tool = {command}\n"


class NinjaBuildExt(build_ext):
    """Compiles through ninja, in a folder that outlasts the build."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, cxx = find_nvcc(), shlex.split(ENV.get("CXX") or "c++")
        if not shutil.which(cxx[0]):
            raise PlatformError(f"no C++ compiler: {cxx[0]!r} not found; install g++ or set CXX")
        headers = sysconfig.get_path("include")
        if not Path(headers, "Python.h").exists():
            raise PlatformError(f"no Python.h in {headers}; install Python's headers (python3-dev)")
        python = [f"-I{pybind11.get_include()}", f"-I{headers}"]
        python += [f'-DFUSED_ADAMW_VERSION="{self.distribution.get_version()}"']
        tools = {".cpp": [*cxx, *CXX_FLAGS], "link": [*cxx, "-shared", "-fopenmp"]}
        if nvcc:
            archs, release = cuda_archs(nvcc), ask(nvcc, "--version", r"V(\d[\d.]+)")[0]
            cuda = [nvcc, "-ccbin", cxx[0]] if len(cxx) == 1 and "CXX" in ENV else [nvcc]
            tools[".cu"] = [*cuda, *NVCC_FLAGS, *map(gencode, archs)]
            tools["link"] = [*cuda, "-shared", *NVCC_LINK_FLAGS]
            python += ["-DFUSED_ADAMW_CUDA=1", f'-DFUSED_ADAMW_NVCC_VERSION="{release}"']
            python += [f'-DFUSED_ADAMW_CUDA_ARCHS_BUILT="{";".join(archs)}"']

        folder = Path("build", f"{sysconfig.get_config_var('SOABI')}-{'cuda' if nvcc else 'cpu'}")
        sources = [path for path in sorted(Path("csrc").rglob("*.c*")) if path.suffix in tools]
        objects = {source: folder / f"{source}.o" for source in sources}
        plan = NINJA_HEAD.format(folder=folder)
        for source, target in objects.items():
            tool = tools[source.suffix] + python * (source.parent in PYTHON_FOLDERS)
            plan += edge(target, "compile", [source], tool)
        plan += edge(folder / "_C.so", "link", list(objects.values()), tools["link"])
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, "build.ninja").write_text(plan)

        print("CUDA:", f"nvcc {release}, {' '.join(archs)}" if nvcc else "left out", flush=True)
        jobs = [f"-j{ENV['MAX_JOBS']}"] if ENV.get("MAX_JOBS") else []
        ninja = [sys.executable, "-m", "ninja", "-f", f"{folder}/build.ninja", *jobs]
        if subprocess.run(ninja).returncode:
            raise CompileError("fused_adamw._C was not built: the compiler's message is above")
        library = self.get_ext_fullpath(ext.name)
        self.mkpath(str(Path(library).parent))
        self.force = True  # copy even over a newer library, which other options built
        self.copy_file(f"{folder}/_C.so", library)


if __name__ == "__main__":  # bench/kernels compiles with the same options
    extension = Extension("fused_adamw._C", sources=[])
    setup(ext_modules=[extension], cmdclass={"build_ext": NinjaBuildExt})
