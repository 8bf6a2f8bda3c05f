"""Triton kernels for CUDA devices: a file for each, a torch reference in the layers for each.

`engine.models.fused` runs whole decoder steps with them; `engine.layers.linear` the quantised
products. Triton comes with torch's CUDA builds only, so nothing here is imported before
`why_unusable` said that it can be. Triton's interpreter (TRITON_INTERPRET=1 before the import) runs
the same kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def is_interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_unusable(device: torch.device) -> str:
    """Say in one line why the kernels cannot run on `device`; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed; it comes with torch's CUDA builds"
    if is_interpreted():
        return "" if device.type == "cpu" else "TRITON_INTERPRET=1 takes CPU tensors only"
    if device.type != "cuda":
        return f"Triton does not compile for a {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return ""
