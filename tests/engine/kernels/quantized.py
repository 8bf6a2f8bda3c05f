"""Random GGML rows of each type, read by gguf's numpy code: an independent view of the layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

TYPES = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
]
# Where the float16 scales stand in a block that numpy cannot produce by quantising.
FLOAT16_SCALES = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0]}
IQ4_NUMBERS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
FP4_NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


Parts = tuple[Tensor, Tensor, Tensor | None]


@dataclass
class NamedType:
    name: str


@dataclass
class Rows:
    """Has the fields of a QuantizedTensor."""

    ggml_type: NamedType
    shape: tuple[int, int]
    packed: Tensor

    def dequantize(self) -> Tensor:
        kind = gguf.GGMLQuantizationType[self.ggml_type.name]
        return torch.from_numpy(dequantize(self.packed.numpy(), kind))


def random_rows(name: str, num_rows: int, num_columns: int, seed: int = 0) -> Rows:
    """Return rows of plausible weights of about 0.05."""
    random = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[name]
    if name in FLOAT16_SCALES:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (num_rows, num_columns // block_size, block_bytes)
        blocks = random.integers(0, 256, shape, dtype=np.uint8)
        for offset in FLOAT16_SCALES[name]:
            scale = random.uniform(1e-4, 1e-3, shape[:2]).astype(np.float16)
            blocks[:, :, offset : offset + 2] = scale[..., None].view(np.uint8)
        packed = blocks.reshape(num_rows, -1)
    else:
        weights = random.standard_normal((num_rows, num_columns), dtype=np.float32) * 0.05
        packed = quantize(weights, kind)
    return Rows(NamedType(name), (num_rows, num_columns), torch.from_numpy(packed))


def exact_parts(rows: Rows) -> Parts:
    """Return integers (out, in), scales per 32 (or 16) and minima, all float32."""
    return _PARTS[rows.ggml_type.name](rows)


Reader = Callable[[Rows], Parts]


def _halves(blocks: np.ndarray, begin: int) -> Tensor:
    raw = np.ascontiguousarray(blocks[:, :, begin : begin + 2]).view(np.float16)
    return torch.from_numpy(raw.astype(np.float32)[..., 0])


def _legacy(block_bytes: int, has_minimum: bool, has_high: bool, offset: int) -> Reader:
    def parts(rows: Rows) -> Parts:
        out, columns = rows.shape
        blocks = rows.packed.numpy().reshape(out, columns // 32, block_bytes)
        scales = _halves(blocks, 0)
        minima = _halves(blocks, 2) if has_minimum else None
        begin = (4 if has_minimum else 2) + (4 if has_high else 0)
        nibbles = blocks[:, :, begin:].astype(np.int64)
        values = np.concatenate([nibbles & 15, nibbles >> 4], -1)
        if has_high:
            word = np.ascontiguousarray(blocks[:, :, begin - 4 : begin]).view(np.uint32)
            values |= ((word.astype(np.int64) >> np.arange(32)) & 1) << 4
        integers = torch.from_numpy(values - offset).reshape(out, columns).float()
        return integers, scales, minima

    return parts


def _q8_0(rows: Rows) -> Parts:
    out, columns = rows.shape
    blocks = rows.packed.numpy().reshape(out, columns // 32, 34)
    integers = torch.from_numpy(blocks[:, :, 2:].view(np.int8).astype(np.float32))
    return integers.reshape(out, columns), _halves(blocks, 0), None


def _k_with_minimum(block_bytes: int, nibble_begin: int) -> Reader:
    def parts(rows: Rows) -> Parts:
        out, columns = rows.shape
        blocks = rows.packed.numpy().reshape(out, columns // 256, block_bytes)
        packed = blocks[:, :, 4:16].astype(np.int64)
        low, mid, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
        factor = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
        minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], -1)
        nibbles = blocks[:, :, nibble_begin:].reshape(out, -1, 4, 32).astype(np.int64)
        values = np.stack([nibbles & 15, nibbles >> 4], 3).reshape(out, -1, 8, 32)
        if nibble_begin == 48:
            bits = blocks[:, :, 16:48].astype(np.int64)[:, :, None, :]
            values = values | (bits >> np.arange(8)[:, None] & 1) << 4
        scales = _halves(blocks, 0)[..., None] * torch.from_numpy(factor).float()
        minima = _halves(blocks, 2)[..., None] * torch.from_numpy(minimum).float()
        integers = torch.from_numpy(values).reshape(out, columns).float()
        return integers, scales.flatten(1), -minima.flatten(1)

    return parts


def _q6_k(rows: Rows) -> Parts:
    out, columns = rows.shape
    blocks = rows.packed.numpy().reshape(out, columns // 256, 210)
    factor = torch.from_numpy(blocks[:, :, 192:208].view(np.int8).astype(np.float32))
    scales = _halves(blocks, 208)[..., None] * factor
    # value / scale is exact to within rounding; integers of zero scales do not matter.
    weights = rows.dequantize().reshape(out, -1, 16)
    spread = scales.reshape(out, -1, 1)
    integers = torch.where(spread == 0, torch.zeros(()), weights / spread).round()
    return integers.reshape(out, columns), scales.flatten(1), None


def _iq4_nl(rows: Rows) -> Parts:
    out, columns = rows.shape
    blocks = rows.packed.numpy().reshape(out, columns // 32, 18)
    return _iq4_integers(blocks[:, :, 2:], rows), _halves(blocks, 0), None


def _iq4_xs(rows: Rows) -> Parts:
    out, columns = rows.shape
    blocks = rows.packed.numpy().reshape(out, columns // 256, 136).astype(np.int64)
    low = np.stack([blocks[:, :, 4:8] & 15, blocks[:, :, 4:8] >> 4], -1).reshape(out, -1, 8)
    high = (blocks[:, :, 2] | blocks[:, :, 3] << 8)[:, :, None] >> 2 * np.arange(8) & 3
    factor = torch.from_numpy((low | high << 4) - 32).float()
    scales = _halves(blocks.astype(np.uint8), 0)[..., None] * factor
    nibbles = blocks[:, :, 8:].reshape(out, -1, 16)
    return _iq4_integers(nibbles, rows), scales.flatten(1), None


def _iq4_integers(nibbles: np.ndarray, rows: Rows) -> Tensor:
    places = np.concatenate([nibbles & 15, nibbles >> 4], -1)
    return torch.tensor(IQ4_NUMBERS)[torch.from_numpy(places).long()].reshape(rows.shape).float()


def _mxfp4(rows: Rows) -> Parts:
    out, columns = rows.shape
    blocks = rows.packed.numpy().reshape(out, columns // 32, 17).astype(np.int64)
    places = np.concatenate([blocks[:, :, 1:] & 15, blocks[:, :, 1:] >> 4], -1)
    numbers = torch.tensor([*FP4_NUMBERS, *(-number for number in FP4_NUMBERS)])
    scales = torch.from_numpy(2.0 ** (blocks[:, :, 0] - 128.0)).float()
    return 2 * numbers[torch.from_numpy(places)].reshape(rows.shape), scales, None


_PARTS = {
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "Q4_0": _legacy(18, False, False, 8),
    "Q4_1": _legacy(20, True, False, 0),
    "Q5_0": _legacy(22, False, True, 16),
    "Q5_1": _legacy(24, True, True, 0),
    "Q8_0": _q8_0,
    "Q4_K": _k_with_minimum(144, 16),
    "Q5_K": _k_with_minimum(176, 48),
    "Q6_K": _q6_k,
}
