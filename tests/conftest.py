"""Set-up that must precede every test, and what several files of tests share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: its kernels then run on tensors in host memory.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench.kernels import build
from bench.kernels.compiled import Compiled


@pytest.fixture(scope="session")
def compiled_kernels() -> list[Compiled]:
    """Every CUDA and Triton kernel, compiled for every architecture of the report.

    Takes two minutes where nothing is compiled yet, and seconds where nothing has changed.
    """
    pytest.importorskip("triton")
    try:
        build.nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.compile_all()
