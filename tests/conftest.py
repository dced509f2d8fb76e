"""Set-up that must precede every test, and what several files of tests share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: its kernels then run on tensors in host memory.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench.kernels import build
from bench.kernels.compiled import Compiled
from bench.kernels.gpus import GPUS


@pytest.fixture(scope="session")
def compiled_kernels() -> list[Compiled]:
    """Every kernel of the report, compiled for 9.0; `make kernels` compiles for all architectures.

    Takes a minute where nothing is compiled yet, and seconds where nothing has changed.
    """
    pytest.importorskip("triton")
    try:
        build.nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.compile_all([gpu for gpu in GPUS if gpu.arch == 90])
