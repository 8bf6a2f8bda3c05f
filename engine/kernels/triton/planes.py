"""Quantised weights for the GPU: GGML blocks taken apart into planes of one field each.

A block of 18, 34, 144 or 210 bytes cannot be read in aligned vectors; its fields, side by side over
a whole row, can. All integers stay as they are, and so do the bytes, but for the 6-bit scales of
Q4_K, Q5_K and IQ4_XS, which become bytes (2.8 % more at most). Made by the loader, read by
`unpack`.

Source: GGML block layouts as listed in the gguf Python package 0.19 (`quants.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from engine.formats.ggml import GGMLType
from engine.quant.dequantize import (
    iq4_table,
    unpack_iq4_scales,
    unpack_k_scales,
    unpack_masks,
)
from engine.quant.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Planes:
    """A matrix (num_rows, num_columns), all planes (num_rows, ...) and contiguous.

    `quants` holds int8 (Q8_0), nibbles, or the floats of a dense matrix; `high` what they lack: one
    more bit per number (`_fifth_bits`), two (Q6_K), or the 16 numbers that nibbles stand for (IQ4).
    A number's scale is scales[group] * super_scales[block], and what is subtracted then is
    minima[group] * super_minima[block]; types of one level have only `scales` and `minima`
    (float16). What a type lacks, another plane stands in for.
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


def _fifth_bits(bits: Tensor) -> Tensor:
    """Return (num_rows, bytes) of bits (num_rows, num_columns / 32, 32), columns in their order.

    Of pair i (columns j and j + 16 of a group) the two bits are bits 2 * (i % 128 // 32) and the
    next of byte i // 128 * 32 + i % 32, as in Q5_K.
    """
    num_rows = len(bits)
    pairs = (bits[:, :, :16] | (bits[:, :, 16:] << 1)).flatten(1)
    padded = functional.pad(pairs, (0, -pairs.shape[1] % 128)).view(num_rows, -1, 4, 32)
    low, second, third, fourth = padded.unbind(2)
    return (low | (second << 2) | (third << 4) | (fourth << 6)).flatten(1)


def _one_level(
    weight: QuantizedTensor,
    quants: Tensor,
    scales: Tensor,
    *,
    minima: Tensor | None = None,
    high: Tensor | None = None,
) -> Planes:
    own_high = quants if high is None else high
    own_minima = scales if minima is None else minima
    return Planes(
        weight.ggml_type, weight.shape, quants, own_high, scales, own_minima, scales, scales
    )


def _q8_0(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    return _one_level(weight, _plane(blocks, 2, 34).view(torch.int8), _halves(blocks, 0))


def _q4_0(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    return _one_level(weight, _plane(blocks, 2, 18), _halves(blocks, 0))


def _q4_1(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    quants, scales = _plane(blocks, 4, 20), _halves(blocks, 0)
    return _one_level(weight, quants, scales, minima=-_halves(blocks, 2))


def _q5_0(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    high = _fifth_bits(_bits_of_masks(blocks[:, :, 2:6]))
    return _one_level(weight, _plane(blocks, 6, 22), _halves(blocks, 0), high=high)


def _q5_1(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    high = _fifth_bits(_bits_of_masks(blocks[:, :, 4:8]))
    quants, scales = _plane(blocks, 8, 24), _halves(blocks, 0)
    return _one_level(weight, quants, scales, minima=-_halves(blocks, 2), high=high)


def _iq4_nl(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    table = iq4_table(blocks.device)
    return _one_level(weight, _plane(blocks, 2, 18), _halves(blocks, 0), high=table)


def _affine(weight: QuantizedTensor, blocks: Tensor, quants: Tensor, high: Tensor) -> Planes:
    """Return the planes of Q4_K and Q5_K, which share scales and minima."""
    scales, minima = unpack_k_scales(blocks[:, :, 4:16].reshape(-1, 12))
    rows = weight.shape[0]
    scale_planes = [scales.reshape(rows, -1).contiguous(), minima.reshape(rows, -1).contiguous()]
    supers = [_halves(blocks, 0), _halves(blocks, 2)]
    return Planes(weight.ggml_type, weight.shape, quants, high, *scale_planes, *supers)


def _q4_k(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    quants = _plane(blocks, 16, 144)
    return _affine(weight, blocks, quants, quants)


def _q5_k(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    return _affine(weight, blocks, _plane(blocks, 48, 176), _plane(blocks, 16, 48))


def _q6_k(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    scales = _plane(blocks, 192, 208).view(torch.int8)
    quants, high, supers = _plane(blocks, 0, 128), _plane(blocks, 128, 192), _halves(blocks, 208)
    return Planes(weight.ggml_type, weight.shape, quants, high, scales, scales, supers, supers)


def _iq4_xs(weight: QuantizedTensor, blocks: Tensor) -> Planes:
    rows, supers = weight.shape[0], _halves(blocks, 0)
    scales = unpack_iq4_scales(blocks.flatten(0, 1)).reshape(rows, -1)
    table = iq4_table(blocks.device)
    quants = _plane(blocks, 8, 136)
    return Planes(weight.ggml_type, weight.shape, quants, table, scales, scales, supers, supers)


def _bits_of_masks(masks: Tensor) -> Tensor:
    """Return the bits of 32-bit masks (num_rows, num_blocks, 4), the lowest first."""
    return unpack_masks(masks.reshape(-1, 4)).view(len(masks), -1, 32)


_SPLITTERS: Final[dict[GGMLType, Callable[[QuantizedTensor, Tensor], Planes]]] = {
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_XS: _iq4_xs,
}
PLANE_TYPES: Final = frozenset(_SPLITTERS)
_DENSE_TYPES: Final = {
    torch.bfloat16: GGMLType.BF16,
    torch.float16: GGMLType.F16,
    torch.float32: GGMLType.F32,
}
