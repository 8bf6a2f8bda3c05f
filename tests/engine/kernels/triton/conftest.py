"""Kernels run compiled on CUDA where there is a device, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import os

import torch

# Before any kernel module is imported: Triton decides at decoration.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
