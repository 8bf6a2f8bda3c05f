"""Quantised weights for the GPU: GGML blocks taken apart into planes of one field each.

A block of 18, 34, 144 or 210 bytes cannot be read in aligned vectors; its fields, side by side over
a whole row, can. All integers stay as they are, and so do the bytes, but for Q4_K, whose 6-bit
scales become bytes (2.8 % more). Made by the loader, read by `unpack`.

Source: GGML block layouts as listed in the gguf Python package 0.19 (`quants.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.formats.ggml import GGMLType
from engine.quant.dequantize import unpack_k_scales
from engine.quant.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Planes:
    """A matrix (num_rows, num_columns), all planes (num_rows, ...) and contiguous.

    `quants` holds int8 (Q8_0), nibbles, or the floats of a dense matrix; `high` two more bits per
    number (Q6_K), else it is `quants`. A number's scale is scales[group] * super_scales[block], and
    what is subtracted then is minima[group] * super_minima[block] (Q4_K); types of one level have
    only `scales` (float16), and the others stand in for what a type lacks.
    """

    ggml_type: GGMLType
    shape: tuple[int, int]
    quants: Tensor
    high: Tensor
    scales: Tensor
    minima: Tensor
    super_scales: Tensor
    super_minima: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes held, each plane counted once."""
        planes = {id(plane): plane for plane in self.tensors}
        return sum(plane.nbytes for plane in planes.values())

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.quants.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The planes in the order of the kernels' parameters."""
        return (
            *(self.quants, self.high, self.scales),
            *(self.minima, self.super_scales, self.super_minima),
        )


def dense_plane(weight: Tensor) -> Planes:
    """Return a dense matrix (num_rows, num_columns) as one plane."""
    num_rows, num_columns = weight.shape
    return Planes(_DENSE_TYPES[weight.dtype], (num_rows, num_columns), *[weight] * 6)


def stack_planes(parts: Sequence[Planes]) -> Planes:
    """Return matrices of one type and width on top of each other, as one; all are copied."""
    stacked: dict[tuple[int, ...], Tensor] = {}
    planes = []
    for same in zip(*(part.tensors for part in parts), strict=True):
        # What stands in for a plane that the type lacks is copied once.
        key = tuple(map(id, same))
        if key not in stacked:
            stacked[key] = torch.cat(same)
        planes.append(stacked[key])
    num_rows = sum(part.shape[0] for part in parts)
    return Planes(parts[0].ggml_type, (num_rows, parts[0].shape[1]), *planes)


def split_planes(weight: QuantizedTensor) -> Planes:
    """Return the planes of a matrix whose type is one of `PLANE_TYPES`."""
    rows, _ = weight.shape
    blocks = weight.packed.view(rows, -1, weight.ggml_type.block_bytes)
    return _SPLITTERS[weight.ggml_type](weight, blocks)


def _plane(blocks: Tensor, begin: int, end: int) -> Tensor:
    """Return bytes begin..end-1 of all blocks, (num_rows, num_blocks * count) uint8."""
    return blocks[:, :, begin:end].flatten(1).contiguous()


def _halves(blocks: Tensor, begin: int) -> Tensor:
    return _plane(blocks, begin, begin + 2).view(torch.float16)


def _one_level(weight: QuantizedTensor, quants: Tensor, scales: Tensor) -> Planes:
    shared = [quants, scales, scales, scales, scales]
    return Planes(weight.ggml_type, weight.shape, quants, *shared)


def _q8_0(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    return _one_level(weight, _plane(blocks, 2, 34).view(torch.int8), _halves(blocks, 0))


def _q4_0(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    return _one_level(weight, _plane(blocks, 2, 18), _halves(blocks, 0))


def _q4_k(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    quants = _plane(blocks, 16, 144)
    scales, minima = unpack_k_scales(blocks[:, :, 4:16].reshape(-1, 12))
    rows = weight.shape[0]
    scale_planes = [scales.reshape(rows, -1).contiguous(), minima.reshape(rows, -1).contiguous()]
    supers = [_halves(blocks, 0), _halves(blocks, 2)]
    return Planes(weight.ggml_type, weight.shape, quants, quants, *scale_planes, *supers)


def _q6_k(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    scales = _plane(blocks, 192, 208).view(torch.int8)
    quants, high, supers = _plane(blocks, 0, 128), _plane(blocks, 128, 192), _halves(blocks, 208)
    return Planes(weight.ggml_type, weight.shape, quants, high, scales, scales, supers, supers)


_SPLITTERS: Final[dict[GGMLType, Callable[[QuantizedTensor, Tensor], Planes]]] = {
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q6_K: _q6_k,
}
PLANE_TYPES: Final = frozenset(_SPLITTERS)
_DENSE_TYPES: Final = {
    torch.bfloat16: GGMLType.BF16,
    torch.float16: GGMLType.F16,
    torch.float32: GGMLType.F32,
}
