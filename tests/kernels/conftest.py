"""Kernels run on the GPU where there is one, else on the CPU through Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined: at their first import
