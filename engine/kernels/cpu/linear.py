"""Matrix products with weights that stay as they are stored: quantised, bfloat16, float16, float32.

Used by `engine.layers.linear`. A weight is repacked once (numbers exact, see packed.h). For
quantised weights each call quantises the activation per 32 values, to 8 bits or (exact) to 16, and
multiplies integers; for dense ones it multiplies and adds in float32. A token's result is
bit-identical whatever the other tokens, their number and the threads (for quantised weights the
instruction set as well).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from engine.kernels.cpu import library
from engine.kernels.cpu.arena import Arena
from engine.kernels.cpu.structs import Matrix, PlainRows

# GGML's own numbers, as in packed.h.
TYPE_NUMBERS: Final = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "BF16": 30,
    "MXFP4": 39,
}
DENSE_TYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class QuantizedRows(Protocol):
    """What `pack` needs of a `QuantizedTensor`: plain GGML rows (out, row_bytes) as uint8."""

    @property
    def ggml_type(self) -> _Named: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def packed(self) -> Tensor: ...


class PackedLinear:
    """A weight (out_features, in_features) in the kernels' layout, with its bias."""

    __slots__ = ("_storage", "bias", "in_features", "matrix", "out_features", "type_name")

    def __init__(
        self,
        type_name: str,
        shape: tuple[int, int],
        storage: Tensor,
        bias: Tensor | None,
        *,
        is_exact: bool,
    ) -> None:
        self.type_name = type_name
        self.out_features, self.in_features = shape
        self._storage = storage
        self.bias = bias
        self.matrix = Matrix(
            TYPE_NUMBERS[type_name],
            int(is_exact),
            self.out_features,
            self.in_features,
            storage.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self._storage.numel()


_ARENA: Final = Arena()


def pack(
    weights: Sequence[QuantizedRows | Tensor], bias: Tensor | None, *, is_exact: bool = False
) -> PackedLinear | None:
    """Repack matrices of one type and width, on top of each other, as one for `linear`.

    They are read where they are, by all threads; their bytes are not needed afterwards. None when
    there are no kernels, or none for the type or shape. `is_exact` products round activations to 16
    bits, or not at all, instead of to 8 (see activation.h).
    """
    stored = [_stored(weight) for weight in weights]
    name, first = stored[0]
    columns = weights[0].shape[1]
    for weight, (other_name, rows) in zip(weights, stored, strict=True):
        assert other_name == name, f"{other_name} cannot be stacked on {name}"
        assert weight.shape[1] == columns, f"width {weight.shape[1]} on {columns}"
        assert rows.stride(1) == 1, "the numbers of a row are not contiguous"
    number = TYPE_NUMBERS.get(name)
    if number is None or first.device.type != "cpu" or not library.available():
        return None
    num_rows = sum(weight.shape[0] for weight in weights)
    native = library.load()
    size = native.cortexd_packed_bytes(number, num_rows, columns)
    if size < 0:
        return None
    parts = (PlainRows * len(stored))(
        *(
            PlainRows(rows.data_ptr(), rows.stride(0) * rows.element_size(), rows.shape[0])
            for _, rows in stored
        )
    )
    storage = _ARENA.allocate(size)
    done = native.cortexd_pack(number, parts, len(stored), columns, storage.data_ptr())
    assert done == 0, f"{name} of {num_rows}x{columns} has a size but no packing"
    float_bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    return PackedLinear(name, (num_rows, columns), storage, float_bias, is_exact=is_exact)


def _stored(weight: QuantizedRows | Tensor) -> tuple[str, Tensor]:
    """Return the type's name and the rows as they are stored."""
    if isinstance(weight, Tensor):
        return DENSE_TYPES.get(weight.dtype, str(weight.dtype)), weight
    assert weight.packed.dtype == torch.uint8, f"packed rows are {weight.packed.dtype}, not uint8"
    return weight.ggml_type.name, weight.packed


def linear(packed: PackedLinear, x: Tensor) -> Tensor:
    """Return x @ weight.T + bias: (num_tokens, in) float32 contiguous to (num_tokens, out)."""
    num_tokens = x.shape[0]
    assert x.dtype == torch.float32, f"x is {x.dtype}, not float32"
    assert x.is_contiguous(), f"x has strides {x.stride()}, not contiguous ones"
    assert x.shape == (num_tokens, packed.in_features), (
        f"x is {tuple(x.shape)}, the weight takes {packed.in_features} features"
    )
    out = torch.empty(num_tokens, packed.out_features)
    if num_tokens == 0:
        return out
    done = library.load().cortexd_linear(
        ctypes.byref(packed.matrix), x.data_ptr(), num_tokens, out.data_ptr()
    )
    if done != 0:
        raise MemoryError(f"no memory to quantise {num_tokens} x {packed.in_features} activations")
    return out
