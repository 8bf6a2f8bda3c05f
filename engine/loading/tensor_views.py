"""Torch tensors over the mapped bytes of a checkpoint: nothing is copied here, except on stacking.

Private to the loader. The views are read-only by convention; a write would fault.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from engine.formats.checkpoint import CheckpointTensor, Part
from engine.formats.ggml import GGMLType
from engine.layers.linear import Weight
from engine.quant.tensor import QuantizedTensor, concatenate_rows

TORCH_DTYPES: Final = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}


def bytes_view(tensor: CheckpointTensor, index: int | None = None) -> Tensor:
    """Return the stored blocks as uint8 (..., row_bytes), mapped; `index`: of dimension 0, only.

    Several ranges of a rank's part are joined, which copies them; a single one is a view.
    """
    ggml_type = tensor.ggml_type
    assert ggml_type is not None, f"{tensor.name}: {tensor.type_name} passed the plan"
    rows = _mapped_bytes(tensor).view(*(tensor.stored_shape or tensor.shape)[:-1], -1)
    local = tensor.local
    if local is not None and local.axis == rows.dim() - 1:
        local = Part(local.axis, tuple(_in_bytes(ggml_type, part) for part in local.ranges))
    return _pick(rows, local, index)


def dense_view(tensor: CheckpointTensor, index: int | None = None) -> Tensor:
    """Return the stored numbers in their own dtype; otherwise as `bytes_view`."""
    assert tensor.ggml_type in TORCH_DTYPES, f"{tensor.name} is {tensor.type_name}"
    raw, dtype = _mapped_bytes(tensor), TORCH_DTYPES[tensor.ggml_type]
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()  # a safetensors header of odd length
    return _pick(raw.view(dtype).view(tensor.stored_shape or tensor.shape), tensor.local, index)


def _pick(stored: Tensor, local: Part | None, index: int | None) -> Tensor:
    """Return a rank's part; an index goes first, so that no other expert is ever copied."""
    axis = 0 if local is None else local.axis
    if index is not None:
        assert axis > 0 or local is None, "a rank holds some of every expert, not some experts"
        stored, axis = stored[index], axis - 1
    if local is None:
        return stored
    parts = [stored.narrow(axis, part.start, part.stop - part.start) for part in local.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _in_bytes(ggml_type: GGMLType, part: slice) -> slice:
    """Return a range of numbers of a row in bytes."""
    elements, size = ggml_type.block_elements, ggml_type.block_bytes
    assert part.start % elements == part.stop % elements == 0, f"{part} cuts {ggml_type.name}"
    return slice(part.start // elements * size, part.stop // elements * size)


def _mapped_bytes(tensor: CheckpointTensor) -> Tensor:
    with warnings.catch_warnings():
        # The mapping is read-only and so is every use of this tensor.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(tensor.view(), dtype=torch.uint8)


def stack_rows(matrices: Sequence[Weight]) -> Weight:
    """Put matrices of one stored type on top of each other."""
    if len(matrices) == 1:
        return matrices[0]
    quantized = [m for m in matrices if isinstance(m, QuantizedTensor)]
    if quantized:
        return concatenate_rows(quantized)
    return torch.cat([m for m in matrices if isinstance(m, Tensor)])
