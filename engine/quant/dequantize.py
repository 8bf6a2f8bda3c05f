"""GGML blocks to float32, one vectorised torch function per type.

Called by `QuantizedTensor`; no state. Each function takes blocks (num_blocks, block_bytes) uint8
and returns (num_blocks, block_elements) float32 on the same device. The order of the float32
operations is that of the reference dequantiser, so the results are equal bit for bit.

Source: GGML block layouts as listed in the gguf Python package 0.19 (`quants.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from engine.formats.ggml import GGMLType

_IQ4_CODEBOOK: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 values doubled; the block scale is halved instead.
_MXFP4_CODEBOOK: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def dequantize_blocks(ggml_type: GGMLType, blocks: Tensor) -> Tensor:
    """Return the weights of `blocks` (num_blocks, block_bytes) uint8 as float32."""
    return _FUNCTIONS[ggml_type](blocks)


def _half(blocks: Tensor, offset: int) -> Tensor:
    """Read one float16 per block at `offset`; (num_blocks, 1) float32."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, group_bytes: int) -> Tensor:
    """Split bytes into low nibbles then high nibbles, per group of `group_bytes` bytes."""
    groups = packed.reshape(packed.shape[0], -1, group_bytes)
    return torch.stack((groups & 15, groups >> 4), dim=2)  # (num_blocks, groups, 2, group_bytes)


def _bit_planes(packed: Tensor, group_bytes: int, num_bits: int) -> Tensor:
    """Split bytes into 8/num_bits planes of `num_bits` bits, lowest first, per byte group."""
    groups = packed.reshape(packed.shape[0], -1, group_bytes)
    mask = (1 << num_bits) - 1
    planes = [(groups >> shift) & mask for shift in range(0, 8, num_bits)]
    return torch.stack(planes, dim=2)  # (num_blocks, groups, planes, group_bytes)


def unpack_masks(packed: Tensor) -> Tensor:
    """Unpack little-endian 32-bit masks (num_blocks, 4): bit j is weight j's; (num_blocks, 32)."""
    bits = torch.stack([(packed >> shift) & 1 for shift in range(8)], dim=2)
    return bits.reshape(packed.shape[0], 32)


def _lookup(codebook: tuple[int, ...], indices: Tensor) -> Tensor:
    table = torch.tensor(codebook, dtype=torch.float32, device=indices.device)
    return table[indices.int()]


def _q4_0(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 2:], 16).reshape(-1, 32)
    return _half(blocks, 0) * (quants.float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 4:], 16).reshape(-1, 32)
    return _half(blocks, 0) * quants.float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 6:], 16).reshape(-1, 32) | (unpack_masks(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (quants.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 8:], 16).reshape(-1, 32) | (unpack_masks(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * quants.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    scale = (_half(blocks, 80) * (scales & 15).float()).unsqueeze(2)
    minimum = (_half(blocks, 82) * (scales >> 4).float()).unsqueeze(2)
    quants = _bit_planes(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16)
    return (scale * quants.float() - minimum).reshape(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    num_blocks = blocks.shape[0]
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    high = _bit_planes(packed[:, 8:], 4, 2).reshape(num_blocks, 16)
    scale = _half(blocks, 108) * ((low | (high << 4)).float() - 32)
    quants = _bit_planes(blocks[:, 32:96], 32, 2).reshape(num_blocks, 16, 16)
    # The mask bit is set where nothing is to be subtracted.
    lowered = _bit_planes(blocks[:, :32], 32, 1).reshape(num_blocks, 16, 16) ^ 1
    values = quants.float() - (lowered << 2).float()
    return (scale.unsqueeze(2) * values).reshape(num_blocks, 256)


def unpack_k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 12 bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima."""
    first, second, mixed = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (mixed & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (mixed >> 4) | ((second >> 2) & 48)), dim=1)
    return scales, minima


def _k_affine(blocks: Tensor, quants: Tensor) -> Tensor:
    """Apply the scales and minima that Q4_K and Q5_K share to (num_blocks, 8, 32) quants."""
    scales, minima = unpack_k_scales(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.float()).unsqueeze(2)
    minimum = (_half(blocks, 2) * minima.float()).unsqueeze(2)
    return (scale * quants.float() - minimum).reshape(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_affine(blocks, _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32)
    high = _bit_planes(blocks[:, 16:48], 32, 1).reshape(-1, 8, 32)
    return _k_affine(blocks, low | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    scale = (_half(blocks, 208) * scales).unsqueeze(2)
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 256)
    high = _bit_planes(blocks[:, 128:192], 32, 2).reshape(-1, 256)
    quants = (low | (high << 4)).float() - 32
    return (scale * quants.reshape(-1, 16, 16)).reshape(-1, 256)


def _iq4_nl(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 2:], 16).reshape(-1, 32)
    return _half(blocks, 0) * _lookup(_IQ4_CODEBOOK, quants)


def iq4_table(device: torch.device) -> Tensor:
    """Return the 16 numbers that the nibbles of IQ4_NL and IQ4_XS stand for, int8."""
    return torch.tensor(_IQ4_CODEBOOK, dtype=torch.int8, device=device)


def unpack_iq4_scales(blocks: Tensor) -> Tensor:
    """Return the eight scales of IQ4_XS blocks (num_blocks, 136), int8 from -32 to 31."""
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).reshape(-1, 8)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2)
    return (low | (high.reshape(-1, 8) << 4)).to(torch.int8) - 32


def _iq4_xs(blocks: Tensor) -> Tensor:
    scale = (_half(blocks, 0) * unpack_iq4_scales(blocks).float()).unsqueeze(2)
    quants = _nibbles(blocks[:, 8:], 16).reshape(-1, 8, 32)
    return (scale * _lookup(_IQ4_CODEBOOK, quants)).reshape(-1, 256)


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[:, :1].int()
    # Half of 2^(e - 127); the two smallest are subnormal in float32.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=2), (exponent - 1) << 23)
    quants = _nibbles(blocks[:, 1:], 16).reshape(-1, 32)
    return bits.view(torch.float32) * _lookup(_MXFP4_CODEBOOK, quants)


_FUNCTIONS: Final[dict[GGMLType, Callable[[Tensor], Tensor]]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
}
