"""Dense rows to GGML blocks, vectorised: quantising a safetensors model while it is loaded.

The inverse of `engine.quant.dequantize`. The 32-element types follow the reference quantiser; the
K types fit scale and minimum of each sub-block by least squares over a few candidates, which is
close to the reference's longer search. Works on any device; memory is bounded by slabs of rows.

Source: GGML block layouts as listed in the gguf Python package 0.19 (`quants.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from engine.formats.ggml import GGMLType
from engine.quant.tensor import QuantizedTensor

# Elements at a time, of which the K types hold about ten float copies: on a CPU they should stay in
# the second-level cache, a GPU wants many.
SLAB_ELEMENTS: Final = {"cpu": 1 << 17, "cuda": 1 << 24}
# By how much the largest value is stretched beyond the last level, per candidate.
_AFFINE_STRETCH: Final = (-0.8, -0.4, 0.0, 0.4, 0.8)
_SYMMETRIC_STRETCH: Final = (-0.6, -0.3, 0.0, 0.3, 0.6)


def quantize_rows(rows: Tensor, ggml_type: GGMLType) -> QuantizedTensor:
    """Return `rows` (num_rows, num_columns), of any float dtype, as `ggml_type` on their device.

    num_columns is a multiple of the type's block, and all values are finite.
    """
    num_rows, num_columns = rows.shape
    row_bytes = ggml_type.row_bytes(num_columns)
    packed = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=rows.device)
    step = max(1, SLAB_ELEMENTS.get(rows.device.type, 1 << 20) // num_columns)
    for begin in range(0, num_rows, step):
        slab = rows[begin : begin + step].float()
        blocks = slab.reshape(-1, ggml_type.block_elements)
        packed[begin : begin + step] = _FUNCTIONS[ggml_type](blocks).view(-1, row_bytes)
    return QuantizedTensor(ggml_type, (num_rows, num_columns), packed)


def _half(values: Tensor) -> Tensor:
    """Return one float16 per block, (num_blocks, 1), as its two bytes."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _round(values: Tensor) -> Tensor:
    """Round half away from zero, as the reference does."""
    return values.abs().add_(0.5).floor_().copysign_(values)


def _signed_peak(blocks: Tensor) -> Tensor:
    """Return the value of largest magnitude along the last dimension, kept."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _pack_nibbles(quants: Tensor, group_bytes: int) -> Tensor:
    """Put (num_blocks, elements) uint8 below 16 into bytes: low half, then high half of a group."""
    groups = quants.view(len(quants), -1, 2, group_bytes)
    return (groups[:, :, 0] | (groups[:, :, 1] << 4)).flatten(1)


def _pack_planes(quants: Tensor, group_bytes: int, num_bits: int) -> Tensor:
    """Put (num_blocks, elements) uint8 into planes of `num_bits`, lowest first, per byte group."""
    planes = quants.view(len(quants), -1, 8 // num_bits, group_bytes)
    packed = torch.zeros_like(planes[:, :, 0])
    for plane in range(8 // num_bits):
        packed |= planes[:, :, plane] << (plane * num_bits)
    return packed.flatten(1)


def _pack_high_bits_32(quants: Tensor) -> Tensor:
    """Put bit 4 of 32 quants into a little-endian 32-bit mask."""
    bits = (quants >> 4).view(len(quants), 4, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=quants.device)
    return (bits << shifts).sum(-1, dtype=torch.uint8)


def _q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    quants = _round(blocks * _inverse(scale)).to(torch.int8)
    return torch.cat([_half(scale), quants.view(torch.uint8)], dim=1)


def _centred(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return scale and quants 0..2 * levels - 1 around `levels`; the peak becomes 0."""
    scale = _signed_peak(blocks) / -levels
    quants = blocks * _inverse(scale) + (levels + 0.5)
    return scale, quants.clamp_(0, 2 * levels - 1).to(torch.uint8)


def _ranged(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, minimum and quants 0..levels."""
    least = blocks.amin(-1, keepdim=True)
    scale = (blocks.amax(-1, keepdim=True) - least) / levels
    quants = (blocks - least) * _inverse(scale) + 0.5
    return scale, least, quants.clamp_(0, levels).to(torch.uint8)


def _q4_0(blocks: Tensor) -> Tensor:
    scale, quants = _centred(blocks, 8)
    return torch.cat([_half(scale), _pack_nibbles(quants, 16)], dim=1)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, least, quants = _ranged(blocks, 15)
    return torch.cat([_half(scale), _half(least), _pack_nibbles(quants, 16)], dim=1)


def _q5_0(blocks: Tensor) -> Tensor:
    scale, quants = _centred(blocks, 16)
    parts = [_half(scale), _pack_high_bits_32(quants), _pack_nibbles(quants & 15, 16)]
    return torch.cat(parts, dim=1)


def _q5_1(blocks: Tensor) -> Tensor:
    scale, least, quants = _ranged(blocks, 31)
    bits = [_pack_high_bits_32(quants), _pack_nibbles(quants & 15, 16)]
    return torch.cat([_half(scale), _half(least), *bits], dim=1)


def _fit_affine(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return scale and minimum (at least 0, to be subtracted) for each (..., 32) sub-block.

    Large values weigh more. For each candidate scale the best line through the rounded values is
    found; the candidate with the least weighted error wins.
    """
    weights = values.abs() + values.square().mean(-1, keepdim=True).sqrt()
    least = values.amin(-1, keepdim=True).clamp(max=0)
    span = values.amax(-1, keepdim=True) - least
    sum_w = weights.sum(-1)
    sum_x = (weights * values).sum(-1)
    best_error = torch.full_like(sum_w, torch.inf)
    best_scale, best_least = torch.zeros_like(sum_w), least.squeeze(-1).clone()
    for stretch in _AFFINE_STRETCH:
        quants = _round((values - least) * ((levels + stretch) * _inverse(span))).clamp_(0, levels)
        weighted = weights * quants
        sum_l, sum_l2 = weighted.sum(-1), (weighted * quants).sum(-1)
        sum_xl = (weighted * values).sum(-1)
        scale = (sum_w * sum_xl - sum_x * sum_l) * _inverse(sum_w * sum_l2 - sum_l * sum_l)
        offset = (sum_x - scale * sum_l) * _inverse(sum_w)
        # The format has no positive offset: then the line goes through zero.
        is_positive = offset > 0
        scale = torch.where(is_positive, sum_xl * _inverse(sum_l2), scale).clamp_(min=0)
        offset = torch.where(is_positive, 0.0, offset)
        difference = quants.mul_(scale.unsqueeze(-1)).add_(offset.unsqueeze(-1)).sub_(values)
        error = difference.square_().mul_(weights).sum(-1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_least = torch.where(is_better, offset, best_least)
    return best_scale, -best_least


def _k_affine(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the 16 header bytes that Q4_K and Q5_K share, and quants 0..levels."""
    values = blocks.view(-1, 8, 32)
    scales, minima = _fit_affine(values, levels)
    super_scale = (scales.amax(-1, keepdim=True) / 63).to(torch.float16)
    super_min = (minima.amax(-1, keepdim=True) / 63).to(torch.float16)
    scale6 = _round(scales * _inverse(super_scale.float())).clamp_(0, 63)
    min6 = _round(minima * _inverse(super_min.float())).clamp_(0, 63)
    scale = (super_scale.float() * scale6).unsqueeze(-1)
    minimum = (super_min.float() * min6).unsqueeze(-1)
    quants = _round((values + minimum) * _inverse(scale)).clamp_(0, levels).to(torch.uint8)
    s, m = scale6.to(torch.uint8), min6.to(torch.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    mixed = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    header = torch.cat([_half(super_scale), _half(super_min), first, second, mixed], dim=1)
    return header, quants.flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    header, quants = _k_affine(blocks, 15)
    return torch.cat([header, _pack_nibbles(quants, 32)], dim=1)


def _q5_k(blocks: Tensor) -> Tensor:
    header, quants = _k_affine(blocks, 31)
    high, low = _pack_planes(quants >> 4, 32, 1), _pack_nibbles(quants & 15, 32)
    return torch.cat([header, high, low], dim=1)


def _fit_symmetric(values: Tensor, levels: int) -> Tensor:
    """Return the scale of each (..., 16) sub-block, for quants -levels..levels - 1."""
    weights = values.square()
    peak = _signed_peak(values)
    best_gain = torch.zeros_like(peak.squeeze(-1))
    best_scale = torch.zeros_like(best_gain)
    for stretch in _SYMMETRIC_STRETCH:
        inverse = -(levels + stretch) * _inverse(peak)
        quants = _round(values * inverse).clamp_(-levels, levels - 1)
        weighted = weights * quants
        sum_xl, sum_l2 = (weighted * values).sum(-1), (weighted * quants).sum(-1)
        scale = sum_xl * _inverse(sum_l2)
        gain = sum_xl * scale  # by which the line lowers the weighted error
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scale = torch.where(is_better, scale, best_scale)
    return best_scale


def _q6_k(blocks: Tensor) -> Tensor:
    values = blocks.view(-1, 16, 16)
    scales = _fit_symmetric(values, 32)
    super_scale = (_signed_peak(scales) / -128).to(torch.float16)
    scale8 = _round(scales * _inverse(super_scale.float())).clamp_(-128, 127)
    scale = (super_scale.float() * scale8).unsqueeze(-1)
    quants = (_round(values * _inverse(scale)).clamp_(-32, 31) + 32).to(torch.uint8).flatten(1)
    parts = [
        _pack_nibbles(quants & 15, 64),
        _pack_planes(quants >> 4, 32, 2),
        scale8.to(torch.int8).view(torch.uint8),
        _half(super_scale),
    ]
    return torch.cat(parts, dim=1)


_FUNCTIONS: Final[dict[GGMLType, Callable[[Tensor], Tensor]]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
