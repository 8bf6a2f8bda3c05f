"""Torch tensors over the mapped bytes of a checkpoint: nothing is copied here, except on stacking.

Private to the loader. The views are read-only by convention; a write would fault.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from engine.formats.checkpoint import CheckpointTensor
from engine.formats.ggml import GGMLType
from engine.layers.linear import Weight
from engine.quant.tensor import QuantizedTensor, concatenate_rows

TORCH_DTYPES: Final = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}


def bytes_view(tensor: CheckpointTensor) -> Tensor:
    """Return the stored bytes as uint8, mapped."""
    with warnings.catch_warnings():
        # The mapping is read-only and so is every use of this tensor.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(tensor.view(), dtype=torch.uint8)


def dense_view(tensor: CheckpointTensor) -> Tensor:
    """Return the stored numbers in their own dtype, mapped."""
    assert tensor.ggml_type in TORCH_DTYPES, f"{tensor.name} is {tensor.type_name}"
    raw, dtype = bytes_view(tensor), TORCH_DTYPES[tensor.ggml_type]
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()  # a safetensors header of odd length
    return raw.view(dtype).view(tensor.shape)


def stack_rows(matrices: Sequence[Weight]) -> Weight:
    """Put matrices of one stored type on top of each other."""
    if len(matrices) == 1:
        return matrices[0]
    quantized = [m for m in matrices if isinstance(m, QuantizedTensor)]
    if quantized:
        return concatenate_rows(quantized)
    return torch.cat([m for m in matrices if isinstance(m, Tensor)])
