"""What a checkpoint's weights take once they are loaded, and whether that fits one device.

Called by the pre-flight check for the whole model and by the loader for one rank's tensors, before
any of them is read. Pure arithmetic over the tensor plan; the caller says what is free. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from cortexd.errors import InsufficientMemory
from cortexd.models import WeightBytes
from engine.formats.checkpoint import CheckpointTensor
from engine.formats.ggml import DENSE_TYPES, GGMLType
from engine.formats.in_situ import in_situ_names, in_situ_type, type_for_columns
from engine.specs.tensor_plan import EMBEDDING

Tensors = Mapping[str, CheckpointTensor]  # by canonical name

# What the loader never quantises: vectors and convolutions, routers, gates of a row or two.
_EXACT: Final = re.compile(
    r"norm\.weight$|\.bias$|\.conv1d\.|\.A_log$|\.dt_bias$|\.in_proj_(?:a|b|ba)\.weight$"
    r"|\.mlp\.gate\.weight$|\.shared_expert_gate\.weight$"
)


def resident_bytes(
    tensors: Tensors,
    element_size: int | None,
    quant: GGMLType | None = None,
    *,
    is_tied: bool = False,
) -> int:
    """Return the bytes that tensors take once loaded.

    Dense numbers take `element_size` bytes (None: as stored), or the blocks of `quant` in matrices;
    the embedding only when it is the head too.
    """
    return sum(
        _resident(tensor, element_size, None if _stays_dense(name, is_tied) else quant)
        for name, tensor in tensors.items()
    )


def weigh(tensors: Tensors, quant: str | None, *, is_tied: bool) -> WeightBytes:
    """Return what all tensors take in each way that they can be loaded.

    `quant` is what dense ones are quantised to; only when some are dense there are other choices.
    """
    chosen = None if quant is None else in_situ_type(quant)
    has_dense = any(tensor.ggml_type in DENSE_TYPES for tensor in tensors.values())
    choices: dict[str, int] = {}
    for name in in_situ_names() if has_dense else []:
        choices[name] = resident_bytes(tensors, None, in_situ_type(name), is_tied=is_tied)
    as_stored, in_16_bit, in_32_bit = (
        resident_bytes(tensors, size, chosen, is_tied=is_tied) for size in (None, 2, 4)
    )
    return WeightBytes(as_stored, in_16_bit, in_32_bit, choices)


def check_weights_fit(
    tensors: Tensors,
    element_size: int | None,
    quant: GGMLType | None,
    *,
    is_tied: bool,
    available_bytes: int,
    device: str,
) -> None:
    """Raise InsufficientMemory with both numbers, and with what of the usual options would fit."""
    needed = resident_bytes(tensors, element_size, quant, is_tied=is_tied)
    if needed <= available_bytes:
        return
    options: tuple[tuple[str, int, GGMLType | None], ...] = (
        ('engine.dtype = "bfloat16"', 2, None),
        ('quant = "q8_0"', 2, GGMLType.Q8_0),
        ('quant = "q4_0"', 2, GGMLType.Q4_0),
    )
    fitting = [
        text
        for text, size, option in options
        if resident_bytes(tensors, size, option, is_tied=is_tied) < min(needed, available_bytes)
    ]
    advice = f"these would fit: {', '.join(fitting)}" if fitting else "choose a smaller model"
    path = next(iter(tensors.values())).file.path
    raise InsufficientMemory(
        f"{path}: the weights need {needed} bytes on {device}, {available_bytes} are available; "
        f"free memory, or {advice}",
        needed_bytes=needed,
        available_bytes=available_bytes,
    )


def _stays_dense(name: str, is_tied: bool) -> bool:
    return (name == EMBEDDING and not is_tied) or _EXACT.search(name) is not None


def _resident(tensor: CheckpointTensor, element_size: int | None, quant: GGMLType | None) -> int:
    if tensor.ggml_type not in DENSE_TYPES:
        return tensor.num_bytes
    if quant is not None and len(tensor.shape) > 1:
        ggml_type = type_for_columns(quant, tensor.shape[-1])
        if ggml_type is not None:
            return ggml_type.row_bytes(tensor.num_elements)
    return tensor.num_bytes if element_size is None else tensor.num_elements * element_size
