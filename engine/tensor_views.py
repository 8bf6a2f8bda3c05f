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
    """Return the stored bytes as uint8, mapped: flat, or (..., row_bytes) for a part of a tensor.

    A part in several regions is the only one that is copied.
    """
    raw = _mapped_bytes(tensor)
    if not tensor.regions:
        return raw
    assert tensor.ggml_type is not None, f"{tensor.name}: {tensor.type_name} passed the plan"
    rows = raw.view(*tensor.stored_shape[:-1], -1)
    return _join([rows[_in_bytes(tensor.ggml_type, region)] for region in tensor.regions])


def _in_bytes(ggml_type: GGMLType, region: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return the region with its last slice in bytes of a row instead of numbers."""
    elements, size = ggml_type.block_elements, ggml_type.block_bytes
    last = region[-1]
    assert last.start % elements == last.stop % elements == 0, f"{last} cuts {ggml_type.name}"
    return (*region[:-1], slice(last.start // elements * size, last.stop // elements * size))


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _mapped_bytes(tensor: CheckpointTensor) -> Tensor:
    with warnings.catch_warnings():
        # The mapping is read-only and so is every use of this tensor.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(tensor.view(), dtype=torch.uint8)


def dense_view(tensor: CheckpointTensor) -> Tensor:
    """Return the stored numbers in their own dtype, mapped."""
    assert tensor.ggml_type in TORCH_DTYPES, f"{tensor.name} is {tensor.type_name}"
    raw, dtype = _mapped_bytes(tensor), TORCH_DTYPES[tensor.ggml_type]
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()  # a safetensors header of odd length
    if not tensor.regions:
        return raw.view(dtype).view(tensor.shape)
    numbers = raw.view(dtype).view(tensor.stored_shape)
    return _join([numbers[region] for region in tensor.regions])


def stack_rows(matrices: Sequence[Weight]) -> Weight:
    """Put matrices of one stored type on top of each other."""
    if len(matrices) == 1:
        return matrices[0]
    quantized = [m for m in matrices if isinstance(m, QuantizedTensor)]
    if quantized:
        return concatenate_rows(quantized)
    return torch.cat([m for m in matrices if isinstance(m, Tensor)])
