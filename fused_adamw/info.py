"""What is installed and what of it can run: ``python -m fused_adamw info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import numpy as np
import torch

from fused_adamw import _C
from fused_adamw.engines import engine_status


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def describe() -> list[tuple[str, str]]:
    """Names and values, in the order in which to show them."""
    built = (
        f"nvcc {_C.NVCC}, compute capability {_C.CUDA_ARCHS}" if _C.CUDA_BUILT else "without CUDA"
    )
    rows = [
        ("fused-adamw", _C.VERSION),
        ("Python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("NumPy", np.__version__),
        ("triton", _version_of("triton")),
        ("compiled with", _C.COMPILER),
        ("CUDA part built", built),
        ("GPUs", _gpus()),
        ("SIMD level", _C.simd_level()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical cores"),
    ]
    for engine, reason in engine_status().items():
        rows.append((f"engine {engine}", "ready" if reason is None else f"absent: {reason}"))
    return rows


def main() -> int:
    """Prints the table."""
    for name, value in describe():
        print(f"{name + ':':18s} {value}")
    return 0
