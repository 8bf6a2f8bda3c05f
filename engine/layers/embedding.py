"""Token embedding: rows of a dense or quantised matrix, gathered and dequantised per token.

A tied output head shares the matrix through `as_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.linear import Backend, Linear, NativeProduct, Weight, pack_native, stored_bytes
from engine.quant.tensor import QuantizedTensor


class Embedding:
    """Rows of `weight` (vocab_size, hidden_size) by token id, in `dtype`."""

    def __init__(
        self,
        weight: Weight,
        *,
        dtype: torch.dtype = torch.float32,
        native_head: NativeProduct | None = None,
    ) -> None:
        """Take the matrix in its stored type; `native_head` is the same one packed as a head.

        With a native head the rows may be a view of the mapped file: only rows that are looked up
        are ever read, so the matrix is not in memory twice.
        """
        self.weight = weight
        self.vocab_size: int = weight.shape[0]
        self.hidden_size: int = weight.shape[1]
        self._dtype = dtype
        self._native_head = native_head

    def __repr__(self) -> str:
        return f"Embedding({self.vocab_size}x{self.hidden_size}, {self._dtype})"

    @property
    def is_native(self) -> bool:
        """Whether a native kernel computes the head that shares this matrix."""
        return self._native_head is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held; a mapped file's pages are not counted."""
        if self._native_head is not None:
            return self._native_head.num_bytes
        return stored_bytes(self.weight)

    def __call__(self, ids: Tensor) -> Tensor:
        """Map token ids (num_tokens,) int64 to (num_tokens, hidden_size)."""
        if isinstance(self.weight, QuantizedTensor):
            return self.weight.dequantize(self._dtype, ids)
        return self.weight[ids].to(self._dtype)

    def as_linear(self) -> Linear:
        """Return the output head (hidden_size → vocab_size) that shares this matrix."""
        if self._native_head is not None:
            return Linear.from_products([self._native_head], self.hidden_size)
        return Linear(self.weight, dtype=self._dtype, backend="reference")


def tied_embedding(
    weight: Weight, head: Weight, *, dtype: torch.dtype, backend: Backend
) -> Embedding | None:
    """Return an embedding over the mapped view `weight` with a native head; None without one.

    `head` is the same matrix, or the same quantised.
    """
    packed = pack_native([head], None, dtype, backend)
    return None if packed is None else Embedding(weight, dtype=dtype, native_head=packed)
