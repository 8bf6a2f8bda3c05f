"""Quantised matrices on the Triton kernels: the product, and the embedding that shares its rows.

Made by `Linear` and the loader for the types in `planes.PLANE_TYPES`; all others are dequantised
slab by slab in torch, and the loader logs which.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.triton.planes import Planes, split_planes
from engine.kernels.triton.quant_linear import MAX_TOKENS, dequantize_rows, multiply
from engine.layers.embedding import Embedding
from engine.layers.linear import SLAB_BYTES, Linear
from engine.quant.tensor import QuantizedTensor


class PlaneProduct:
    """x (num_tokens, in) → (num_tokens, out); many tokens through rows dequantised in slabs."""

    def __init__(self, planes: Planes, bias: Tensor | None) -> None:
        self.planes = planes
        self.bias = bias
        self.out_features = planes.shape[0]
        self.num_bytes = planes.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        if 1 <= len(x) <= MAX_TOKENS:
            out = multiply(x.contiguous(), self.planes)
        else:
            out = self._in_slabs(x)
        return out if self.bias is None else out + self.bias

    def _in_slabs(self, x: Tensor) -> Tensor:
        num_rows, num_columns = self.planes.shape
        count = max(1, SLAB_BYTES["cuda"] // (x.element_size() * num_columns))
        out = x.new_empty(len(x), num_rows)
        for begin in range(0, num_rows, count):
            end = min(begin + count, num_rows)
            slab = dequantize_rows(self.planes, x.dtype, (begin, end))
            out[:, begin:end] = functional.linear(x, slab)
        return out


class PlaneEmbedding(Embedding):
    """Rows by token id from the planes that the head multiplies with."""

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype) -> None:
        self.vocab_size, self.hidden_size = weight.shape
        self._dtype = dtype
        self._product = PlaneProduct(split_planes(weight), None)

    def __repr__(self) -> str:
        return f"PlaneEmbedding({self.vocab_size}x{self.hidden_size}, {self._dtype})"

    @property
    def is_native(self) -> bool:
        """False: the native kernels are the CPU's."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        return self._product.num_bytes

    def __call__(self, ids: Tensor) -> Tensor:
        """Map token ids (num_tokens,) int64 to (num_tokens, hidden_size)."""
        return dequantize_rows(self._product.planes, self._dtype, ids)

    def as_linear(self) -> Linear:
        """Return the output head (hidden_size → vocab_size) that shares this matrix."""
        return Linear.from_products([self._product], self.hidden_size)
