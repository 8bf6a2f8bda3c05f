"""Whether a model's weights fit into the memory there is, before any of them is read.

Called by the loader for one rank's tensors. Pure arithmetic; the caller says what is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cortexd.errors import InsufficientMemory
from engine.formats.checkpoint import CheckpointTensor
from engine.formats.ggml import DENSE_TYPES, GGMLType
from engine.formats.in_situ import type_for_columns

_OPTIONS: Final = (
    ('engine.dtype = "bfloat16"', 2, None),
    ('quant = "q8_0"', 4, GGMLType.Q8_0),
    ('quant = "q4_0"', 4, GGMLType.Q4_0),
)


def resident_bytes(
    tensors: Iterable[CheckpointTensor], element_size: int, quant: GGMLType | None = None
) -> int:
    """Return the bytes that tensors take once loaded.

    Dense numbers take `element_size` bytes, or the blocks of `quant` in matrices.
    """
    return sum(_resident(tensor, element_size, quant) for tensor in tensors)


def check_weights_fit(
    tensors: list[CheckpointTensor],
    element_size: int,
    quant: GGMLType | None,
    *,
    available_bytes: int,
    device: str,
) -> None:
    """Raise InsufficientMemory with both numbers, and with what of the usual options would fit."""
    needed = resident_bytes(tensors, element_size, quant)
    if needed <= available_bytes:
        return
    fitting = [
        text
        for text, size, option in _OPTIONS
        if resident_bytes(tensors, size, option) < min(needed, available_bytes)
    ]
    advice = f"these would fit: {', '.join(fitting)}" if fitting else "choose a smaller model"
    path = tensors[0].file.path
    raise InsufficientMemory(
        f"{path}: the weights need {needed} bytes on {device}, {available_bytes} are available; "
        f"free memory, or {advice}",
        needed_bytes=needed,
        available_bytes=available_bytes,
    )


def _resident(tensor: CheckpointTensor, element_size: int, quant: GGMLType | None) -> int:
    if tensor.ggml_type not in DENSE_TYPES:
        return tensor.num_bytes
    if quant is not None and len(tensor.shape) > 1:
        ggml_type = type_for_columns(quant, tensor.shape[-1])
        if ggml_type is not None:
            return ggml_type.row_bytes(tensor.num_elements)
    return tensor.num_elements * element_size
