"""Set-up that must precede every test."""

import os

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: its kernels then run on tensors in host memory.
    os.environ.setdefault("TRITON_INTERPRET", "1")
