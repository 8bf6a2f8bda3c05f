"""A weight matrix that stays in its GGML blocks, and the way back to numbers.

Built by the loader, read by `Linear`, `Embedding` and the native kernels. Holds bytes only; every
use dequantises what it needs, so no full-size float copy outlives a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.formats.ggml import GGMLType
from engine.quant.dequantize import dequantize_blocks


class QuantizedTensor:
    """A matrix (num_rows, num_columns) of type `ggml_type`.

    `packed` is uint8 (num_rows, row_bytes), each row contiguous, in file order.
    """

    __slots__ = ("ggml_type", "packed", "shape")

    def __init__(self, ggml_type: GGMLType, shape: tuple[int, int], packed: Tensor) -> None:
        row_bytes = ggml_type.row_bytes(shape[1])
        assert packed.dtype == torch.uint8, f"packed is {packed.dtype}, not uint8"
        assert tuple(packed.shape) == (shape[0], row_bytes), (
            f"packed is {tuple(packed.shape)}, not {row_bytes} bytes a row for {shape}"
        )
        self.ggml_type = ggml_type
        self.shape = shape
        self.packed = packed

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"QuantizedTensor({self.ggml_type.name}, {rows}x{columns}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.packed.device

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.packed.numel()

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the tensor on `device` (itself when it is there already)."""
        return QuantizedTensor(self.ggml_type, self.shape, self.packed.to(device))

    def clone(self) -> QuantizedTensor:
        """Return a copy that owns its bytes."""
        return QuantizedTensor(self.ggml_type, self.shape, self.packed.clone())

    def dequantize(self, dtype: torch.dtype, rows: Tensor | slice | None = None) -> Tensor:
        """Return (num_selected, num_columns) in `dtype`; `rows` are int64 ids or a slice."""
        packed = self.packed if rows is None else self.packed[rows]
        if packed.shape[0] == 0:
            return torch.empty(0, self.shape[1], dtype=dtype, device=self.device)
        blocks = packed.reshape(-1, self.ggml_type.block_bytes)
        values = dequantize_blocks(self.ggml_type, blocks)
        return values.to(dtype).reshape(packed.shape[0], self.shape[1])


def concatenate_rows(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """Stack matrices of one type and width on top of each other, without dequantising."""
    first = tensors[0]
    assert all(t.ggml_type == first.ggml_type and t.shape[1] == first.shape[1] for t in tensors), (
        f"cannot stack {tensors}"
    )
    packed = torch.cat([tensor.packed for tensor in tensors])
    return QuantizedTensor(first.ggml_type, (packed.shape[0], first.shape[1]), packed)
